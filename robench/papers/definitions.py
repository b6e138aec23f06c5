"""What a paper's file and a table's file may hold, and how they are read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from robench import catalog
from robench.catalog import NonNegativeFloat, PositiveFloat, PositiveInt
from robench.recipe import Recipe, Step, apply_settings, load_recipe
from robench.records import Value
from robench.threat_model import ThreatModel

ScaleName = Literal["paper", "reduced", "smoke"]

#: From the recipe as it is to a run of seconds; the first that was measured is the one that is shown.
SCALES: tuple[ScaleName, ...] = get_args(ScaleName)

Measure = Literal[
    "clean",
    "robust",
    "average",
    "transfer",
    "distance",
    "relative-distance",
    "certificate",
    "certified",
    "time",
    "setting",
]
"""What a number is: the clean accuracy; that under an attack; its average over growing epsilons (the area under the
curve from 0); that on images made on another model; a statistic of the distances at which an attack fools the model, or
of those over the image's norm; a statistic of a certificate's radii; the share of images that are right with at least a
radius; the median seconds that one image takes; or a value of the recipe itself."""

#: What is asked of a network or of a recipe: nothing is trained or attacked for it.
UNTRAINED: frozenset[str] = frozenset({"time", "setting"})

Kind = Literal["results", "hyperparameters", "architecture", "qualitative", "lost"]


class Facts(Value):
    """What is asked for a cell. A table, its rows and its columns each say a part of it."""

    recipe: str | None = None
    changes: tuple[str, ...] = ()
    """What the row changes about its recipe, as `--set` takes it."""
    model: str | None = None
    """The model's name where that is not the recipe's: needed with `changes`."""
    measure: Measure | None = None
    attack: str | None = None
    threat: str | None = None
    epsilons: tuple[str, ...] = ()
    """Of an average: ascending."""
    source: str | None = None
    """Of a transfer: the model whose adversarial images are shown, as a row's `model` or `recipe` names it."""
    certificate: str | None = None
    statistic: Literal["mean", "median", "std", "max"] | None = None
    over: Literal["all", "correct", "positive"] = "all"
    """Which images a certificate's statistic is over: all of them (0 where it abstains), those classified correctly,
    or those with a radius above 0."""
    radius: NonNegativeFloat | None = None
    """Of a certified share."""
    split: Literal["test", "train"] = "test"
    sigma: NonNegativeFloat = 0.0
    """Of a model that is smoothed: the deviation of the noise under which it decides, by `votes`."""
    votes: PositiveInt = 1
    top_k: PositiveInt = 1
    device: Literal["cpu", "cuda"] = "cpu"
    """Of a time, that of one image decided by `votes`."""
    setting: str | None = None
    """Of a setting: `optimizer.weight_decay`, `regularizers.emr.strength`."""
    needs: str | None = None
    """Why it is not measured, and what that would take."""
    note: str | None = None
    """What a reader must know beside our number."""


class Column(Facts):
    """A column of a table."""

    id: str
    title: str
    unit: str | None = None
    """Where it is not the table's."""
    tolerance: PositiveFloat | None = None
    better: Literal["higher", "lower", "neither"] = "neither"
    """Which values are best; where that is `neither`, none is marked."""


class Row(Facts):
    """A row of a table with its printed values."""

    id: str
    title: str
    group: str = ""
    """Rows among which the best are sought."""
    printed: tuple[str, ...]
    """The characters of the paper; `-` where it prints a dash or nothing."""
    inferred: tuple[str, ...] = ()
    """Where the printed values are lost: what the paper's text says instead."""
    cells: Mapping[str, Facts] = Field(default_factory=dict)
    """What single cells have instead, by their columns' ids."""


class Source(Value):
    """A model that stands in no row and makes the images of a transfer: a twin trained with another seed."""

    model: str
    recipe: str
    changes: tuple[str, ...] = ()


class Smaller(Value):
    """How recipes are made smaller, and what is asked of their models."""

    changes: tuple[str, ...]
    """Of all of them, as `--set` takes them."""
    examples: PositiveInt
    """Test images that are attacked."""
    says: str
    """The same in words."""

    def told(self, *also: str) -> str:
        """Return all of it for a reader, `also` after the changes."""
        return f"{', '.join((*self.changes, *also))}, {self.examples:,} test images"


class Scale(Smaller):
    """How a table is computed below the paper's scale; the same for all of its rows on a data set."""

    datasets: Mapping[str, Smaller] = Field(default_factory=dict)
    """What holds instead for the recipes of a data set, where a table has rows on several."""
    networks: Mapping[str, str] = Field(default_factory=dict)
    """What takes the place of a network that is too large."""

    def of(self, dataset: str) -> Smaller:
        """Return what holds for the recipes of a data set."""
        return self.datasets.get(dataset, self)

    def told_everywhere(self) -> str:
        """Return what holds, for a reader, with what takes the place of which network and other data sets' scales."""
        networks = [f"{small} instead of {paper}" for paper, small in self.networks.items()]
        return "; ".join(
            [self.told(*networks), *(f"on {name} {other.told()}" for name, other in self.datasets.items())]
        )


class PaperTable(Value):
    """One table of a paper."""

    paper: str
    summary: str
    """What the table shows, in our words."""
    source: str
    """Which table it is."""
    kind: Kind
    unit: str = "percent"
    tolerance: PositiveFloat = 1.0
    """A difference up to this says nothing: retraining moves numbers that far."""
    best_in: Literal["columns", "rows"] = "columns"
    """Where the best are sought: down a column, or along a row where the columns are models."""
    corner: str = "Method"
    """What the rows' titles are."""
    examples: PositiveInt | None = None
    """Images that the paper evaluates; None: the whole split."""
    provenance: str | None = None
    """Where the printed values are from, where not from the paper itself."""
    notes: tuple[str, ...] = ()
    cells: Facts = Facts()
    """What every cell has unless its row or column says otherwise."""
    scales: Mapping[Literal["reduced", "smoke"], Scale] = Field(default_factory=dict)
    columns: tuple[Column, ...] = ()
    rows: tuple[Row, ...] = ()
    sources: tuple[Source, ...] = ()

    def examples_at(self, scale: ScaleName, dataset: str) -> int | None:
        """Return how many images of a data set are looked at; None for all of the split."""
        return self.examples if scale == "paper" else self.scales[scale].of(dataset).examples

    @model_validator(mode="after")
    def _is_rectangular(self) -> Self:
        for row in self.rows:
            if len(row.printed) != len(self.columns):
                raise ValueError(f"row {row.id} has {len(row.printed)} printed values for {len(self.columns)} columns")
        for names in ([c.id for c in self.columns], [r.id for r in self.rows]):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"id {twice[0]} comes twice")
        return self

    def facts(self, row: Row, column: Column) -> Facts:
        """Return what is asked for a cell."""
        parts: list[Facts] = [self.cells, column, row, row.cells.get(column.id, Facts())]
        merged = {name: getattr(part, name) for part in parts for name in part.model_fields_set & _FACTS}
        return Facts(**merged)

    def entries(self) -> Iterator[tuple[Row, Column, Facts]]:
        """Yield every cell with what is asked for it, row by row."""
        for row in self.rows:
            for column in self.columns:
                yield row, column, self.facts(row, column)


_FACTS = set(Facts.model_fields)


class Claim(Value):
    """One checkable sentence of a paper."""

    id: str
    statement: str
    """In our words."""
    source: str
    """Where the paper says it."""
    printed: str | None = None
    """Its number, where it has one; several, separated by commas."""
    unit: str | None = None
    measure: str | None = None
    """What our number is: an expression over cells (:mod:`robench.papers.claims`)."""
    holds: str | None = None
    """When it holds: a condition over cells, `measured` and `printed` being the two numbers."""
    tolerance: NonNegativeFloat = 1.0
    """Without `holds`, our number may be that far from the printed one."""
    needs: str | None = None
    """What it would take to measure it, where that cannot be expressed."""
    note: str | None = None

    @model_validator(mode="after")
    def _can_be_decided(self) -> Self:
        if not (self.holds or self.needs or (self.measure and self.printed)):
            raise ValueError(f"claim {self.id} needs measure and printed, or holds, or needs")
        return self


class Paper(Value):
    """One paper."""

    title: str
    authors: str
    source: str
    summary: str
    code: str | None = None
    tables: tuple[str, ...]
    """In the order of the paper."""
    figures: tuple[str, ...] = ()
    """In the order of the paper."""
    claims: tuple[Claim, ...] = ()


@functools.cache
def load_table(name: str) -> PaperTable:
    """Return the table of that name; raise UnknownName, or PluginError for a file that breaks the rules."""
    found: PaperTable = read_definition("tables", name, PaperTable)
    return found


@functools.cache
def load_paper(name: str) -> Paper:
    """Return the paper of that name."""
    found: Paper = read_definition("papers", name, Paper)
    return found


def read_definition(kind: str, name: str, type_: Any) -> Any:
    """Return the content of a TOML plugin as a value; raise PluginError for a file that breaks the rules."""
    plugin = catalog.find(kind, name)
    try:
        return type_.model_validate(plugin.facts)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise catalog.PluginError(plugin.path, f"is no valid {type_.__name__}: {place}: {first['msg']}") from None


def scaled_name(model: str, scale: ScaleName) -> str:
    """Return the name of a model at a scale: `trades-mnist-reduced`."""
    return model if scale == "paper" else f"{model}-{scale}"


@functools.cache
def changes_at(recipe: str, changes: tuple[str, ...], scale: ScaleName, table: str) -> tuple[str, ...]:
    """Return everything that `--set` has to change about a recipe for a row of a table at a scale.

    A schedule by steps keeps its shape: its milestones stay at the same share of the training. A model that the recipe
    starts from or learns from is taken at the same scale where a recipe makes it.
    """
    if scale == "paper":
        return changes
    stated = load_table(table).scales[scale]
    full = apply_settings(load_recipe(recipe), changes)
    paper = full.architecture.name if full.architecture else ""
    network = stated.networks.get(paper)
    smaller = stated.of(full.dataset)
    asked = (*smaller.changes, *([f"architecture.name={network}"] if network else []))
    small = apply_settings(full, asked)
    share, adapted = small.epochs / full.epochs, []
    if share < 1 and isinstance(small.schedule, Step):
        adapted.append(f"schedule.milestones=[{', '.join(f'{share * m:.6g}' for m in small.schedule.milestones)}]")
    named = {key: getattr(small, key) for key in ("start", "teacher")}
    adapted += [f"{key}={scaled_name(other, scale)}" for key, other in named.items() if has_recipe(other)]
    told = [small.scale, smaller.says, *([f"{network} instead of {paper}"] if network else [])]
    return (*changes, *asked, *adapted, f"scale={'; '.join(map(str, told))}")


@functools.cache
def scaled_recipe(recipe: str, changes: tuple[str, ...], scale: ScaleName, table: str) -> Recipe:
    """Return the recipe of a row of a table at a scale."""
    return apply_settings(load_recipe(recipe), changes_at(recipe, changes, scale, table))


def has_recipe(name: str | None) -> bool:
    """Tell whether there is a recipe of that name."""
    return name in catalog.plugins("recipes")


def threats_of(facts: Facts) -> list[ThreatModel]:
    """Return the threat models of a cell, ascending: several for an average."""
    if facts.threat is None:
        return []
    last = ThreatModel.parse(facts.threat)
    return [ThreatModel.parse(f"{last.norm}@{epsilon}") for epsilon in facts.epsilons] or [last]


def model_of(facts: Facts) -> str | None:
    """Return the name of a cell's model at the paper's scale."""
    return facts.model or facts.recipe


def in_papers(models: Collection[str]) -> bool:
    """Tell whether any of these models stands in a paper's table, at whatever scale."""
    named = {model_of(facts) for table in known_tables() for _, _, facts in load_table(table).entries()}
    return not {scaled_name(model, scale) for model in named if model for scale in SCALES}.isdisjoint(models)


def page_name(paper: str) -> str:
    """Return the file of a paper's page."""
    return f"paper-{paper}.html"


def pages_in(folder: Path) -> list[tuple[str, Paper]]:
    """Return the papers' pages that are in a folder: the file of each, and the paper."""
    return [(page_name(p), load_paper(p)) for p in catalog.plugins("papers") if (folder / page_name(p)).exists()]


def known_tables() -> list[str]:
    """Return the names of all tables, papers in order of name, each table in its paper's order."""
    return [table for paper in catalog.plugins("papers") for table in load_paper(paper).tables]

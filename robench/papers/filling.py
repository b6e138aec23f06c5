"""A paper's table with our own numbers in it: every cell has the printed value, and ours or why there is none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robench import catalog
from robench.errors import UserError
from robench.papers.archive import Answer, Archive, NoAnswer
from robench.papers.definitions import (
    SCALES,
    Column,
    Facts,
    PaperTable,
    Row,
    ScaleName,
    has_recipe,
    load_table,
    model_of,
    scaled_name,
    scaled_recipe,
)
from robench.papers.work import cell_passes, training_passes
from robench.recipe import DESCRIPTIVE, Recipe, parse_recipe
from robench.records import Configured, Diagnostic, ModelCard
from robench.store import Results, StoredTiming

#: What a printed cell holds where the paper prints a dash or nothing.
DASH = "-"


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """One cell."""

    printed: str
    """The paper's characters."""
    printed_value: float | None
    inferred: str | None = None
    """What the paper's text says where its cell is lost."""
    value: float | None = None
    """Ours, in the unit of the printed value."""
    text: str | None = None
    """Ours as it is shown; settings may be words."""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    decimals: int | None = None
    """Of a percentage, those that n can bear."""
    records: tuple[Path, ...] = ()
    commands: tuple[str, ...] = ()
    model: str | None = None
    """The model that the number is of."""
    scale: ScaleName | None = None
    notes: tuple[str, ...] = ()
    """What is smaller or other than in the paper."""
    flags: tuple[str, ...] = ()
    """What the records' diagnostics raise against them: `name: evidence`."""
    missing: str | None = None
    """Why there is no number."""
    remedy: str | None = None
    """The command that makes one."""
    cost: str | None = None
    """What that takes."""
    difference: float | None = None
    """Ours less the printed value."""
    differs: bool = False
    """The difference exceeds the tolerance, and our interval does not hold the printed value."""
    place: int | None = None
    """1 or 2 where our value is the best or the second best of those at its scale."""
    printed_place: int | None = None

    @property
    def flag_names(self) -> tuple[str, ...]:
        """Return the names of the flags, each once."""
        return tuple(dict.fromkeys(flag.partition(":")[0] for flag in self.flags))

    @property
    def interval(self) -> str | None:
        """Return the 95 % interval of a measured value as text."""
        if self.low is None or self.high is None or not self.records:
            return None
        form = ".4g" if self.decimals is None else f".{self.decimals}f"
        return f"{self.low:{form}}–{self.high:{form}}"

    @property
    def delta(self) -> str | None:
        """Return the difference of a measured value as text."""
        if self.difference is None or not self.records:
            return None
        form = ".3g" if self.decimals is None else f".{self.decimals}f"
        return f"{'−' if self.difference < 0 else '+'}{abs(self.difference):{form}}"


@dataclass(frozen=True, kw_only=True)
class FilledTable:
    """A table with its cells, row by row."""

    name: str
    table: PaperTable
    cells: tuple[tuple[PaperCell, ...], ...]

    def cell(self, row: str, column: str) -> PaperCell:
        """Return a cell by the ids of its row and column; raise KeyError where there is none."""
        rows = [r.id for r in self.table.rows]
        columns = [c.id for c in self.table.columns]
        if row not in rows or column not in columns:
            raise KeyError(f"{self.name}[{row}].{column}")
        return self.cells[rows.index(row)][columns.index(column)]

    def lines(self) -> Iterator[tuple[Row, tuple[PaperCell, ...]]]:
        """Yield each row with its cells."""
        yield from zip(self.table.rows, self.cells, strict=True)

    @property
    def measured(self) -> int:
        """Return how many cells have a number of ours that was measured."""
        return sum(cell.value is not None and bool(cell.records) for row in self.cells for cell in row)

    @property
    def measurable(self) -> int:
        """Return how many cells are there to be measured: all but settings and what the paper leaves empty."""
        return sum(facts.measure not in {None, "setting"} for _, _, facts in self.table.entries())

    @property
    def tolerances(self) -> str:
        """Return how far a value may be off without a word: "1 point (0.1 under Margin, test)"."""
        unit = " point" if self.table.tolerance == 1 else " points"
        usual = f"{self.table.tolerance:g}{unit if self.table.unit == 'percent' else ''}"
        own: dict[float, list[str]] = {}
        for column in self.table.columns:
            if column.tolerance is not None:
                own.setdefault(column.tolerance, []).append(column.title)
        told = "; ".join(f"{tolerance:g} under {', '.join(titles)}" for tolerance, titles in own.items())
        return f"{usual} ({told})" if told else usual


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What stands around a cell."""

    name: str
    """Of the table."""
    table: PaperTable
    column: Column
    facts: Facts

    @property
    def tolerance(self) -> float:
        """Return how large a difference says nothing."""
        return self.column.tolerance or self.table.tolerance

    @property
    def model(self) -> str:
        """Return the model's name at the paper's scale."""
        return model_of(self.facts) or ""

    @property
    def recipe(self) -> str:
        """Return the recipe's name."""
        return self.facts.recipe or ""

    def recipe_at(self, scale: ScaleName) -> Recipe:
        """Return the recipe at a scale."""
        return scaled_recipe(self.recipe, self.facts.changes, scale, self.name)


class Filler:
    """Fills tables from one set of results."""

    def __init__(self, results: Results) -> None:
        """Look the records through once."""
        self.cards = {name: stored.card for name, stored in results.cards.items()}
        self.results, self.archive = results, Archive(results)
        self._filled: dict[str, FilledTable] = {}
        self._differences: dict[tuple[str, str], tuple[str, ...]] = {}

    def fill(self, name: str) -> FilledTable:
        """Return the table of that name with our numbers; claims ask for the same one again."""
        if name not in self._filled:
            self._filled[name] = self._fill(name)
        return self._filled[name]

    def _fill(self, name: str) -> FilledTable:
        table = load_table(name)
        cells = [[self._cell(name, table, row, column) for column in table.columns] for row in table.rows]
        return FilledTable(name=name, table=table, cells=tuple(map(tuple, _placed(table, cells))))

    def _cell(self, name: str, table: PaperTable, row: Row, column: Column) -> PaperCell:
        position = table.columns.index(column)
        asked = Asked(name=name, table=table, column=column, facts=table.facts(row, column))
        cell = PaperCell(
            printed=row.printed[position],
            printed_value=_number(row.printed[position]),
            inferred=row.inferred[position] if row.inferred else None,
        )
        if asked.facts.needs:
            return replace(cell, missing=asked.facts.needs)
        if asked.facts.recipe is None or asked.facts.measure is None:
            return cell
        if asked.facts.measure == "setting":
            return _setting(cell, asked)
        if asked.facts.measure == "time":
            return _timed(cell, asked, self.archive.results.timings)
        found, scale = self._answer(asked)
        if isinstance(found, Answer):
            return self._measured(cell, found, scale, asked)
        remedy, cost = self._way(asked)
        return replace(cell, missing=found.reason, remedy=remedy, cost=cost)

    def _answer(self, asked: Asked) -> tuple[Answer | NoAnswer, ScaleName]:
        """Return the answer at the largest scale that has one, or why the largest that is trained has none."""
        reasons = []
        for scale in SCALES:
            if scale != "paper" and scale not in asked.table.scales:
                continue
            card = self.cards.get(scaled_name(asked.model, scale))
            if card is None:
                continue
            source = self.cards.get(scaled_name(asked.facts.source, scale)) if asked.facts.source else None
            found = self.archive.answer(asked.facts, card, source=source)
            if isinstance(found, Answer):
                return found, scale
            reasons.append(found)
        untrained = "not trained" if has_recipe(asked.recipe) else f"no recipe {asked.recipe}"
        return reasons[0] if reasons else NoAnswer(reason=untrained), "paper"

    def _measured(self, cell: PaperCell, found: Answer, scale: ScaleName, asked: Asked) -> PaperCell:
        model = scaled_name(asked.model, scale)
        notes = [*self._differing(model, scale, asked)]
        if found.examples.count < min(asked.table.examples or math.inf, found.examples.split_size):
            notes.append(f"{found.examples.count:,} of {found.examples.split_size:,} images")
        notes += found.notes
        if asked.facts.note:
            notes.append(asked.facts.note)
        shown = replace(
            cell,
            value=found.value,
            text=_shown(found),
            low=found.low,
            high=found.high,
            n=found.n,
            decimals=_decimals(found),
            records=found.records,
            commands=found.commands,
            model=model,
            scale=scale,
            notes=tuple(notes),
            flags=tuple(dict.fromkeys(map(_flag, found.flags))),
        )
        return _compared(shown, asked.tolerance)

    def _differing(self, model: str, scale: ScaleName, asked: Asked) -> tuple[str, ...]:
        """Return what about a model is other than in the paper: its stated scale, and what its recipe does not say."""
        if (model, asked.name) not in self._differences:
            self._differences[model, asked.name] = tuple(_departures(self.cards[model], scale, asked))
        return self._differences[model, asked.name]

    def _way(self, asked: Asked) -> tuple[str | None, str | None]:
        """Return the command that makes the number, and what it takes by the passes that are planned."""
        if not has_recipe(asked.recipe):
            return None, None
        recipe, parts = asked.recipe_at("paper"), []
        if asked.model not in self.cards and (training := training_passes(recipe)):
            parts.append(f"{in_words(training.gradient)} of training")
        passes = cell_passes(asked.facts, recipe.dataset, asked.table.examples)
        if passes and passes.gradient:
            parts.append(f"{in_words(passes.gradient)} of attack at most")
        elif passes and passes.forward:
            parts.append(f"{in_words(passes.forward)} of evaluation")
        network = recipe.architecture.name if recipe.architecture else "the network"
        return f"robench reproduce {asked.name}", f"{', '.join(parts)}: passes through {network}" if parts else None


def _flag(diagnostic: Diagnostic) -> str:
    """Return a flag as text, with what stood after the stronger attack that was run because of it."""
    then = diagnostic.robust_then
    after = f" ({then.successes} of these {then.n} stand then)" if then else ""
    return f"{diagnostic.name}: {diagnostic.evidence}{after}"


def _departures(card: ModelCard, scale: ScaleName, asked: Asked) -> Iterator[str]:
    """Yield what about a model is other than in the paper; first, where it is smaller, its scale."""
    if card.scale:
        yield card.scale
    if card.recipe is None:
        yield "imported weights"
        return
    if not has_recipe(asked.recipe):
        return
    wanted = asked.recipe_at(scale)
    try:
        made = parse_recipe(card.recipe, origin="card")
    except UserError:
        yield "trained by an earlier form of its recipe"
        return
    then, now = _flat(made), _flat(wanted)
    # A recipe without an architecture takes that of the model it starts from; the card has it.
    left_out = () if wanted.architecture else ("architecture", "normalization")
    differing = [
        f"{key} = {then.get(key)} instead of {now.get(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(left_out)
    ]
    if differing:
        more = f" and {len(differing) - 2} more" if len(differing) > 2 else ""
        yield f"not as its recipe says: {', '.join(differing[:2])}{more}"


def _setting(cell: PaperCell, asked: Asked) -> PaperCell:
    """Return what our recipe has where the paper prints a hyper-parameter."""
    if not has_recipe(asked.recipe):
        return replace(cell, missing=f"no recipe {asked.recipe}")
    value = setting_of(asked.recipe_at("paper"), asked.facts.setting or "")
    if value is None:
        return cell if cell.printed == DASH else replace(cell, missing="our recipe has no such setting")
    if isinstance(value, str | bool):
        return replace(cell, text=str(value))
    return _compared(replace(cell, text=f"{value:g}", value=float(value), low=value, high=value), asked.tolerance)


def _complete(architecture: Configured) -> Configured:
    """Return an architecture with its defaults, which a record from before a parameter was there leaves out."""
    known = catalog.plugins("architectures").get(architecture.name)
    if known is None:
        return architecture
    return Configured(name=known.name, parameters=known.settings(architecture.parameters))


def _timed(cell: PaperCell, asked: Asked, timings: Iterable[StoredTiming]) -> PaperCell:
    """Return the median seconds of one image through the recipe's network, of several the latest measured."""
    recipe, facts = asked.recipe_at("paper"), asked.facts
    assert recipe.architecture is not None, f"{asked.recipe} names no network"
    name = recipe.architecture.name
    shape = tuple(catalog.find("datasets", recipe.dataset).facts["image_shape"])
    own = [
        stored
        for stored in timings
        if _complete(stored.record.spec.architecture) == _complete(recipe.architecture)
        and (stored.record.spec.input_shape, stored.record.spec.copies) == (shape, facts.votes)
        and stored.record.spec.device.startswith(facts.device)
    ]
    if not own:
        copies = "" if facts.votes == 1 else f" --copies {facts.votes}"
        device = "cuda:0" if facts.device == "cuda" else "cpu"
        return replace(cell, missing="not measured", remedy=f"robench time {name}{copies} --device {device}")
    latest = max(own, key=lambda stored: stored.record.provenance.finished)
    record = latest.record
    threads = f"{record.spec.threads} thread{'s' if record.spec.threads > 1 else ''}"
    quartiles = " to ".join(f"{value:.3g}" for value in record.quartiles)
    notes = [f"median of {record.queries} images, quartiles {quartiles}; {record.spec.device}, {threads}"]
    if facts.note:
        notes.append(facts.note)
    shown = replace(
        cell,
        value=record.median,
        text=f"{record.median:.3g}",
        low=record.low,
        high=record.high,
        n=record.queries,
        records=(latest.path,),
        commands=(record.provenance.command,),
        notes=tuple(notes),
    )
    return _compared(shown, asked.tolerance)


def setting_of(recipe: Recipe, key: str) -> float | str | None:
    """Return a value of a recipe by its `--set` name; None where the recipe has no such part."""
    values = recipe.model_dump(mode="json")
    group, *rest = key.split(".")
    found: Any = values.get(group)
    if group == "regularizers" and rest:
        found = next((r["parameters"] for r in found if r["name"].split("-")[0] == rest[0]), {})
        rest = rest[1:]
    for part in rest:
        if not isinstance(found, dict):
            return None
        found = found[part] if part in found else found.get("parameters", {}).get(part)
    return found if isinstance(found, float | int | str) else None


def _compared(cell: PaperCell, tolerance: float) -> PaperCell:
    """Say how far our value is from the printed one, and whether that means anything; a smoke run's never does."""
    if cell.value is None or cell.printed_value is None or cell.scale == "smoke":
        return cell
    difference = cell.value - cell.printed_value
    outside = cell.low is not None and cell.high is not None and not cell.low <= cell.printed_value <= cell.high
    return replace(cell, difference=difference, differs=outside and abs(difference) > tolerance)


def _placed(table: PaperTable, cells: list[list[PaperCell]]) -> list[list[PaperCell]]:
    """Mark the best and the second best, of printed values and of ours; of ours among those of one scale."""
    printed: dict[Any, list[tuple[float, int, int]]] = defaultdict(list)
    ours: dict[Any, list[tuple[float, int, int]]] = defaultdict(list)
    for i, row in enumerate(table.rows):
        for j, column in enumerate(table.columns):
            if column.better == "neither":
                continue
            cell, sign = cells[i][j], 1 if column.better == "higher" else -1
            line = (j, row.group) if table.best_in == "columns" else (i, "")
            if cell.printed_value is not None:
                printed[line].append((sign * cell.printed_value, i, j))
            if cell.value is not None and cell.records and cell.scale != "smoke":
                ours[*line, cell.scale].append((sign * cell.value, i, j))
    for (i, j), place in _places(printed).items():
        cells[i][j] = replace(cells[i][j], printed_place=place)
    for (i, j), place in _places(ours).items():
        cells[i][j] = replace(cells[i][j], place=place)
    return cells


def _places(lines: Mapping[Any, list[tuple[float, int, int]]]) -> dict[tuple[int, int], int]:
    """Return which cells hold the best (1) and the second best (2) of their line, of (value, row, column)."""
    found: dict[tuple[int, int], int] = {}
    for entries in lines.values():
        distinct = sorted({value for value, _, _ in entries}, reverse=True)
        # Of two values the smaller one is no second best.
        marked = distinct[: 2 if len(entries) > 2 else 1 if len(entries) > 1 else 0]
        found |= {(i, j): marked.index(value) + 1 for value, i, j in entries if value in marked}
    return found


def _number(printed: str) -> float | None:
    try:
        return float(printed)
    except ValueError:
        return None


def _shown(found: Answer) -> str:
    """Return our value with the decimals that its n can bear."""
    decimals = _decimals(found)
    return f"{found.value:.4g}" if decimals is None else f"{found.value:.{decimals}f}"


def _decimals(found: Answer) -> int | None:
    return (2 if found.n >= 5000 else 1) if found.percent else None


def in_words(number: int) -> str:
    """Return "4.6 million"."""
    for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"


def _flat(recipe: Recipe) -> Mapping[str, Any]:
    """Return what decides the training, by dotted names."""
    values = recipe.model_dump(mode="json", exclude=set(DESCRIPTIVE))
    regularizers = {r["name"]: r["parameters"] for r in values.pop("regularizers")}
    return dict(_leaves({**values, "regularizers": regularizers}))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.".replace("parameters.", ""))
        else:
            yield f"{prefix}{key}", value

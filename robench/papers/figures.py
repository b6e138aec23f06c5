"""The papers' figures: what a figure's file may hold, and what the records have to say of each of its lines.

A figure names a drawing (:mod:`robench.figures`) and its lines: models, by the rows of a paper's table or by recipes,
and what was asked of them. A line is drawn from a complete record of the weights that the model's card describes, made
by the attack as it is now, of the model at the paper's scale or else at the reduced one, which is said. A smoke run
is no evidence. What cannot be drawn leaves a reason and the commands that would make it.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from robench import catalog
from robench.errors import UserError
from robench.panels import Origin
from robench.papers.archive import Archive, Stored, Unanswered, check_lines
from robench.papers.definitions import (
    Facts,
    PaperTable,
    ScaleName,
    has_recipe,
    load_paper,
    load_table,
    model_of,
    read_definition,
    scaled_name,
    threats_of,
)
from robench.papers.filling import in_words
from robench.papers.work import cell_passes, command_for, training_passes
from robench.recipe import apply_settings, load_recipe
from robench.records import EvalRecord, Value
from robench.softmax_lines import Lines, lines_path, read_lines
from robench.store import Results, Rows, StoredCard

#: At which scales a model is looked for, in this order.
_SCALES: tuple[ScaleName, ...] = ("paper", "reduced")
#: Images to attack for straight lines: of a robust model, too, a few of them fall.
_FOR_LINES = 100


class Line(Facts):
    """One line of a figure: a model, and what is asked of it."""

    title: str
    table: str | None = None
    """Whose scales its model has, and whose rows it may take; where it is not the figure's."""
    row: str | None = None
    """A row of that table: its recipe, changes and model."""
    column: str | None = None
    """A column of that table: then everything is as in the table's cell."""
    log: str | None = None
    """Of a training log: the column."""
    hollow: bool = False
    """Of spreads and marks: drawn with an outline alone."""


class Place(Facts):
    """One place on the horizontal axis of lines that are several answers each."""

    x: float


class PanelFacts(Facts):
    """One panel of a figure."""

    title: str
    lines: tuple[Line, ...] = ()
    places: tuple[Place, ...] = ()
    """Where the figure's are not this panel's."""


class PaperFigure(Value):
    """One figure of a paper."""

    paper: str
    source: str
    """Which figure it is."""
    summary: str
    """What it shows, in our words."""
    caption: str
    """What is to be seen, and how it is to be read, in our words."""
    differs: tuple[str, ...] = ()
    """What is other than in the paper, one sentence each."""
    drawing: str | None = None
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    """Of the drawing."""
    table: str | None = None
    """Whose rows the lines name, and whose scales their models have."""
    cells: Facts = Facts()
    """What every line has unless it says otherwise."""
    places: tuple[Place, ...] = ()
    x_title: str | None = None
    panels: tuple[PanelFacts, ...] = ()
    beside: str | None = None
    """The table in whose section of the page it is drawn, where that is so."""
    needs: str | None = None
    """What it would take, of a figure or a part of it that no record can fill."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.drawing is None and self.needs is None and self.beside is None:
            raise ValueError("a figure needs a drawing, or says what it needs")
        for name in [self.table, self.beside, *(line.table for panel in self.panels for line in panel.lines)]:
            if name is not None and name not in catalog.plugins("tables"):
                raise ValueError(f"there is no table {name}")
        for panel in self.panels:
            for line in panel.lines:
                self.asked(panel, line)
        return self

    def table_of(self, line: Line) -> PaperTable | None:
        """Return the table that a line refers to."""
        name = line.table or self.table
        return load_table(name) if name else None

    def asked(self, panel: PanelFacts, line: Line, place: Place | None = None) -> Facts:
        """Return what is asked for a line, at one of its places; raise ValueError for a row that there is not."""
        parts: list[Facts] = [self.cells, panel]
        if line.row is not None:
            parts.append(self._from_table(line))
        parts += [line, *([place] if place else [])]
        merged = {name: getattr(part, name) for part in parts for name in part.model_fields_set & _FACTS}
        return Facts(**merged)

    def _from_table(self, line: Line) -> Facts:
        table = self.table_of(line)
        rows = {row.id: row for row in table.rows} if table else {}
        columns = {column.id: column for column in table.columns} if table else {}
        if line.row not in rows or (line.column is not None and line.column not in columns):
            raise ValueError(
                f"line {line.title}: there is no cell {line.table or self.table}[{line.row}].{line.column}"
            )
        assert table is not None
        row = rows[line.row]
        if line.column is not None:
            return table.facts(row, columns[line.column])
        made = Facts(**{name: getattr(row, name) for name in row.model_fields_set & {"recipe", "changes", "model"}})
        return made


_FACTS = set(Facts.model_fields)


@functools.cache
def load_figure(name: str) -> PaperFigure:
    """Return the figure of that name; raise UnknownName, or PluginError for a file that breaks the rules."""
    found: PaperFigure = read_definition("figures", name, PaperFigure)
    return found


def known_figures() -> list[str]:
    """Return the names of all figures, papers in order of name, each figure in its paper's order."""
    return [figure for paper in catalog.plugins("papers") for figure in load_paper(paper).figures]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a line is drawn from."""

    title: str
    """With its scale where that is not the paper's."""
    card: StoredCard
    stored: Stored | None
    """None where nothing was asked: the model alone is needed."""
    rows: Rows | None = None
    look: int = 0
    """The line's position in its panel."""

    @property
    def origin(self) -> Origin:
        """Return where its numbers are from."""
        return Origin(model=self.card.card.id, record=self.stored.path if self.stored else None)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A line that cannot be drawn."""

    panel: str
    line: str
    reason: str
    commands: tuple[str, ...]
    """What would make it."""
    smaller: str | None = None
    """What would make it at reduced scale, or at least its model."""
    model_only: bool = False
    """That does not ask the model what the figure shows."""


@dataclass
class Evidence:
    """What a drawing may ask of the records for one figure; what they do not have is kept in `missing`."""

    figure: PaperFigure
    results: Results
    archive: Archive
    missing: list[Missing] = field(default_factory=list)
    used: dict[str, StoredCard] = field(default_factory=dict)
    """The models that were found."""
    training: dict[str, int] = field(default_factory=dict)
    """Passes that the trainings of the models take that there are not, where that is known."""
    asking: dict[str, int] = field(default_factory=dict)
    """Passes that the questions take at most that have no answer, by the commands that ask them."""
    reports: Path | None = None
    """Where outputs along straight lines are kept; None: nowhere."""

    def lines(self) -> Iterator[tuple[PanelFacts, list[Line]]]:
        """Yield the figure's panels with their lines."""
        for panel in self.figure.panels:
            yield panel, list(panel.lines)

    def trained(self, panel: PanelFacts, line: Line) -> Found | None:
        """Return the model of a line, of its scales the first that there is; None (and why) where there is none."""
        return self._found(panel, line, lambda *_: None)

    def training_command(self, panel: PanelFacts, line: Line) -> str:
        """Return what trains the model of a line at the paper's scale."""
        facts = self.figure.asked(panel, line)
        return command_for(model_of(facts) or "", facts.recipe or "", facts.changes)

    def attacked(
        self,
        panel: PanelFacts,
        line: Line,
        place: Place | None = None,
        *,
        together: tuple[Place, ...] = (),
        options: str = "",
    ) -> Found | None:
        """Return the attack of a line, at one of the places that are asked together; `options` are to be said to
        `robench eval`.
        """
        return self._found(
            panel,
            line,
            lambda facts, card: self.archive.attacked(facts, card.card, threats_of(facts)[-1]),
            place=place,
            together=together,
            options=options,
        )

    def certified(self, panel: PanelFacts, line: Line) -> Found | None:
        """Return the certificate of a line."""
        return self._found(panel, line, lambda facts, card: self.archive.certified(facts, card.card))

    def straight_lines(self, panel: PanelFacts, line: Line) -> tuple[Found, Lines, Origin] | None:
        """Return the model of a line, its outputs along the straight lines that `robench lines` kept of the line's
        attack, and where they are from; raise UserError for a damaged file.
        """
        model = model_of(self.figure.asked(panel, line)) or ""
        paths = {
            name: lines_path(self.reports, name)
            for name in (scaled_name(model, scale) for scale in _SCALES)
            if self.reports is not None
        }
        kept = {name: read_lines(path) for name, path in paths.items() if path.is_file()}

        def look(facts: Facts, stored: StoredCard) -> None:
            check_lines(kept.get(stored.card.id), facts, stored.card, threats_of(facts)[-1])

        found = self._found(panel, line, look, command=lines_command, examples=_FOR_LINES)
        if found is None:
            return None
        name = found.card.card.id
        return found, kept[name], Origin(model=name, record=paths[name])

    def along(self, panel: PanelFacts, line: Line) -> list[tuple[float, Found]]:
        """Return the attacks of a line at the panel's places: all of one model on the same images, or none."""
        places = panel.places or self.figure.places
        found: list[tuple[float, Found]] = []
        for place in places:
            # A line through some of its places would look like one through all of them.
            one = self.attacked(panel, line, place, together=places)
            if one is None:
                return []
            found.append((place.x, one))
        if len({(f.card.card.id, f.stored.examples) for _, f in found if f.stored}) > 1:
            self.lacks(panel, line, "its places are of different models or images")
            return []
        return found

    def lacks(
        self, panel: PanelFacts, line: Line, reason: str, *, commands: tuple[str, ...] = (), smaller: str | None = None
    ) -> None:
        """Say that a line cannot be drawn, and why."""
        lacking = Missing(
            panel=panel.title,
            line=line.title,
            reason=reason,
            commands=commands,
            smaller=smaller,
            model_only=any(command.startswith(("robench eval", "robench lines")) for command in commands),
        )
        if lacking not in self.missing:
            self.missing.append(lacking)

    @property
    def cost(self) -> str | None:
        """Return what everything takes that is missing, where that is known."""
        parts = [
            f"{in_words(sum(passes.values()))} passes of {what}"
            for what, passes in (("training", self.training), ("evaluation", self.asking))
            if passes
        ]
        return ", ".join(parts) or None

    def _found(
        self,
        panel: PanelFacts,
        line: Line,
        look: Callable[[Facts, StoredCard], Stored | None],
        *,
        place: Place | None = None,
        together: tuple[Place, ...] = (),
        options: str = "",
        command: Callable[..., str] | None = None,
        examples: int | None = None,
    ) -> Found | None:
        """Return what `look` finds, of the model's scales the first that has it; else keep what would make it: by
        `command`, which is that of `robench eval` unless given, on so many `examples`, the table's unless given.
        """
        facts = self.figure.asked(panel, line, place)
        if facts.needs:
            self.lacks(panel, line, f"needs {facts.needs}")
            return None
        table, reason = self.figure.table_of(line), None
        model, there = model_of(facts) or "", None
        for scale in _SCALES:
            card = self.results.cards.get(scaled_name(model, scale))
            if card is None or (scale != "paper" and (table is None or scale not in table.scales)):
                continue
            try:
                stored = look(facts, card)
            except (Unanswered, UserError) as error:
                reason, there = reason or f"{card.card.id}: {error}", there or scale
                continue
            title = line.title if scale == "paper" else f"{line.title} ({scale})"
            self.used[card.card.id] = card
            rows = self.archive.rows(stored) if stored else None
            return Found(title=title, card=card, stored=stored, rows=rows, look=panel.lines.index(line))
        if not has_recipe(facts.recipe):
            self.lacks(panel, line, reason or f"no recipe {facts.recipe}")
            return None
        questions = [self.figure.asked(panel, line, other) for other in together] or [facts]
        command = command or evaluation_command
        commands = self._commands(questions, line, there, command=command, examples=examples)
        self._count(questions, line, command=command, examples=examples, trained=there is not None)
        name = line.table or self.figure.table
        smaller = f"robench reproduce {name} --scale reduced" if table and "reduced" in table.scales else None
        self.lacks(
            panel,
            line,
            reason or "not trained",
            commands=tuple(f"{c} {options}" if options and c.startswith("robench eval") else c for c in commands),
            smaller=None if there else smaller,
        )
        return None

    def _commands(
        self,
        questions: list[Facts],
        line: Line,
        there: ScaleName | None,
        *,
        command: Callable[..., str],
        examples: int | None,
    ) -> tuple[str, ...]:
        """Return what makes a line, of the model at the scale that is there: the table's own command where the table
        asks the same.
        """
        facts, name, table = questions[0], line.table or self.figure.table, self.figure.table_of(line)
        if line.column is not None and name is not None:
            return (f"robench reproduce {name}" + (f" --scale {there}" if there and there != "paper" else ""),)
        model = model_of(facts) or ""
        training = () if there else (command_for(model, facts.recipe or "", facts.changes),)
        if facts.attack is None and facts.certificate is None:
            return training
        if examples is None and table:
            examples = table.examples_at(there or "paper", load_recipe(facts.recipe or "").dataset)
        return (*training, command(scaled_name(model, there or "paper"), questions, examples=examples))

    def _count(
        self,
        questions: list[Facts],
        line: Line,
        *,
        command: Callable[..., str],
        examples: int | None,
        trained: bool,
    ) -> None:
        """Add what the training and the questions of a line take, where that is known."""
        facts, table = questions[0], self.figure.table_of(line)
        model, recipe = model_of(facts) or "", apply_settings(load_recipe(facts.recipe or ""), facts.changes)
        if not trained and (passes := training_passes(recipe)):
            self.training[model] = passes.gradient
        if examples is None and table:
            examples = table.examples
        for asked in questions:
            # A line that names no measure is asked for what its drawing looks at.
            measure = asked.measure or ("certificate" if asked.certificate else "robust")
            whole = asked.model_copy(update={"measure": measure})
            if (asked.certificate or asked.attack) and (passes := cell_passes(whole, recipe.dataset, examples)):
                key = command(model, [asked], examples=examples)
                self.asking[key] = passes.gradient + passes.forward


def evaluation_command(model: str, questions: list[Facts], *, examples: int | None) -> str:
    """Return the command that asks a model questions that differ in their attacks or their threats."""
    facts = questions[0]
    words = ["robench", "eval", "--model", model]
    if facts.certificate is not None:
        words += ["--certificate", facts.certificate]
    else:
        for option in ("attack", "threat"):
            values = dict.fromkeys(str(getattr(asked, option)) for asked in questions)
            words += [word for value in values for word in (f"--{option}", value)]
        for option, value, usual in (("top-k", facts.top_k, 1), ("votes", facts.votes, 1), ("sigma", facts.sigma, 0.0)):
            words += [f"--{option}", f"{value:g}"] if value != usual else []
    words += ["--split", facts.split] if facts.split != "test" else []
    return shlex.join([*words, *(["--examples", str(examples)] if examples else ["--all"])])


def lines_command(model: str, questions: list[Facts], *, examples: int) -> str:
    """Return the command that keeps a model's outputs along straight lines."""
    (asked,) = questions
    words = ["robench", "lines", model, "--attack", str(asked.attack), "--threat", str(asked.threat)]
    return shlex.join([*words, "--examples", str(examples)])


def attack_record(found: Found) -> EvalRecord:
    """Return the record of an attack that was found."""
    assert found.stored is not None
    assert isinstance(found.stored.record, EvalRecord)
    return found.stored.record


def drawing_settings(figure: PaperFigure) -> tuple[catalog.Plugin, dict[str, Any]]:
    """Return a figure's drawing with its parameters, checked; raise UserError for one that there is not."""
    plugin = catalog.find("drawings", figure.drawing or "")
    return plugin, plugin.settings(figure.parameters)

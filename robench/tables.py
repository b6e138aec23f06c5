"""A table as a value: what a leaderboard plugin returns, and what HTML and CSV are written from.

A table states its own contract: what each column holds and which one ranks. It is checked when the table is
made, so that a page never shows an order that its numbers do not bear out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robench.records import Examples, Proportion

Role = Literal["rank", "model", "label", "accuracy", "distance", "amount"]
"""What a column holds: the rank, the model, other text, a share of examples in [0, 1], how far from the clean image
something lies ([0, 1] scale of pixels; infinite where nothing was found), a count or a time."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value, with everything that stands behind it. The default is a cell without a value."""

    value: float | int | str | None = None
    text: str | None = None
    """How it is shown, where that is not how the column's role shows values."""
    low: float | None = None
    high: float | None = None
    """Its 95 % interval, of a share Wilson's; of a rank the best and the worst one that tests allow."""
    n: int | None = None
    """How many examples it is a share or a mean of."""
    record: Path | None = None
    """The file it was read from; its name is the question's identity."""
    model: str | None = None
    """A model whose page it leads to."""
    note: str | None = None
    """What a reader must know beside the value."""
    warning: str | None = None
    """Why the value is one to be wary of; shown to who points at it."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its name in files, its title on pages, and what it holds."""

    key: str
    title: str
    role: Role
    description: str
    """One sentence for the page's legend."""
    unit: str | None = None
    """Of an amount: "s"."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A small table beside the table: cells by two names."""

    name: str
    """Safe as a part of a file's name."""
    title: str
    caption: str
    corner: tuple[str, ...]
    """What the rows' names are."""
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    """Row by row; each is a share of examples."""
    heat: bool = False
    """Colour each cell by its share: a heat map."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A step function, which from each x on has the y beside it, or points joined by lines."""

    title: str
    x: tuple[float, ...]
    """Ascending."""
    y: tuple[float, ...]
    n: int
    """How many examples `y` is a share of."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Curves that share their axes; `y` is a share of examples in [0, 1]."""

    name: str
    """Safe as a part of a file's name."""
    title: str
    caption: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]
    x_end: float
    """Where the drawing ends; the file has all points."""
    linear: bool = False
    """Points joined by lines; else step functions."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What it takes to compare any two models of a table image by image.

    Masks have a bit for each of the N examples, the first one in the lowest bit of the first byte.
    """

    examples: Examples
    ids: bytes
    """Positions in the split, ascending, as little-endian 32-bit integers."""
    labels: bytes
    """As little-endian 16-bit integers."""
    models: tuple[str, ...]
    """One name for each row of the table, in its order."""
    clean: tuple[bytes, ...]
    """Right without an attack."""
    standing: tuple[bytes, ...]
    """Right in the sense of the ranking column."""
    attacks: tuple[str, ...]
    """Keys of the columns that stand for one attack each."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under columns, best row first, rows without a rank last.

    Raises ValueError where it breaks its contract: unequal lengths, a key that comes twice, not exactly one
    rank and one model column, ranks that do not follow from the ranking column (equal values share the better
    rank), or a row without a rank whose rank cell has no note that says why.
    """

    name: str
    """Safe as a file's name."""
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    ranked_by: str
    """Key of a column of accuracies, distances or amounts: the larger the better."""
    remarks: tuple[str, ...] = ()
    """What stands below the table: evaluations that failed, and why."""
    warnings: tuple[str, ...] = ()
    """The same for those whose numbers are hardly to be believed."""
    figures: tuple[Grid | Curves, ...] = ()
    """What is drawn beside it."""
    reading: tuple[str, ...] = ()
    """Paragraphs on how to read it, beside the columns' descriptions."""
    comparison: Comparison | None = None
    """Where its models were shown the same examples."""

    def __post_init__(self) -> None:
        keys = [column.key for column in self.columns]
        roles = [column.role for column in self.columns]
        if len(set(keys)) != len(keys) or roles.count("rank") != 1 or roles.count("model") != 1:
            raise ValueError(f"table {self.name}: columns need distinct keys, one rank and one model: {keys}")
        if self.ranked_by not in keys or roles[keys.index(self.ranked_by)] not in {"accuracy", "distance", "amount"}:
            raise ValueError(f"table {self.name}: it is ranked by {self.ranked_by!r}, no accuracy, distance or amount")
        if self.comparison and len(self.comparison.models) != len(self.rows):
            raise ValueError(f"table {self.name}: it compares {len(self.comparison.models)} of {len(self.rows)} rows")
        if any(len(row) != len(keys) for row in self.rows):
            raise ValueError(f"table {self.name}: a row has not as many cells as there are columns")
        self._check_ranks(list(self.column(keys[roles.index("rank")])))

    def _check_ranks(self, ranks: list[Cell]) -> None:
        ranked = [rank for rank in ranks if rank.value is not None]
        values = [float(cell.value or 0.0) for cell in self.column(self.ranked_by)][: len(ranked)]
        given = [rank.value for rank in ranks[: len(ranked)]]
        if values != sorted(values, reverse=True) or given != competition_ranks(values):
            raise ValueError(f"table {self.name}: ranks {given} do not follow from {self.ranked_by} {values}")
        if not all(rank.note for rank in ranks[len(ranked) :]):
            raise ValueError(f"table {self.name}: an unranked row has no note that says why")

    def column(self, key: str) -> Iterator[Cell]:
        """Yield the cells of one column."""
        position = [column.key for column in self.columns].index(key)
        return (row[position] for row in self.rows)


def competition_ranks(values: Iterable[float]) -> list[int]:
    """Return the rank of each value, the largest first; equal ones share the better rank: 1, 2, 2, 4."""
    numbers = list(values)
    return [1 + sum(other > number for other in numbers) for number in numbers]


def natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts pgd-20 before pgd-100."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def proportion_cell(proportion: Proportion, *, record: Path | None = None, note: str | None = None) -> Cell:
    """Return the cell of an accuracy that a record holds."""
    low, high = proportion.wilson
    return Cell(value=proportion.value, low=low, high=high, n=proportion.n, record=record, note=note)

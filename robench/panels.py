"""What figures are made of, as values: a drawing plugin returns panels, and the page and the CSV are written from them.

Everything is in the units of the data. How it looks is the report's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robench.records import EvalRecord

Form = Literal["line", "step", "dots", "area", "segments"]
"""Points joined by lines; a step function that has each y from its x on; marks; a line with the area below it filled;
unjoined pieces of a line, each of two points that follow each other."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where numbers are from."""

    model: str
    record: Path | None = None
    """None: beside the model's card (its training log, what its defense had learned)."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One quantity over another. Raises ValueError for lengths that differ."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    form: Form = "line"
    n: int | None = None
    """How many images `y` is a share of."""
    low: Sequence[float] = ()
    """Where there is a 95 % interval: its bounds, drawn as bars."""
    high: Sequence[float] = ()
    origin: Origin | None = None
    hollow: bool = False
    """Of marks: drawn as rings."""
    look: int | None = None
    """Which colour and dashes it has, so that a line looks alike in all panels; None: those of its position."""

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.x, self.y, self.low or self.x, self.high or self.x)}
        if len(lengths) != 1:
            raise ValueError(f"series {self.title!r}: {len(self.x)} x for {len(self.y)} y")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis; a bound of None is taken from the data."""

    title: str
    low: float | None = None
    high: float | None = None
    includes: tuple[float, ...] = ()
    """Values that it reaches, whatever the data: what makes the axes of several panels alike."""
    ticks: bool = True


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A line across the whole plot at an x or a y, with its name."""

    title: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Series that share their axes."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the values of one group are spread."""

    title: str
    mean: float
    std: float
    quantiles: tuple[float, float, float, float, float]
    """Of 5, 25, 50, 75 and 95 %."""
    n: int
    origin: Origin | None = None
    hollow: bool = False
    """Drawn as a ring."""

    @classmethod
    def of(
        cls, title: str, values: NDArray[np.float64], origin: Origin | None = None, *, hollow: bool = False
    ) -> Spread:
        """Return the spread of at least one finite value."""
        low, first, median, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
        return cls(
            title=title,
            mean=float(values.mean()),
            std=float(values.std()),
            quantiles=(low, first, median, third, high),
            n=len(values),
            origin=origin,
            hollow=hollow,
        )


@dataclass(frozen=True, kw_only=True)
class Spreads:
    """Groups below each other on one axis."""

    title: str
    x: Axis
    groups: tuple[Spread, ...]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A matrix as a picture: orange below zero, white, green above, the largest size being full."""

    title: str
    caption: str
    values: NDArray[np.float64]
    """`(rows, columns)`."""
    origin: Origin | None = None
    header: tuple[str, ...] = ()
    """What the file has instead of the cells, where a shorter table says the same: its columns and its rows."""
    rows: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Small pictures in a row."""

    title: str
    captions: tuple[str, ...]
    pictures: tuple[NDArray[np.uint8], ...]
    """Each `(C, H, W)`."""


@dataclass(frozen=True, kw_only=True)
class Fallen:
    """Adversarial examples of a record whose images were kept."""

    title: str
    record: EvalRecord
    rows: Any
    """The record's rows."""
    origin: Origin


Panel = Plot | Spreads | HeatMap | Samples | Fallen

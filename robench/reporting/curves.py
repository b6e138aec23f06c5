"""Curves and histograms as drawings, in lines of SVG: a training log, what falls within which distance, and others."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robench.registry import read_training_log
from robench.tables import Curve, Curves

WIDTH, HEIGHT = 360.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 8.0, 10.0, 24.0


@dataclass(frozen=True)
class Line:
    """One measured quantity: its name and its points in the drawing."""

    title: str
    points: str
    last: str
    """A value to print beside its name, as text: mostly its last."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in the drawing's units, and what it says."""

    place: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, in the drawing's units."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Chart:
    """Lines or bars that share an axis."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    x_title: str = ""
    y_title: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure of a page: charts, a picture or a drawing, and their numbers as a file."""

    name: str
    """Safe as a part of a file's name."""
    title: str
    caption: str
    charts: tuple[Chart, ...] = ()
    picture: str | None = None
    """The base64 text of a PNG file."""
    svg: str | None = None
    """An SVG element."""
    csv: str


def histogram(
    name: str, title: str, caption: str, values: NDArray[np.float64], *, x_title: str, bins: int = 40
) -> Drawing:
    """Return how often which values come up; `values` are at least one, finite and not negative."""
    end = _ceiling({"x": [float(values.max())]})
    counts, edges = np.histogram(values, bins=bins, range=(0.0, end))
    top = 4 * math.ceil(_ceiling({"y": [float(counts.max())]}) / 4)  # ticks are whole images
    across, up = (WIDTH - LEFT - RIGHT) / end, (HEIGHT - TOP - BOTTOM) / top
    bars = tuple(
        Bar(LEFT + across * low, HEIGHT - BOTTOM - up * count, max(0.5, across * (high - low) - 1), up * count)
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if count
    )
    chart = Chart(
        title,
        (),
        tuple(Tick(LEFT + across * end * i / 4, f"{end * i / 4:.4g}") for i in range(5)),
        tuple(Tick(HEIGHT - BOTTOM - up * top * i / 4, f"{top * i / 4:g}") for i in range(5)),
        bars,
        x_title,
        "images",
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["from", "to", "images"])
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    writer.writerows([f"{low:.10g}", f"{high:.10g}", count] for low, high, count in pairs)
    return Drawing(name=name, title=title, caption=caption, charts=(chart,), csv=text.getvalue())


def line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x_title: str) -> Chart:
    """Return shares in [0, 1] over x as a drawing in percent; points are in the order of x, which is not negative."""
    end = _ceiling({"x": [x for points in series.values() for x, _ in points]})
    across, up = (WIDTH - LEFT - RIGHT) / end, HEIGHT - TOP - BOTTOM
    lines = tuple(
        Line(
            name,
            " ".join(f"{LEFT + across * x:.1f},{HEIGHT - BOTTOM - up * y:.1f}" for x, y in points),
            f"{100 * points[-1][1]:.4g} %" if points else "",
        )
        for name, points in series.items()
    )
    return Chart(
        title,
        lines,
        tuple(Tick(LEFT + across * end * i / 4, f"{end * i / 4:.4g}") for i in range(5)),
        tuple(Tick(HEIGHT - BOTTOM - up * share / 100, f"{share}") for share in (0, 25, 50, 75, 100)),
        x_title=x_title,
        y_title="correct, %",
    )


def training_charts(path: Path) -> list[Chart]:
    """Return a chart of the accuracies (in percent) and one of the losses of a `training.csv`.

    Its columns are `epoch`, those whose names end in `accuracy` and those that hold `loss`. Raises UserError as
    :func:`robench.registry.read_training_log`.
    """
    columns = read_training_log(path)
    epochs = [epoch for epoch in columns.pop("epoch") if epoch is not None]
    accuracies = {
        name.removesuffix("_accuracy").replace("_", ", "): [None if v is None else 100 * v for v in values]
        for name, values in columns.items()
        if name.endswith("accuracy")
    }
    losses = {name.replace("_", " "): values for name, values in columns.items() if "loss" in name}
    charts = [
        _chart("Accuracy, %", epochs, accuracies, (0.0, 100.0)),
        _chart("Loss", epochs, losses, (0.0, _ceiling(losses))),
    ]
    return [chart for chart in charts if chart.lines]


def curves_chart(curves: Curves) -> Chart:
    """Return a table's curves as a drawing, in percent."""
    if not curves.linear:
        return step_chart(curves)
    series = {curve.title: list(zip(curve.x, curve.y, strict=True)) for curve in curves.curves}
    return line_chart(curves.title, series, x_title=curves.x_title)


def step_chart(curves: Curves) -> Chart:
    """Return step functions as a drawing, in percent."""
    end = _ceiling({"x": [curves.x_end]})

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / end

    def up(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def points(curve: Curve) -> str:
        """Leave out what is nearer than half a unit to the point before: no drawing shows it."""
        height = up(curve.y[0]) if curve.x and curve.x[0] == 0 else up(0.0)
        drawn = [(across(0.0), height)]
        for x, y in zip(curve.x, curve.y, strict=True):
            place = across(min(x, end))
            if x <= end and (place - drawn[-1][0] >= 0.5 or abs(height - up(y)) >= 0.5):
                drawn += [(place, height), (place, up(y))]
                height = up(y)
        drawn.append((across(end), height))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)

    # The share that a reader looks for: what a rising curve comes to, what a falling one comes from.
    lines = tuple(Line(c.title, points(c), f"{100 * max(c.y):.4g} %" if c.y else "") for c in curves.curves)
    ticks = [end * i / 4 for i in range(5)]
    return Chart(
        curves.title,
        lines,
        tuple(Tick(across(x), f"{x:.4g}") for x in ticks),
        tuple(Tick(up(share / 100), f"{share}") for share in (0, 25, 50, 75, 100)),
    )


def _ceiling(series: dict[str, list[float | None]]) -> float:
    """Return a round number that no value exceeds."""
    largest = max((v for values in series.values() for v in values if v is not None), default=1.0)
    unit = 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 1.0
    return next(m * unit for m in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if m * unit >= largest or m == 10)


def round_bounds(low: float, high: float) -> tuple[float, float]:
    """Return bounds that lie a whole number of round steps from zero, four steps apart."""
    span = max(high - low, 1e-300)
    unit = 10.0 ** math.floor(math.log10(span / 4))
    for step in (m * unit for m in (1, 2, 2.5, 5, 10, 20, 25)):
        start = math.floor(low / step) * step
        if start + 4 * step >= high:
            return start, start + 4 * step
    raise AssertionError("the last step spans more than twice the values")


def _chart(
    title: str, epochs: list[float], series: dict[str, list[float | None]], bounds: tuple[float, float]
) -> Chart:
    first, last = (min(epochs), max(epochs)) if epochs else (0.0, 1.0)

    def across(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((epoch - first) / (last - first) if last > first else 0.5)

    def up(value: float) -> float:
        low, high = bounds
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    lines = []
    for name, values in series.items():
        measured = [(e, v) for e, v in zip(epochs, values, strict=False) if v is not None]
        if measured:
            points = " ".join(f"{across(e):.1f},{up(v):.1f}" for e, v in measured)
            lines.append(Line(name, points, f"{measured[-1][1]:.4g}"))
    steps = sorted({first, round((first + last) / 2), last})
    return Chart(
        title,
        tuple(lines),
        tuple(Tick(across(e), f"{e:g}") for e in steps),
        tuple(Tick(up(v), f"{v:g}") for v in (bounds[0] + (bounds[1] - bounds[0]) * i / 4 for i in range(5))),
    )

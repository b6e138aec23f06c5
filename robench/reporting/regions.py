"""Decision regions of classifiers of a plane as a drawing: figure 1 of ATENT (arXiv:2008.12338).

`robench regions` asks the model, and keeps what it answers::

    reports/regions/<model>.json    a :class:`Regions`

From that everything is drawn without torch. An image of two pixels has 65,536 forms in 8 bits, and all of them are
asked: nothing is interpolated.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from robench.errors import UserError
from robench.papers.definitions import threats_of
from robench.papers.filling import FilledTable
from robench.records import Provenance, Value
from robench.reporting.curves import LEFT, WIDTH
from robench.reporting.rendering import environment
from robench.store import StoredCard, file_name
from robench.threat_model import ThreatModel

LEVELS = 256
_SIDE = 312.0
_HEIGHT = 376.0
"""Of a panel: its title, the square, the axis."""


class Regions(Value):
    """What a model answers everywhere in a plane, and where the test images lie."""

    schema_version: Literal[1] = 1
    model: str
    weights_sha256: str
    dataset: str
    split_sha256: str
    """Of the test split."""
    classes: tuple[str, ...]
    axes: tuple[str, str]
    """What the first and the second pixel are called."""
    low: float
    """What a pixel of 0 stands for on both axes."""
    high: float
    """What a pixel of 1 stands for."""
    rows: tuple[str, ...]
    """The classes of the images whose second pixel is 0, 1, ... 255, each by runs along the first: `0x120 1x136`."""
    points: tuple[str, ...]
    """The test images: first pixel, second pixel and label of each, `120 37 0`."""
    provenance: Provenance

    @classmethod
    def of(
        cls, answers: NDArray[np.int64], pixels: NDArray[np.uint8], labels: NDArray[np.int64], **facts: object
    ) -> Self:
        """Return regions from answers `(256, 256)` [second pixel, first], test images `(N, 2)` and labels `(N,)`."""
        rows = tuple(" ".join(f"{k}x{len(list(run))}" for k, run in groupby(row)) for row in answers.tolist())
        points = tuple(f"{x} {y} {k}" for (x, y), k in zip(pixels.tolist(), labels.tolist(), strict=True))
        return cls.model_validate({**facts, "rows": rows, "points": points})

    @model_validator(mode="after")
    def _is_a_plane(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        grid, points = self.answers(), self.images()
        if not 0 <= grid.min() <= grid.max() < len(self.classes):
            raise ValueError(f"rows hold the class {grid.max()} of {len(self.classes)}")
        if len(points) and not (points.min() >= 0 and points[:, :2].max() < LEVELS):
            raise ValueError("points hold a pixel that is not in 0..255")
        if len(points) and points[:, 2].max() >= len(self.classes):
            raise ValueError(f"points hold the label {points[:, 2].max()} of {len(self.classes)} classes")
        return self

    def answers(self) -> NDArray[np.int64]:
        """Return the classes `(256, 256)`: [second pixel, first pixel]."""
        grid = [[int(k) for k, n in _runs(row) for _ in range(n)] for row in self.rows]
        if len(grid) != LEVELS or any(len(row) != LEVELS for row in grid):
            raise ValueError(f"rows are not {LEVELS} of {LEVELS} images each")
        return np.array(grid, np.int64)

    def images(self) -> NDArray[np.int64]:
        """Return the test images `(N, 3)`: first pixel, second pixel, label."""
        numbers = [[int(text) for text in point.split()] for point in self.points]
        if any(len(point) != 3 for point in numbers):
            raise ValueError("points are not two pixels and a label each")
        return np.array(numbers, np.int64).reshape(-1, 3)

    def coordinates(self, pixels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what 8-bit pixels stand for on the axes."""
        return self.low + pixels / (LEVELS - 1) * (self.high - self.low)


def _runs(row: str) -> list[tuple[int, int]]:
    pairs = [run.partition("x") for run in row.split()]
    return [(int(k), int(n)) for k, _, n in pairs]


@dataclass(frozen=True)
class Panel:
    """One model's regions under a title."""

    title: str
    regions: Regions
    threat: ThreatModel | None = None
    """Its ball is drawn to scale in a corner."""


def regions_path(reports: Path, model: str) -> Path:
    """Return where a model's regions stand, or would stand."""
    return reports / "regions" / f"{file_name(model)}.json"


def read_regions(path: Path) -> Regions:
    """Return the regions in a file; raise UserError that names it for anything else."""
    remedy = "delete it and run robench regions again"
    try:
        return Regions.from_json(path.read_text(encoding="utf-8"), origin=str(path), remedy=remedy)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; {remedy}") from None


def panels_of(filled: FilledTable, reports: Path, cards: Mapping[str, StoredCard]) -> list[Panel]:
    """Return a panel for each row of a paper's table whose model has regions of the weights that its card describes.

    Its title is the row's with our numbers, as in the paper's figure.
    """
    panels = []
    for row, cells in filled.lines():
        measured = [cell for cell in cells if cell.model is not None and cell.text is not None]
        if not measured or measured[0].model is None:
            continue
        stored, path = cards.get(measured[0].model), regions_path(reports, measured[0].model)
        if stored is None or not path.is_file():
            continue
        found = read_regions(path)
        if found.weights_sha256 == stored.card.weights.sha256:
            unit = " %" if filled.table.unit == "percent" else ""
            numbers = " / ".join(str(cell.text) for cell in measured)
            threats = [t for c in filled.table.columns for t in threats_of(filled.table.facts(row, c))]
            panels.append(Panel(f"{row.title}: {numbers}{unit}", found, threats[0] if threats else None))
    return panels


def regions_svg(panels: Sequence[Panel]) -> str:
    """Return the panels, two in a row, as a drawing that stands alone and may as well stand in a page."""
    classes = list(dict.fromkeys(name for panel in panels for name in panel.regions.classes))
    return (
        environment()
        .get_template("regions.svg")
        .render(
            panels=[_drawn(panel, number, classes) for number, panel in enumerate(panels)],
            width=WIDTH * min(2, max(1, len(panels))),
            height=_HEIGHT * -(-len(panels) // 2) + 24,
            classes=classes,
        )
    )


def regions_csv(panels: Iterable[Panel]) -> str:
    """Return where the test images lie, what they are and what each model answers: a row for each image and model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, panel in enumerate(panels):
        found = panel.regions
        if number == 0:
            writer.writerow(["model", *found.axes, "label", "answer"])
        grid = found.answers()
        for x, y, label in found.images().tolist():
            place = [f"{value:.6g}" for value in found.coordinates(np.array([x, y]))]
            writer.writerow([found.model, *place, found.classes[label], found.classes[grid[y, x]]])
    return text.getvalue()


def _drawn(panel: Panel, number: int, classes: Sequence[str]) -> dict[str, object]:
    """Return a panel in the drawing's units; inside its square in 8-bit levels, the second pixel upwards."""
    found = panel.regions
    points = found.images()
    ticks = [found.low + (found.high - found.low) * i / 4 for i in range(5)]
    places = [((tick - found.low) / (found.high - found.low) * (LEVELS - 1) + 0.5) * _SIDE / LEVELS for tick in ticks]
    radius = None if panel.threat is None else panel.threat.radius * (LEVELS - 1)
    return {
        "x": WIDTH * (number % 2),
        "y": _HEIGHT * (number // 2) + 24,
        "title": panel.title,
        "axes": found.axes,
        "scale": _SIDE / LEVELS,
        "areas": [(classes.index(name), _area(found.rows, k)) for k, name in enumerate(found.classes)],
        "points": [(classes.index(name), _dots(points[points[:, 2] == k])) for k, name in enumerate(found.classes)],
        "ticks": [(LEFT + place, _SIDE - place, f"{tick:.4g}") for place, tick in zip(places, ticks, strict=True)],
        "ball": radius and {"radius": radius, "rounded": radius if panel.threat and panel.threat.norm == "L2" else 0},
        "size": None if panel.threat is None else f"{panel.threat.radius * (found.high - found.low):.4g}",
        "norm": panel.threat and panel.threat.norm,
    }


def _area(rows: Sequence[str], wanted: int) -> str:
    """Return the runs of one class as the outline of a path; equal rows that follow each other are one block."""
    drawn = []
    for row, lines in groupby(range(len(rows)), key=lambda i: rows[i]):
        block = list(lines)
        runs = _runs(row)
        ends = np.cumsum([0, *(n for _, n in runs)]).tolist()
        for (k, n), (start, _) in zip(runs, pairwise(ends), strict=True):
            if k == wanted:
                drawn.append(f"M{start} {block[0]}h{n}v{len(block)}h{-n}z")
    return "".join(drawn)


def _dots(points: NDArray[np.int64]) -> str:
    return "".join(f"M{x}.5 {y}.5h0" for x, y, _ in points.tolist())

"""What a model answers along the straight lines from images to their adversarial images: figure 6 of SGR
(arXiv:1805.08736).

`robench lines` attacks, asks, and keeps::

    reports/lines/<model>.json    a :class:`Lines`

From that everything is drawn without torch.
"""

from __future__ import annotations

from itertools import cycle, pairwise
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from robench.errors import UserError
from robench.panels import Axis, Origin, Plot, Series
from robench.records import EvalSpec, NonNegativeFloat, PositiveInt, Provenance, Value
from robench.store import file_name

#: A class that never gets so much is not drawn, unless the image is one of it or becomes one.
_VISIBLE = 0.05
#: Outputs are kept to so many decimals.
_DECIMALS = 6
#: How near two outputs may come for which of them is larger to be a matter of rounding.
_TIE = 1e-4
#: The looks of the label, of the adversarial class (both in strong colours), and of all others.
_LABEL, _FALLEN, _OTHERS = 0, 1, (3, 7, 2, 6)


class StraightLine(Value):
    """One image that fell, and the softmax of every class on the way to what it became."""

    example: int
    """The image's position in its split."""
    label: int
    adversarial: int
    """The class of the adversarial image."""
    distance: NonNegativeFloat
    """Between the two, in the threat model's norm."""
    outputs: tuple[str, ...]
    """Of each class, at equally spaced points from the image to the adversarial image: `0.98 0.95 ... 0.02`."""

    @classmethod
    def of(cls, softmax: NDArray[np.float64], *, example: int, label: int, adversarial: int, distance: float) -> Self:
        """Return a line from softmax outputs `(classes, points)`, the image's first."""
        outputs = tuple(" ".join(f"{value:.6g}" for value in row) for row in softmax.round(_DECIMALS).tolist())
        return cls(example=example, label=label, adversarial=adversarial, distance=distance, outputs=outputs)

    @model_validator(mode="after")
    def _is_a_line_of_a_fallen_image(self) -> Self:
        found = self.softmax()
        classes, points = found.shape
        where = f"the line of example {self.example}"
        if points < 2:
            raise ValueError(f"{where} has {points} points, no line")
        if not all(0 <= k < classes for k in (self.label, self.adversarial)) or self.label == self.adversarial:
            raise ValueError(f"{where} leads from class {self.label} to {self.adversarial} of {classes}")
        # NaN is neither.
        if not ((found >= 0) & (found <= 1)).all() or not (np.abs(found.sum(0) - 1) <= 1e-5 + 1e-6 * classes).all():
            raise ValueError(f"{where} holds outputs that are no softmax")
        for end, k, name in ((0, self.label, "label"), (-1, self.adversarial, "adversarial class")):
            if found[k, end] < found[:, end].max() - _TIE:
                raise ValueError(f"{where} does not {'end' if end else 'begin'} at its {name} {k}")
        return self

    def softmax(self) -> NDArray[np.float64]:
        """Return the outputs `(classes, points)`."""
        rows = [[float(text) for text in row.split()] for row in self.outputs]
        if not rows or len({len(row) for row in rows}) != 1:
            raise ValueError(f"the line of example {self.example} has not as many points for every class")
        return np.array(rows, np.float64)


class Lines(Value):
    """The lines of the first images that fell to an attack, in the order of their positions."""

    schema_version: Literal[1] = 1
    spec: EvalSpec
    """The question whose answer the adversarial images are: model and weights, images, threat, attack, seed."""
    attacked: PositiveInt
    """Images that are right without an attack."""
    fallen: PositiveInt
    """Of these, those that are wrong after it, where that counts; the first of them have lines."""
    classes: tuple[str, ...]
    lines: tuple[StraightLine, ...]
    provenance: Provenance

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not 1 <= len(self.lines) <= self.fallen <= self.attacked <= self.spec.examples.count:
            raise ValueError(
                f"{len(self.lines)} lines of {self.fallen} fallen of {self.attacked} attacked of "
                f"{self.spec.examples.count} images"
            )
        if len({line.softmax().shape for line in self.lines} | {(len(self.classes), self.points)}) != 1:
            raise ValueError(f"lines are not all of {len(self.classes)} classes at {self.points} points")
        if any(a.example >= b.example for a, b in pairwise(self.lines)):
            raise ValueError("lines are not in the order of their examples")
        return self

    @property
    def points(self) -> int:
        """Return at how many points of each line the model was asked."""
        return len(self.lines[0].outputs[0].split())

    def way(self) -> list[float]:
        """Return where the points lie: 0 is the image, 1 its adversarial image."""
        return [point / (self.points - 1) for point in range(self.points)]


def lines_path(reports: Path, model: str) -> Path:
    """Return where a model's lines stand, or would stand."""
    return reports / "lines" / f"{file_name(model)}.json"


def read_lines(path: Path) -> Lines:
    """Return the lines in a file; raise UserError that names it for anything else."""
    remedy = "delete it and run robench lines again"
    try:
        return Lines.from_json(path.read_text(encoding="utf-8"), origin=str(path), remedy=remedy)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; {remedy}") from None


def plots(found: Lines, *, title: str = "", shown: int | None = None, origin: Origin | None = None) -> list[Plot]:
    """Return a plot for each of the first `shown` lines: label, adversarial class, and what else comes up between."""
    prefix = f"{title}: " if title else ""
    made = []
    for line in found.lines[:shown]:
        softmax = line.softmax()
        named = {line.label: ("label", _LABEL), line.adversarial: ("adversarial", _FALLEN)}
        others = [k for k in np.flatnonzero(softmax.max(1) > _VISIBLE).tolist() if k not in named]
        looks = [(k, f"{found.classes[k]} ({role})", look) for k, (role, look) in named.items()]
        looks += [(k, found.classes[k], look) for k, look in zip(others, cycle(_OTHERS), strict=False)]
        made.append(
            Plot(
                title=f"{prefix}{found.spec.examples.split} image {line.example}",
                x=Axis(title="way to the adversarial image", low=0.0, high=1.0),
                y=Axis(title="softmax output", low=0.0, high=1.0),
                series=tuple(
                    Series(title=name, x=found.way(), y=softmax[k].tolist(), look=look, origin=origin)
                    for k, name, look in looks
                ),
            )
        )
    return made

"""Gradient regularisation in two dimensions, computed: the boundary around one outlier, before and after."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robench.catalog import DrawingEntry, PositiveFloat, PositiveInt
from robench.panels import Axis, Panel, Plot, Series
from robench.papers.figures import Evidence

#: Places of the grid per side.
_SIDE = 81


def draw(
    evidence: Evidence, *, points: PositiveInt = 140, bandwidth: PositiveFloat = 0.035, strength: PositiveFloat = 0.02
) -> list[Panel]:
    """Return one panel: points of two classes, and where the model changes its mind before and after.

    The original model is the average of the points' labels (1 and -1) with Gaussian weights. The regularised one
    minimises 1/2 (v - f)^2 + strength |grad v|^2 (equation 4 with strength = sigma^2 / 2) over the unit square.

    Args:
        points: of both classes together; one of them is the outlier.
        bandwidth: of the weights: small, so that the original model follows every point.
        strength: of the penalty.
    """
    del evidence
    stream = np.random.RandomState(1)
    places = stream.random_sample((points, 2))
    labels = np.where(places[:, 0] + 0.12 * np.sin(6 * places[:, 1]) < 0.6, 1.0, -1.0)
    # The outlier takes the place of the point that is nearest to (0.25, 0.5), well inside the first class.
    outlier = int(np.hypot(places[:, 0] - 0.25, places[:, 1] - 0.5).argmin())
    labels[outlier] = -1.0
    axis = np.linspace(0.0, 1.0, _SIDE)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    squares = ((grid[..., None, :] - places) ** 2).sum(-1)
    # Less the smallest distance: far from every point the nearest one decides.
    weights = np.exp(-(squares - squares.min(-1, keepdims=True)) / (2 * bandwidth**2))
    before = (weights * labels).sum(-1) / weights.sum(-1)
    after = regularised(before, strength)
    lines = [
        Series(title=title, x=x, y=y, form="segments")
        for title, (x, y) in (("boundary before", contour(before)), ("boundary after", contour(after)))
    ]
    classes = [
        Series(
            title=title,
            x=places[chosen, 0].tolist(),
            y=places[chosen, 1].tolist(),
            form="dots",
            hollow=hollow,
        )
        for title, chosen, hollow in (("one class", labels > 0, False), ("the other", labels < 0, True))
    ]
    bounds = Axis(title="", low=0.0, high=1.0, ticks=False)
    return [Plot(title="Boundary before and after", x=bounds, y=bounds, series=(*lines, *classes))]


def regularised(f: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Return the v that minimises the mean of 1/2 (v - f)^2 + strength |grad v|^2 over the unit square.

    That is v - 2 strength laplacian(v) = f with no slope across the border: solved in cosines, by the Fourier transform
    of the function mirrored at its borders.
    """
    rows, columns = f.shape
    mirrored = np.block([[f, f[:, -2:0:-1]], [f[-2:0:-1], f[-2:0:-1, -2:0:-1]]])
    waves = [
        2 * (1 - np.cos(2 * np.pi * np.arange(n) / n)) * (size - 1) ** 2
        for n, size in zip(mirrored.shape, (rows, columns), strict=True)
    ]
    solved = np.fft.fft2(mirrored) / (1 + 2 * strength * (waves[0][:, None] + waves[1]))
    return np.fft.ifft2(solved).real[:rows, :columns]


def contour(f: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Return the line f = 0 on the unit square as pieces, each two points that follow each other.

    Each square of the grid is cut into two triangles, in which f is a plane: a triangle has no piece or one.
    """
    rows, columns = f.shape
    x: list[float] = []
    y: list[float] = []
    for i in range(rows - 1):
        for j in range(columns - 1):
            corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            for triangle in ((0, 1, 2), (0, 2, 3)):
                ends = [corners[k] for k in triangle]
                values = [float(f[end]) for end in ends]
                if min(values) >= 0 or max(values) < 0:
                    continue
                for a in range(3):
                    b = (a + 1) % 3
                    if (values[a] < 0) != (values[b] < 0):
                        share = values[a] / (values[a] - values[b])
                        x.append((ends[a][0] + share * (ends[b][0] - ends[a][0])) / (rows - 1))
                        y.append((ends[a][1] + share * (ends[b][1] - ends[a][1])) / (columns - 1))
    return x, y


ENTRY = DrawingEntry(
    name="smoothing-sketch",
    draw=draw,
    summary="A decision boundary around one outlier before and after gradient regularisation.",
    source="Campbell et al., arXiv:2010.02508, equation 4 and figure 3",
    measures=False,
)

"""The covariance that structured gradient regularisation leaves beside a model, as a drawing and as CSV.

The curves of a covariance function are those of figure 2 of Roth et al. (arXiv:1805.08736), the heat map of a full
matrix is that of figure 1.
"""

from __future__ import annotations

import base64
import csv
import io
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robench.covariances import Covariance, block_means, read_covariance
from robench.reporting.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, Tick, round_bounds
from robench.reporting.rendering import environment

__all__ = [
    "Covariance",
    "covariance_charts",
    "covariance_csv",
    "covariance_picture",
    "covariance_svg",
    "heat_picture",
    "read_covariance",
]

#: Rows and columns of a heat map at most; of a larger matrix each cell is the mean of a block.
_LARGEST_MAP = 1024
#: The same on a page, which has to be light.
PAGE_MAP = 200
_NEGATIVE, _ZERO, _POSITIVE = (np.array(c, dtype=np.float64) for c in ((194, 87, 26), (255, 255, 255), (10, 108, 102)))


def covariance_csv(covariance: Covariance, *, side: int = _LARGEST_MAP) -> str:
    """Return the numbers that are drawn: per displacement a column for each pair of channels, or a matrix's cells, at
    most `side` of them in a row.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if covariance.values.ndim == 3:
        pairs = _pairs(covariance)
        writer.writerow(["displacement", *pairs])
        for displacement, values in enumerate(zip(*pairs.values(), strict=True)):
            writer.writerow([displacement, *(f"{value:.9g}" for value in values)])
    else:
        cells, block = block_means(covariance.values, side)
        starts = [block * i for i in range(len(cells))]
        writer.writerow(["pixel", *starts])
        for start, row in zip(starts, cells, strict=True):
            writer.writerow([start, *(f"{value:.9g}" for value in row)])
    return text.getvalue()


def covariance_svg(covariance: Covariance) -> str:
    """Return the drawing as a self-contained file."""
    if covariance.values.ndim == 3:
        return (
            environment()
            .get_template("covariance_function.svg")
            .render(title=f"Covariance function of {covariance.model}", charts=_charts(covariance))
        )
    cells, block = block_means(covariance.values, _LARGEST_MAP)
    largest = float(np.abs(cells).max())
    return (
        environment()
        .get_template("covariance_matrix.svg")
        .render(
            title=f"Covariance matrix of {covariance.model}",
            picture=heat_picture(cells / largest if largest > 0 else cells),
            dimension=len(covariance.values),
            block=block,
            largest=f"{largest:.3g}",
            shape=" x ".join(map(str, covariance.image_shape)),
        )
    )


def covariance_charts(covariance: Covariance) -> tuple[Chart, ...]:
    """Return the curves of a covariance function; a matrix has none."""
    return tuple(_charts(covariance)) if covariance.values.ndim == 3 else ()


def covariance_picture(covariance: Covariance, *, side: int = _LARGEST_MAP) -> str | None:
    """Return the heat map of a matrix as the base64 text of a PNG file; a function has none.

    It has at most `side` rows and columns.
    """
    if covariance.values.ndim == 3:
        return None
    cells, _ = block_means(covariance.values, side)
    largest = float(np.abs(cells).max())
    return heat_picture(cells / largest if largest > 0 else cells)


def _pairs(covariance: Covariance) -> dict[str, NDArray[np.float64]]:
    """Return the function of every pair of channels, those of a channel with itself first."""
    channels = len(covariance.values)
    names = {1: ["grey"], 3: ["R", "G", "B"]}.get(channels, [str(c) for c in range(channels)])
    pairs = sorted(combinations_with_replacement(range(channels), 2), key=lambda pair: (pair[0] != pair[1], pair))
    return {f"{names[a]}-{names[b]}": covariance.values[a, b] for a, b in pairs}


def _charts(covariance: Covariance) -> list[Chart]:
    """Return the curves within the channels, and those between them, on the same scale."""
    pairs = _pairs(covariance)
    channels = len(covariance.values)
    drawn = list(pairs.items())
    low, high = round_bounds(min(0.0, *(v.min() for v in pairs.values())), max(v.max() for v in pairs.values()))
    titles = {"within channels": drawn[:channels], "between channels": drawn[channels:]}
    return [_chart(title, curves, low, high) for title, curves in titles.items() if curves]


def _chart(title: str, curves: list[tuple[str, NDArray[np.float64]]], low: float, high: float) -> Chart:
    end = max(len(curves[0][1]) - 1, 1)

    def across(displacement: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * displacement / end

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    lines = tuple(
        Line(name, " ".join(f"{across(r):.1f},{up(v):.1f}" for r, v in enumerate(values)), f"{values[0]:.3g}")
        for name, values in curves
    )
    return Chart(
        title,
        lines,
        tuple(Tick(across(r), str(r)) for r in sorted({round(end * i / 4) for i in range(5)})),
        tuple(Tick(up(v), f"{v:.3g}") for v in np.linspace(low, high, 5)),
    )


def heat_picture(shares: NDArray[np.float64]) -> str:
    """Return values in [-1, 1] as the base64 text of a PNG file: orange below zero, white, green above."""
    strength = np.abs(shares)[..., None]
    colours = _ZERO + strength * (np.where(shares[..., None] < 0, _NEGATIVE, _POSITIVE) - _ZERO)
    file = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()

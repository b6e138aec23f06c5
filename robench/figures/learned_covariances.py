"""The covariances that structured gradient regularisation left beside its models: as heat maps, or as functions of the
displacement.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Literal

import numpy as np

from robench.catalog import DrawingEntry, Probability
from robench.covariances import Covariance, as_function, as_matrix, block_means, inner_pixels, read_covariance
from robench.errors import UserError
from robench.panels import Axis, HeatMap, Origin, Panel, Plot, Series
from robench.papers.figures import Evidence, Line, PanelFacts
from robench.store import StoredCard

#: Rows of a heat map; of a larger matrix each cell is the mean of a block.
_LARGEST_MAP = 200
_CHANNELS = {1: ("grey",), 3: ("R", "G", "B")}


def draw(
    evidence: Evidence, *, form: Literal["matrix", "function"] = "matrix", trimmed: Probability = 0.25
) -> list[Panel]:
    """Return a panel for each line that has a covariance.

    Args:
        form: `matrix` over the flattened pixels, or `function` of the displacement, of each pair of channels. A
            covariance that was learned in the other form is turned into this one: a function by giving each pair of
            pixels its displacement's value, a matrix by the mean over the pairs of one displacement.
        trimmed: of a matrix: the share of the image that is cut off on each side.
    """
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        for line in lines:
            if found := evidence.trained(panel, line):
                learned = _read(evidence, panel, line, found.card)
                if learned is not None:
                    title = f"{panel.title}: {found.title}" if panel.title else found.title
                    if form == "matrix":
                        panels.append(matrix(title, learned, found.origin, trimmed))
                    else:
                        panels += functions(title, learned, found.origin)
    return panels


def _read(evidence: Evidence, panel: PanelFacts, line: Line, stored: StoredCard) -> Covariance | None:
    try:
        return read_covariance(stored.card, stored.folder)
    except UserError as error:
        evidence.lacks(panel, line, str(error))
        return None


def matrix(title: str, learned: Covariance, origin: Origin | None, trimmed: float) -> HeatMap:
    """Return the inner part of a covariance matrix, its largest entry being 1."""
    inner = inner_pixels(learned.image_shape, trimmed)
    entries = as_matrix(learned)[np.ix_(inner, inner)]
    largest = float(np.abs(entries).max())
    cells, block = block_means(entries / largest if largest > 0 else entries, _LARGEST_MAP)
    caption = f"{len(inner)} pixels; 1 is {largest:.3g}"
    if block > 1:
        caption += f"; each cell is the mean of {block} x {block}"
    return HeatMap(title=title, caption=caption, values=cells, origin=origin)


def functions(title: str, learned: Covariance, origin: Origin | None) -> list[Plot]:
    """Return the functions within the channels, and those between them, on the same scale."""
    values = as_function(learned)
    channels, steps = len(values), list(range(values.shape[-1]))
    names = _CHANNELS.get(channels) or tuple(map(str, range(channels)))
    bounds = Axis(title="covariance", includes=(0.0, float(values.min()), float(values.max())))
    pairs = list(combinations_with_replacement(range(channels), 2))
    made = []
    for words, chosen in (
        ("within channels", [p for p in pairs if p[0] == p[1]]),
        ("between channels", [p for p in pairs if p[0] != p[1]]),
    ):
        series = tuple(
            Series(title=f"{names[a]}-{names[b]}", x=steps, y=values[a, b].tolist(), origin=origin) for a, b in chosen
        )
        if series:
            whole = f"{title}, {words}" if channels > 1 else title
            made.append(
                Plot(
                    title=whole,
                    x=Axis(title="displacement in pixels", low=0.0, high=float(steps[-1])),
                    y=bounds,
                    series=series,
                )
            )
    return made


ENTRY = DrawingEntry(
    name="covariance-matrices",
    draw=draw,
    summary="Covariance matrices or functions that structured gradient regularisation left beside its models.",
    source="Roth et al., arXiv:1805.08736, figures 1 and 2",
    presets={"covariance-functions": {"form": "function"}},
)

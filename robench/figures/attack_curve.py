"""Which share of images is fooled within each distance, from attacks' records."""

from __future__ import annotations

import numpy as np

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Plot, Series
from robench.papers.archive import distances
from robench.papers.figures import Evidence, attack_record

#: Points of a curve.
_STEPS = 400


def draw(evidence: Evidence, *, positive_only: bool = True) -> list[Panel]:
    """Return for each panel the share of images that the attack returns within each L2 distance.

    Distances are those of the tables: 0 for an image that is wrong anyway, the last distance where none was found.

    Args:
        positive_only: leave out the zeros, as the paper's figures do: shares of the images with a distance above 0.
    """
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        series = []
        end = 0.0
        for line in lines:
            found = evidence.attacked(panel, line)
            if found is None:
                continue
            threat = attack_record(found).spec.threat
            lengths = distances(found.rows or {}, threat)
            chosen = np.sort(lengths[lengths > 0] if positive_only else lengths)
            if not len(chosen):
                evidence.lacks(panel, line, "no image has a distance above 0")
                continue
            end = max(end, threat.radius)
            places, shares = within(chosen)
            series.append(
                Series(
                    title=found.title,
                    x=places,
                    y=shares,
                    form="step",
                    n=len(chosen),
                    origin=found.origin,
                    look=found.look,
                )
            )
        if series:
            panels.append(
                Plot(
                    title=panel.title,
                    x=Axis(title="L2 distance", low=0.0, high=end),
                    y=Axis(title="successfully attacked, %", low=0.0, high=100.0),
                    series=tuple(series),
                )
            )
    return panels


def within(lengths: np.ndarray) -> tuple[list[float], list[float]]:
    """Return a step function: which share (%) of ascending lengths lies within each x."""
    shown = np.unique(np.linspace(0, len(lengths), min(len(lengths), _STEPS) + 1).round().astype(int)[1:])
    start = 100 * float((lengths <= 0).mean())
    return [0.0, *lengths[shown - 1].tolist()], [start, *(100 * shown / len(lengths)).tolist()]


ENTRY = DrawingEntry(
    name="attack-curve",
    draw=draw,
    summary="Share of images that an attack fools within each L2 distance.",
    source="Campbell et al., arXiv:2010.02508, figures 2 and 5",
)

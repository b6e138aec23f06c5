"""How effective margins are spread, from the records of the certificate `effective-margin`."""

from __future__ import annotations

import numpy as np

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Spread, Spreads
from robench.papers.figures import Evidence


def draw(evidence: Evidence) -> list[Panel]:
    """Return for each panel the margins of its lines over the images that are classified correctly."""
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        groups = []
        for line in lines:
            found = evidence.certified(panel, line)
            if found is None:
                continue
            rows = found.rows or {}
            margins = np.asarray(rows["radius"], np.float64)[rows["correct"]]
            if not len(margins) or not np.isfinite(margins).all():
                evidence.lacks(panel, line, "no image to take it over" if not len(margins) else "not finite")
                continue
            groups.append(Spread.of(found.title, margins, found.origin, hollow=line.hollow))
        if groups:
            panels.append(
                Spreads(title=panel.title, x=Axis(title="effective margin, L2", low=0.0), groups=tuple(groups))
            )
    return panels


ENTRY = DrawingEntry(
    name="effective-margins",
    draw=draw,
    summary="Mean, spread and quantiles of the effective margins of correctly classified images.",
    source="Liu and Chan, arXiv:2210.05118, equation 3, figures 1 and 2",
)

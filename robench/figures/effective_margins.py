"""How effective margins are spread, from the records of the certificate `effective-margin`."""

from __future__ import annotations

import numpy as np

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Spread, Spreads
from robench.papers.archive import FEW_INFINITE
from robench.papers.figures import Evidence


def draw(evidence: Evidence) -> list[Panel]:
    """Return for each panel the margins of its lines over the images that are classified correctly.

    A few images around which a network is constant, infinitely far from any boundary, are left out, as in the tables.
    """
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        groups = []
        for line in lines:
            found = evidence.certified(panel, line)
            if found is None:
                continue
            rows = found.rows or {}
            margins = np.asarray(rows["radius"], np.float64)[rows["correct"]]
            finite = margins[np.isfinite(margins)]
            constant = len(margins) - len(finite)
            if not len(finite) or constant > FEW_INFINITE * len(margins):
                why = (
                    f"infinite for {constant:,} of {len(margins):,} images" if constant else "no image to take it over"
                )
                evidence.lacks(panel, line, why)
                continue
            title = f"{found.title}, without {constant:,} infinite" if constant else found.title
            groups.append(Spread.of(title, finite, found.origin, hollow=line.hollow))
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

"""Softmax outputs along the straight lines from images to their adversarial images, as `robench lines` kept them."""

from __future__ import annotations

from robench.catalog import DrawingEntry, PositiveInt
from robench.panels import Panel
from robench.papers.figures import Evidence
from robench.softmax_lines import plots


def draw(evidence: Evidence, *, shown: PositiveInt = 4) -> list[Panel]:
    """Return panels for each line of the figure: those of the first images of its model that fell.

    Args:
        shown: of how many images at most.
    """
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        for line in lines:
            if answer := evidence.straight_lines(panel, line):
                found, kept, origin = answer
                title = f"{panel.title}: {found.title}" if panel.title else found.title
                panels += plots(kept, title=title, shown=shown, origin=origin)
    return panels


ENTRY = DrawingEntry(
    name="softmax-lines",
    draw=draw,
    summary="Softmax outputs along the straight lines from images to their adversarial images, an image a panel.",
    source="Roth et al., arXiv:1805.08736, figure 6",
)

"""Adversarial examples of a model, where `robench eval --save-adversarials` kept them."""

from __future__ import annotations

from robench.catalog import DrawingEntry
from robench.panels import Fallen, Panel
from robench.papers.figures import Evidence, attack_record


def draw(evidence: Evidence) -> list[Panel]:
    """Return a panel for each line whose images are at hand."""
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        for line in lines:
            found = evidence.attacked(panel, line, options="--save-adversarials")
            if found is not None:
                title = f"{panel.title}: {found.title}" if panel.title else found.title
                panels.append(Fallen(title=title, record=attack_record(found), rows=found.rows, origin=found.origin))
    return panels


ENTRY = DrawingEntry(
    name="perturbed-samples",
    draw=draw,
    summary="Adversarial examples that an evaluation kept: before, after, and what was added.",
    source="Roth et al., arXiv:1805.08736, figures 7 and 8",
)

"""Why cross-entropy does not widen margins, computed: a logit that is scaled against one that is shifted."""

from __future__ import annotations

import numpy as np

from robench.catalog import DrawingEntry, PositiveFloat
from robench.panels import Axis, Panel, Plot, Rule, Series
from robench.papers.figures import Evidence


def draw(
    evidence: Evidence, *, scale: PositiveFloat = 3.0, shift: PositiveFloat = 2.0, sample: PositiveFloat = 1.0
) -> list[Panel]:
    """Return two panels over the input x: the sigmoid of the logit, and the size of the loss's gradient.

    The model is f(x) = x, scaled to `scale` x, or shifted to x + `shift`; the loss is -log sigmoid(f).

    Args:
        scale: alpha of the paper, above 1.
        shift: how far the decision boundary is moved away.
        sample: where the sample lies that is looked at.
    """
    del evidence
    x = np.linspace(-4.0, 4.0, 161)
    models = {"f = x": x, f"scaled: {scale:g} x": scale * x, f"shifted: x + {shift:g}": x + shift}
    rules = (Rule(title="sample", x=sample), Rule(title="boundary", x=0.0))
    moved = Rule(title="boundary, shifted", x=-shift)
    probability = [
        Series(title=name, x=x.tolist(), y=(1 / (1 + np.exp(-logit))).tolist()) for name, logit in models.items()
    ]
    # The derivative of -log sigmoid(f) by f is sigmoid(f) - 1.
    slope = [Series(title=name, x=x.tolist(), y=(1 / (1 + np.exp(logit))).tolist()) for name, logit in models.items()]
    across = Axis(title="x", low=-4.0, high=4.0)
    return [
        Plot(
            title="Probability of the right class",
            x=across,
            y=Axis(title="sigmoid", low=0.0, high=1.0),
            series=tuple(probability),
            rules=(*rules, moved),
        ),
        Plot(
            title="Size of the loss's gradient by the logit",
            x=across,
            y=Axis(title="gradient", low=0.0, high=1.0),
            series=tuple(slope),
            rules=(*rules, moved),
        ),
    ]


ENTRY = DrawingEntry(
    name="logit-scaling",
    draw=draw,
    summary="The sigmoid and the gradient of its loss where the logit is scaled, and where it is shifted.",
    source="Liu and Chan, arXiv:2210.05118, figure 1a",
    measures=False,
)

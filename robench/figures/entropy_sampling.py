"""What ATENT samples from, in one dimension, computed: a loss, the density around one point, and samples of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robench.catalog import DrawingEntry, PositiveFloat, PositiveInt
from robench.panels import Axis, Panel, Plot, Rule, Series
from robench.papers.figures import Evidence

#: Places of the grid on [0, 1].
_POINTS = 401


def draw(
    evidence: Evidence, *, point: PositiveFloat = 0.4, gamma: PositiveFloat = 60.0, samples: PositiveInt = 40
) -> list[Panel]:
    """Return one panel: the loss over x, the density p(x' | x) and samples of it.

    Args:
        point: x, the clean one.
        gamma: how strongly samples are held near it.
        samples: how many are drawn, with a fixed seed, by inverting the distribution function.
    """
    del evidence
    x = np.linspace(0.0, 1.0, _POINTS)
    losses, density = loss(x), gibbs_density(x, loss(x), point, gamma)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(x)
    total = np.concatenate([[0.0], np.cumsum(steps)])
    drawn = np.sort(np.interp(np.random.RandomState(0).random_sample(samples) * total[-1], total, x))
    mean = float(loss(drawn).mean())
    series = (
        Series(title="loss", x=x.tolist(), y=losses.tolist()),
        Series(title=f"density p(x' | x = {point:g})", x=x.tolist(), y=density.tolist(), form="area"),
        Series(title=f"{samples} samples, mean loss {mean:.3g}", x=drawn.tolist(), y=[0.0] * samples, form="dots"),
    )
    return [
        Plot(
            title=f"Loss {float(loss(np.array(point))):.3g} at x, {mean:.3g} over the samples",
            x=Axis(title="x", low=0.0, high=1.0),
            y=Axis(title="loss, density", low=0.0),
            series=series,
            rules=(Rule(title=f"x = {point:g}", x=point),),
        )
    ]


def loss(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cross-entropy of a made-up binary model whose logit of the right class is 1.5 + 3.5 cos(9 x - 3.3)."""
    found: NDArray[np.float64] = np.log1p(np.exp(-1.5 - 3.5 * np.cos(9 * x - 3.3)))
    return found


def gibbs_density(
    x: NDArray[np.float64], losses: NDArray[np.float64], point: float, gamma: float
) -> NDArray[np.float64]:
    """Return p(x' | x) on a uniform grid: proportional to exp(loss(x') - gamma / 2 (x' - x)^2), of mass 1."""
    exponent = losses - gamma / 2 * (x - point) ** 2
    heights = np.exp(exponent - exponent.max())
    found: NDArray[np.float64] = heights / np.trapezoid(heights, x)
    return found


ENTRY = DrawingEntry(
    name="entropy-sampling",
    draw=draw,
    summary="The Gibbs density of ATENT's entropic loss around one point, and samples of it.",
    source="Jagatap et al., arXiv:2008.12338, assumption 2 and figure 2",
    measures=False,
)

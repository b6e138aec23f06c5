"""Certified accuracy over the radius, from certificates' records."""

from __future__ import annotations

from typing import Literal

import numpy as np

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Plot, Series
from robench.papers.figures import Evidence

#: Points of a curve: finer than any drawing, and its file stays small.
_STEPS = 400


def draw(evidence: Evidence, *, denominator: Literal["all", "answered", "both"] = "both") -> list[Panel]:
    """Return for each panel the share of images that are certified correctly beyond each radius.

    Args:
        denominator: shares of `all` images, of those on which the certificate does not abstain (`answered`, as Campbell
            et al. plot it), or a plot of each.
    """
    panels: list[Panel] = []
    ways = {"answered": "of those answered", "all": "of all images"}
    for panel, lines in evidence.lines():
        found = [one for line in lines if (one := evidence.certified(panel, line))]
        for way, words in ways.items():
            series = []
            for one in found if denominator in {way, "both"} else ():
                rows = one.rows or {}
                radius, n = rows["radius"], len(rows["radius"])
                if way == "answered":
                    n = int((rows["prediction"] >= 0).sum())
                certified = np.sort(radius[rows["correct"] & (radius > 0) & np.isfinite(radius)])
                if n:
                    places, shares = beyond(certified, n)
                    series.append(
                        Series(title=one.title, x=places, y=shares, form="step", n=n, origin=one.origin, look=one.look)
                    )
            if series:
                panels.append(
                    Plot(
                        title=f"{panel.title}, {words}",
                        x=Axis(title="L2 radius", low=0.0),
                        y=Axis(title="certified, %", low=0.0, high=100.0),
                        series=tuple(series),
                    )
                )
    return panels


def beyond(radii: np.ndarray, n: int) -> tuple[list[float], list[float]]:
    """Return a step function: which share (%) of `n` images has a radius above each x, of the ascending radii."""
    shown = np.unique(np.linspace(0, len(radii), min(len(radii), _STEPS) + 1).round().astype(int)[1:])
    left = 100 * (len(radii) - shown) / n
    return [0.0, *radii[shown - 1].tolist()], [100 * len(radii) / n, *left.tolist()]


ENTRY = DrawingEntry(
    name="certified-accuracy",
    draw=draw,
    summary="Certified accuracy over the L2 radius, of all images or of those that the certificate answers.",
    source="Cohen et al., arXiv:1902.02918; without abstentions: Campbell et al., arXiv:2010.02508, figure 1",
    presets={
        "certified-accuracy-of-all": {"denominator": "all"},
        "certified-accuracy-of-answered": {"denominator": "answered"},
    },
)

"""The iterates of HeatSmoothing's 1-D toy, computed."""

from __future__ import annotations

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Plot, Rule, Series
from robench.papers.figures import Evidence
from robench.papers.smoothing_toy import POINT, SmoothingToy

#: Every so many places of the grid are drawn.
_STRIDE = 10
#: How many places are marked with the class that they are given.
_MARKS = 41


def draw(evidence: Evidence, *, steps: tuple[int, ...] = (0, 1, 8)) -> list[Panel]:
    """Return a panel for each of these iterates: the function, the class of some points, and the distance at -0.5."""
    del evidence
    toy = SmoothingToy()
    x, found = toy.grid, toy.iterates(max(steps))
    every = (len(x) - 1) // (_MARKS - 1)
    panels: list[Panel] = []
    for step in steps:
        f, distance = found[step], toy.distance(found[step])
        places = x[::every]
        signs = f[::every] > 0
        classes = [
            Series(
                title=title,
                x=places[chosen].tolist(),
                y=[height] * int(chosen.sum()),
                form="dots",
                hollow=height < 0,
            )
            for title, chosen, height in (("one class", signs, 1.5), ("the other", ~signs, -1.5))
        ]
        reach = Series(
            title=f"distance {distance:.3f} at x = {POINT}",
            x=[POINT, POINT + distance],
            y=[0.0, 0.0],
        )
        curve = Series(title=f"f{step}", x=x[::_STRIDE].tolist(), y=f[::_STRIDE].tolist())
        panels.append(
            Plot(
                title=f"f{step}: adversarial distance {distance:.3f} at x = {POINT}",
                x=Axis(title="x", low=-1.0, high=1.0),
                y=Axis(title="f", low=-2.0, high=2.0),
                series=(curve, reach, *classes),
                rules=(Rule(title="decision line", y=0.0),),
            )
        )
    return panels


ENTRY = DrawingEntry(
    name="smoothing-iterates",
    draw=draw,
    summary="Iterates of HeatSmoothing's equation 15 in one dimension, and how far a point is from the other class.",
    source="Campbell et al., arXiv:2010.02508, figure 4",
    measures=False,
)

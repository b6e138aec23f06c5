"""Robust accuracy at several places of an axis: epsilons, decay lengths."""

from __future__ import annotations

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Plot, Series
from robench.papers.figures import Evidence, Found, attack_record


def draw(evidence: Evidence, *, relative: bool = False, with_clean: bool = False) -> list[Panel]:
    """Return for each panel the robust accuracy of its lines at its places, joined by straight lines.

    Args:
        relative: below it the accuracy of the second line over that of the first.
        with_clean: each line begins at 0 with the clean accuracy of the same images.
    """
    panels: list[Panel] = []
    axis = Axis(title=evidence.figure.x_title or "", low=0.0)
    for panel, lines in evidence.lines():
        found = {line.title: evidence.along(panel, line) for line in lines}
        series = [_series(points, with_clean=with_clean) for points in found.values() if points]
        if series:
            percent = Axis(title="correct, %", low=0.0, high=100.0)
            panels.append(Plot(title=panel.title, x=axis, y=percent, series=tuple(series)))
        if relative and len(series) == len(lines) == 2:
            panels.append(_relative(panel.title, series, axis))
    return panels


def _series(points: list[tuple[float, Found]], *, with_clean: bool) -> Series:
    """Return a line with its 95 % intervals."""
    first = points[0][1]
    shares = [(x, attack_record(one).robust) for x, one in points]
    if with_clean:
        shares.insert(0, (0.0, attack_record(first).clean))
    return Series(
        title=first.title,
        x=[x for x, _ in shares],
        y=[100 * share.value for _, share in shares],
        low=[100 * share.wilson[0] for _, share in shares],
        high=[100 * share.wilson[1] for _, share in shares],
        n=shares[0][1].n,
        origin=first.origin,
        look=first.look,
    )


def _relative(title: str, series: list[Series], axis: Axis) -> Plot:
    """Return the second line over the first, where the first is not 0."""
    base, other = series
    pairs = [(x, 100 * b / a) for x, a, b in zip(base.x, base.y, other.y, strict=True) if a > 0]
    ratio = Series(
        title=f"{other.title} over {base.title}",
        x=[x for x, _ in pairs],
        y=[y for _, y in pairs],
        origin=other.origin,
        look=1,
    )
    return Plot(title=f"{title}, relative", x=axis, y=Axis(title="of the other, %"), series=(ratio,))


ENTRY = DrawingEntry(
    name="accuracy-over",
    draw=draw,
    summary="Robust accuracy over epsilon or over another parameter of an attack.",
    source="Roth et al., arXiv:1805.08736, figures 3 and 4; Liu and Chan, arXiv:2210.05118, figure 3",
)

"""Softmax outputs along straight lines: as a drawing that stands alone and as CSV, which `robench lines` writes, and on
the model's page.
"""

from __future__ import annotations

import csv
import io

from robench.reporting.curves import HEIGHT, WIDTH, Chart, Drawing, Line
from robench.reporting.figures import figure_csv, sketch
from robench.reporting.rendering import environment
from robench.softmax_lines import Lines, plots

#: Images on the page of a model.
_ON_A_PAGE = 4
#: Above the panels, between them, and of one line of a legend.
_HEADING, _GAP, _ENTRY = 30.0, 26.0, 16.0


def lines_svg(found: Lines) -> str:
    """Return the lines, two panels in a row, each with the names of its curves below."""
    sketches = [sketch(plot) for plot in plots(found)]
    height = _GAP + HEIGHT + _ENTRY * (1 + max(len(one.shapes) for one in sketches))
    panels = [
        {"x": WIDTH * (place % 2), "y": _HEADING + height * (place // 2) + _GAP, "sketch": one}
        for place, one in enumerate(sketches)
    ]
    return (
        environment()
        .get_template("lines.svg")
        .render(
            panels=panels,
            width=WIDTH * min(2, len(panels)),
            height=_HEADING + height * -(-len(panels) // 2),
            title=f"{found.spec.model.id}, {found.spec.attack.title}, {found.spec.threat}",
            counted=_counted(found, len(found.lines)),
        )
    )


def lines_drawing(found: Lines) -> Drawing:
    """Return the first lines as a figure of the model's page."""
    shown = plots(found, shown=_ON_A_PAGE)
    charts = []
    for plot in shown:
        drawn = sketch(plot)
        ends = [f"{series.y[0]:.2f} to {series.y[-1]:.2f}" for series in plot.series]
        charts.append(
            Chart(
                drawn.title,
                tuple(Line(s.title, s.points, end) for s, end in zip(drawn.shapes, ends, strict=True)),
                drawn.x_ticks,
                drawn.y_ticks,
                x_title=drawn.x_title,
                y_title=drawn.y_title,
            )
        )
    return Drawing(
        name="lines",
        title="Outputs on the way to adversarial images",
        caption=f"{found.spec.attack.title}, {found.spec.threat}: {_counted(found, len(shown))}, each on the straight "
        "line from the image to what it became",
        charts=tuple(charts),
        csv=figure_csv(shown),
    )


def _counted(found: Lines, shown: int) -> str:
    counted = f"{found.fallen:,} of {found.attacked:,} images fell"
    return counted + (f", the first {shown} are drawn" if shown < found.fallen else "")


def lines_csv(found: Lines) -> str:
    """Return every output that is kept: a row for each image, class and point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "example", "label", "adversarial", "class", "way", "softmax"])
    way = [f"{value:.6g}" for value in found.way()]
    for line in found.lines:
        head = [found.spec.model.id, line.example, found.classes[line.label], found.classes[line.adversarial]]
        for name, outputs in zip(found.classes, line.outputs, strict=True):
            writer.writerows([*head, name, at, value] for at, value in zip(way, outputs.split(), strict=True))
    return text.getvalue()

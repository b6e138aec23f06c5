"""Panels as drawings: everything lies where its numbers say."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from robench.panels import Axis, HeatMap, Origin, Plot, Rule, Series, Spread, Spreads
from robench.reporting.figures import figure_csv, sketch

SHARES = Axis(title="share", low=0.0, high=100.0)


def plot(*series: Series, x: Axis | None = None, rules: tuple[Rule, ...] = ()) -> Plot:
    return Plot(title="t", x=x or Axis(title="x", low=0.0, high=4.0), y=SHARES, series=series, rules=rules)


def test_lines_dots_rules_and_intervals_lie_where_their_numbers_say() -> None:
    line = Series(title="a", x=[0, 2, 4], y=[0, 50, 100], low=[0, 40, 90], high=[10, 60, 100], n=50)
    found = sketch(plot(line, rules=(Rule(title="r", x=1.0), Rule(title="s", y=25.0))))
    (shape,) = found.shapes
    assert shape.points == "40.0,176.0 196.0,93.0 352.0,10.0"
    assert shape.dots == ((40.0, 176.0), (196.0, 93.0), (352.0, 10.0))
    assert shape.bars[1] == pytest.approx((196.0, 109.6, 76.4))
    assert (found.rules[0].x, found.rules[0].y, found.rules[1].y) == (118.0, None, 134.5)
    assert [tick.text for tick in found.x_ticks] == ["0", "1", "2", "3", "4"]
    assert "a, n 50: from 0 at 0 to 100 at 4" in found.described
    assert shape.n == 50


def test_steps_hold_until_the_next_and_end_with_the_axis() -> None:
    (shape,) = sketch(plot(Series(title="a", x=[0, 2, 3, 9], y=[100, 50, 0, 0], form="step"))).shapes
    assert shape.points == "40.0,10.0 196.0,10.0 196.0,93.0 274.0,93.0 274.0,176.0 352.0,176.0"


def test_areas_reach_down_and_pieces_stay_apart() -> None:
    area = Series(title="a", x=[0, 4], y=[50, 50], form="area")
    pieces = Series(title="b", x=[0, 1, 3, 4], y=[0, 0, 100, 100], form="segments")
    shapes = sketch(plot(area, pieces)).shapes
    assert shapes[0].points == "40.0,176.0 40.0,93.0 352.0,93.0 352.0,176.0"
    assert shapes[1].pieces == "M40.0 176.0L118.0 176.0M274.0 10.0L352.0 10.0"
    assert [shape.look for shape in shapes] == [0, 1]
    (alone,) = sketch(plot(Series(title="b", x=[0, 1], y=[0, 0], look=3))).shapes
    assert alone.look == 3


def test_axes_reach_all_data_and_what_they_include() -> None:
    axis = Axis(title="y", includes=(-0.3, 1.0))
    panel = Plot(title="t", x=Axis(title="x"), y=axis, series=(Series(title="a", x=[1, 3], y=[0.1, 0.2]),))
    assert [tick.text for tick in sketch(panel).y_ticks] == ["−0.5", "0", "0.5", "1", "1.5"]
    flat = Plot(title="t", x=Axis(title="x"), y=Axis(title="y"), series=(Series(title="a", x=[1], y=[2]),))
    assert sketch(flat).shapes[0].points == "196.0,93.0"


def test_spreads_lie_where_their_statistics_say() -> None:
    values = np.arange(101) / 100
    spread = Spread.of("a", values, hollow=True)
    assert spread.quantiles == pytest.approx((0.05, 0.25, 0.5, 0.75, 0.95))
    (group,) = sketch(Spreads(title="t", x=Axis(title="x", low=0.0, high=1.0), groups=(spread,))).groups
    assert (group.low, group.median, group.high) == pytest.approx((32.8, 184.0, 335.2), abs=0.05)
    assert group.mean - group.left == pytest.approx(336 * values.std(), abs=0.05)
    assert group.right - group.mean == pytest.approx(336 * values.std(), abs=0.05)
    assert group.hollow
    assert group.text == "0.50 ± 0.29, n 101"


def test_the_file_has_every_number_with_its_origin() -> None:
    origin = Origin(model="m", record=Path("records/m/0123.json"))
    series = Series(title="a", x=[0, 2], y=[1 / 3, 50], low=[0, 40], high=[1, 60], n=10, origin=origin)
    rows = list(csv.DictReader(io.StringIO(figure_csv([plot(series)]))))
    assert [row["y"] for row in rows] == ["0.3333333333", "50"]
    assert (rows[1]["low"], rows[1]["high"], rows[1]["n"]) == ("40", "60", "10")
    assert (rows[0]["model"], rows[0]["record"]) == ("m", "0123")
    heat = HeatMap(title="h", caption="c", values=np.array([[1.0, -0.5], [0.25, 0.125]]), origin=origin)
    assert figure_csv([heat]).splitlines() == ["panel,model,row,0,1", "h,m,0,1,-0.5", "h,m,1,0.25,0.125"]


def test_a_series_has_as_many_x_as_y() -> None:
    with pytest.raises(ValueError, match="2 x for 1 y"):
        Series(title="a", x=[1, 2], y=[1])

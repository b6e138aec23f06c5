"""Heat maps and curves: drawn where their numbers say, and beside them as files."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic import first_of, put_minimum_norm, put_transfer, spec
from test_site import HOSTILE, Page

from robench.reporting import write_leaderboards
from robench.reporting.curves import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, step_chart
from robench.reporting.formatting import interval, shown, sortable
from robench.store import Store
from robench.tables import Cell, Column, Curve, Curves

REACH = np.linspace(0.01, 0.5, 50)


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two models in a matrix, one with a hostile name; minimum norms of both, of one by two attacks."""
    store = Store(tmp_path / "reports")
    for source in ("a", HOSTILE):
        for target, robust in (("a", 40), (HOSTILE, 5)):
            put_transfer(store, spec(source, "pgd-40"), spec(target).model, first_of(50, robust))
    put_minimum_norm(store, spec("a", "ddn"), np.where(first_of(50, 20), REACH, math.inf))
    put_minimum_norm(store, spec("a", "fab"), np.where(first_of(50, 10), REACH, math.inf))
    put_minimum_norm(store, spec(HOSTILE, "ddn"), REACH)
    return store.root


def write(reports: Path) -> dict[str, Path]:
    written = write_leaderboards(["transfer", "minimum-norm"], Store(reports), {}, reports / "leaderboards")
    return {path.name: path for path in written}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_files_are_beside_their_table_and_linked(reports: Path) -> None:
    written = write(reports)
    tables = sorted(name for name in written if not name.endswith((".json", ".tex")) and "nearest" not in name)
    assert tables == [
        "a.html",
        "index.html",
        "minimum-norm-mnist-linf-curve-ddn.csv",
        "minimum-norm-mnist-linf-curve-ddn.svg",
        "minimum-norm-mnist-linf-curve-fab.csv",
        "minimum-norm-mnist-linf-curve-fab.svg",
        "minimum-norm-mnist-linf-curve.csv",
        "minimum-norm-mnist-linf-curve.svg",
        "minimum-norm-mnist-linf.csv",
        "minimum-norm-mnist-linf.html",
        "script-alert-1-script-7b5e7ff7.html",
        "transfer-mnist-linf-0.3-pgd-heat-map.csv",
        "transfer-mnist-linf-0.3-pgd.csv",
        "transfer-mnist-linf-0.3-pgd.html",
    ]
    assert sum("nearest" in name and name.endswith(".csv") for name in written) == 3, "histograms on the models' pages"
    linked = {
        unquote(link).rpartition("/")[2]
        for name, path in written.items()
        if name.endswith(".html")
        for link in Page(path).links
    }
    assert {name for name in written if name != "index.html"} <= linked
    for path in written.values():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|url\(|<(link|iframe|object|embed)\b|fetch\(", text), path
        assert "<script>alert" not in text or path.suffix in {".csv", ".json"}, path


def test_every_cell_of_a_heat_map_has_its_colour_and_interval(reports: Path) -> None:
    page = Page(write(reports)["transfer-mnist-linf-0.3-pgd.html"])
    cells = [a for tag, a in page.tags if tag == "td" and (a.get("style") or "").startswith("--share")]
    shares = [cell["style"].removeprefix("--share:") for cell in cells]
    assert shares == ["1.0000", "0.8000", "0.8000", "1.0000", "0.1000", "0.1000"]
    outlined = [bool(cell.get("class")) for cell in cells]
    assert outlined == [False, True, False, False, False, True], "the diagonal"
    assert cells[1]["title"] == "67.0–88.8 of 50, white-box"
    style = page.text
    assert style.count("--fallen:") == style.count("--standing:") == 2, "a light and a dark colour"
    (first, second) = rows(write(reports)["transfer-mnist-linf-0.3-pgd-heat-map.csv"])
    assert (first["accuracy of"], first["clean"], first["a"], first[HOSTILE]) == ("a", "1", "0.8", "0.8")
    assert second["a_n"] == "50"


def test_infinite_distances_are_shown_and_sort_last(reports: Path) -> None:
    page = Page(write(reports)["minimum-norm-mnist-linf.html"])
    assert "∞" in page.text
    values = [a.get("data-value") for tag, a in page.tags if tag == "td" and a.get("data-title") == "Nearest median"]
    assert values == ["Infinity", "0.255"]
    ranked, other = rows(write(reports)["minimum-norm-mnist-linf.csv"])
    assert (ranked["model"], ranked["median"], ranked["median_low"], ranked["found"]) == ("a", "inf", "0.18", "0.4")
    assert (other["rank"], other["ddn median"], other["fab median"]) == ("", "0.255", "")
    assert other["ddn median_record"] == spec(HOSTILE, "ddn").identity


def test_curves_are_drawn_where_their_values_lie() -> None:
    curve = Curve(title="m", x=(0.0, 0.1, 0.2, 0.35), y=(0.0, 0.25, 0.5, 1.0), n=4)
    curves = Curves(name="c", title="C", caption="c", x_title="x", y_title="y", curves=(curve,), x_end=0.29)
    chart = step_chart(curves)
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0].points.split()]
    across = lambda x: LEFT + (WIDTH - LEFT - 8) * x / 0.3  # noqa: E731
    up = lambda share: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share  # noqa: E731
    corners = [(0, 0), (0.1, 0), (0.1, 0.25), (0.2, 0.25), (0.2, 0.5), (0.3, 0.5)]
    for point, (x, y) in zip(points, corners, strict=True):
        assert point == pytest.approx((across(x), up(y)), abs=0.06)
    assert chart.lines[0].last == "100 %", "the file and the legend know what lies beyond the drawing"
    assert [tick.text for tick in chart.x_ticks] == ["0", "0.075", "0.15", "0.225", "0.3"]


def test_a_drawing_leaves_out_only_what_it_cannot_show() -> None:
    x = tuple(np.linspace(0, 1, 5001).tolist())
    curve = Curve(title="m", x=x, y=x, n=5000)
    curves = Curves(name="c", title="C", caption="c", x_title="x", y_title="y", curves=(curve,), x_end=1.0)
    points = [tuple(map(float, point.split(","))) for point in step_chart(curves).lines[0].points.split()]
    assert 300 < len(points) < 2000
    for place, height in points[1:]:
        share = (place - LEFT) / (WIDTH - LEFT - 8)
        assert height == pytest.approx(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, abs=1.1)


def test_drawings_stand_alone_in_light_and_dark(reports: Path) -> None:
    root = ElementTree.fromstring(write(reports)["minimum-norm-mnist-linf-curve.svg"].read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    assert "prefers-color-scheme: dark" in root.findtext(f"{space}style")
    assert len(root.findall(f"{space}polyline")) == 2
    texts = [element.text for element in root.findall(f"{space}text")]
    assert {"a", HOSTILE, "Linf distance", "broken, %"} <= set(texts)
    points = rows(write(reports)["minimum-norm-mnist-linf-curve.csv"])
    own = [(float(p["Linf distance"]), float(p["share"])) for p in points if p["curve"] == HOSTILE]
    assert own == [(0.0, 0.0), *[(pytest.approx(d), pytest.approx((i + 1) / 50)) for i, d in enumerate(REACH)]]


def test_distances_as_text() -> None:
    column = Column(key="d", title="D", role="distance", description="d")
    cell = Cell(value=0.123456, low=0.1, high=math.inf, n=9)
    assert (shown(cell, column), interval(cell, column)) == ("0.123", "0.1–∞")
    assert [sortable(v) for v in (None, math.inf, 0.5)] == ["", "Infinity", 0.5]


def test_figures_import_nothing_heavy(reports: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from robench.reporting import write_leaderboards
from robench.store import Store
root = Path({str(reports)!r})
write_leaderboards(["transfer", "minimum-norm", "robustness"], Store(root), {{}}, root / "leaderboards")
print(*{{"torch", "pandas", "scipy", "statsmodels", "sklearn", "pyarrow.dataset"}} & set(sys.modules))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_falling_curve_falls_to_its_end() -> None:
    """Certified accuracy starts where it starts, not at 0, and its last step down is drawn."""
    curve = Curve(title="a", x=(0.0, 0.6, 0.6001), y=(0.9, 0.85, 0.0), n=20)
    chart = step_chart(
        Curves(name="c", title="c", caption="c", x_title="x", y_title="y", curves=(curve,), x_end=0.6001)
    )
    (line,) = chart.lines
    places = [tuple(map(float, point.split(","))) for point in line.points.split()]
    up = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * np.array([0.9, 0.85, 0.0])
    assert places[0] == (LEFT, pytest.approx(up[0], abs=0.06))
    assert places[-1][1] == pytest.approx(up[2], abs=0.06)
    assert line.last == "90 %"

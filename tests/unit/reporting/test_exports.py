"""Tables as JSON and LaTeX: the same numbers, and nothing that a name could break out of."""

from __future__ import annotations

import json
import math
import re

import pytest

from robench.reporting.json_files import table_json
from robench.reporting.latex import latex_text, measured_latex, table_latex
from robench.tables import Cell, Column, Curve, Curves, Grid, Table

HOSTILE = '\\input{/etc/passwd} 50%_#&$^~{}"<>|[x] -- --- \n\x07 end'


def table(**changes: object) -> Table:
    columns = (
        Column(key="rank", title="#", role="rank", description="Its place."),
        Column(key="model", title="Model", role="model", description="Its name."),
        Column(key="made", title="Made", role="label", description="How."),
        Column(key="worst", title="Worst & case", role="accuracy", description="A share."),
        Column(key="nearest", title="Nearest", role="distance", description="A distance."),
    )
    rows = (
        (
            Cell(value=1),
            Cell(value=HOSTILE),
            Cell(value="a_b"),
            Cell(value=2 / 3, low=0.5, high=0.75, n=30),
            Cell(value=math.inf),
        ),
        (Cell(value=2), Cell(value="b"), Cell(), Cell(value=0.5, low=0.25, high=0.75, n=30), Cell(value=0.25)),
        (Cell(note="not ranked: without pgd_20"), Cell(value="c"), Cell(), Cell(value=0.9), Cell()),
    )
    grid = Grid(
        name="g",
        title="G",
        caption="c",
        corner=("m",),
        rows=(("a",),),
        columns=("x",),
        cells=((Cell(value=0.5, n=2),),),
    )
    curve = Curve(title="a", x=(0.0, math.inf), y=(0.0, 1.0), n=2)
    curves = Curves(name="k", title="K", caption="c", x_title="x", y_title="y", curves=(curve,), x_end=1.0)
    made = {"name": "t", "title": "T", "caption": "C 100%", "figures": (grid, curves), **changes}
    return Table(columns=columns, rows=rows, ranked_by="worst", **made)


def test_json_holds_every_number() -> None:
    found = json.loads(table_json(table()), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [column["key"] for column in found["columns"]] == ["rank", "model", "made", "worst", "nearest"]
    first, _, last = found["rows"]
    assert first["model"] == {"value": HOSTILE}
    assert first["worst"] == {"value": 0.6666666667, "low": 0.5, "high": 0.75, "n": 30}
    assert first["nearest"] == {"value": "inf"}
    assert last["rank"] == {"value": None, "note": "not ranked: without pgd_20"}
    assert [grid["cells"] for grid in found["grids"]] == [[[{"value": 0.5, "n": 2}]]]


def test_latex_prints_names_as_they_stand() -> None:
    text = latex_text(HOSTILE)
    # What is left after the known replacements has no special character.
    plain = re.sub(r"\\text[a-z]+\{\}|\\[{}$&#%_]|\{[-\[\]]\}", "", text)
    assert not set(plain) & set("\\{}$&#%_^~\"<>|[]`'")
    assert "--" not in text
    assert text.isprintable()
    assert latex_text("pgd-20") == "pgd-20"
    assert latex_text("91.2–93.0 ∞") == "91.2--93.0 $\\infty$"


def test_latex_has_a_cell_for_each_column_and_bolds_the_best_ranked() -> None:
    lines = table_latex(table()).splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 4
    assert all(len(re.findall(r"(?<!\\)&", row)) == 4 for row in rows)
    assert r"\textbf{66.7 {\scriptsize(50.0--75.0)}} & $\infty$ \\" in rows[1]
    assert [("textbf" in row) for row in rows] == [False, True, False, False]
    assert r"c: not ranked: without pgd\_20." in lines[-2]
    assert lines.count(r"\begin{tabular}{@{}rllrr@{}}") == 1


def test_what_goes_into_a_paper_is_narrow() -> None:
    text = measured_latex(table())
    assert r"\begin{tabular}{@{}rlrr@{}}" in text
    assert "Made" not in text
    assert r"a\_b" not in text

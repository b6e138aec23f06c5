"""Claims: what an expression may say, and when a verdict is given."""

from __future__ import annotations

import pytest

from robench.errors import UserError
from robench.papers.claims import evaluate, judge
from robench.papers.definitions import Claim
from robench.papers.filling import PaperCell


def claim(**facts: object) -> Claim:
    return Claim.model_validate({"id": "x-c1", "statement": "x", "source": "section 1", **facts})


def cell(printed: str = "50.0", value: float | None = None, scale: str | None = "paper") -> PaperCell:
    number = float(printed)
    return PaperCell(
        printed=printed,
        printed_value=number,
        value=value,
        text=None if value is None else f"{value}",
        scale=scale if value is not None else None,
        missing=None if value is not None else "not trained",
    )


def test_arithmetic_comparisons_and_functions() -> None:
    cells = {"t-1[a].x": 3.0, "t-1[b-0.1].y": 5.0}
    for text, expected in {
        "t-1[a].x + 2 * t-1[b-0.1].y": 13.0,
        "max(t-1[a].x, t-1[b-0.1].y) - min(1, 2)": 4.0,
        "t-1[a].x < t-1[b-0.1].y <= 5": True,
        "not t-1[a].x > 4 and (1 > 2 or 2 > 1)": True,
        "-abs(t-1[a].x - t-1[b-0.1].y) / 4": -0.5,
        "(t-1[a].x, sqrt(16))": (3.0, 4.0),
    }.items():
        assert evaluate(text, cells.__getitem__, {}, claim="x") == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('x')",
        "(1).real",
        "[1][0]",
        "1 if 2 else 3",
        "1 +",
        "unknown",
        "1 / 0",
        "1 == 1",
        "2 ** 9",
    ],
)
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises(UserError, match="claim x"):
        evaluate(text, lambda _: 1.0, {}, claim="x")


def test_a_number_within_its_tolerance() -> None:
    about = claim(printed="50", measure="t-1[a].x", tolerance=2)
    assert judge(about, lambda _: cell(value=51.5)).verdict == "holds"
    far = judge(about, lambda _: cell(value=53.0))
    assert (far.verdict, far.measured, far.printed_verdict) == ("does not", "53", "holds")
    missing = judge(about, lambda _: cell())
    assert (missing.verdict, missing.measured) == ("not measured", None)
    assert "t-1[a].x: not trained" in missing.why


def test_several_numbers_must_all_be_near() -> None:
    both = claim(printed="50, 60", measure="(t-1[a].x, t-1[b].x)", tolerance=1)
    values = {"t-1[a].x": cell("50", 50.5), "t-1[b].x": cell("60", 70.0)}
    assert judge(both, values.__getitem__).verdict == "does not"
    assert judge(claim(printed="50, 60", measure="t-1[a].x"), values.__getitem__).verdict == "does not"


def test_a_smoke_run_is_no_evidence_and_scales_are_not_mixed() -> None:
    order = claim(holds="t-1[a].x > t-1[b].x")
    values = {"t-1[a].x": cell(value=60.0), "t-1[b].x": cell(value=50.0)}
    assert judge(order, values.__getitem__).verdict == "holds"
    assert judge(order, {**values, "t-1[b].x": cell(value=50.0, scale="smoke")}.__getitem__).verdict == "not measured"
    tiny = {name: cell(value=c.value, scale="smoke") for name, c in values.items()}
    found = judge(order, tiny.__getitem__)
    assert (found.verdict, found.printed_verdict) == ("not measured", "does not")
    assert "smoke run" in found.why
    mixed = judge(order, {**values, "t-1[b].x": cell(value=50.0, scale="reduced")}.__getitem__)
    assert mixed.verdict == "not measured"
    assert "different scales" in mixed.why
    small = {name: cell(value=c.value, scale="reduced") for name, c in values.items()}
    assert "reduced scale" in judge(order, small.__getitem__).why


def test_a_cell_behind_an_or_is_looked_at_too() -> None:
    either = claim(holds="t-1[a].x > 1 or t-1[b].x > 1")
    assert judge(either, {"t-1[a].x": cell(value=5.0), "t-1[b].x": cell()}.__getitem__).verdict == "not measured"


def test_what_cannot_be_expressed_says_what_it_takes() -> None:
    found = judge(claim(printed="1.0", needs="a figure"), lambda _: cell())
    assert (found.verdict, found.why) == ("not measured", "Needs a figure.")
    with pytest.raises(ValueError, match="needs measure and printed, or holds, or needs"):
        claim(printed="1.0")


def test_an_unknown_cell_is_an_error_of_the_file() -> None:
    def nowhere(name: str) -> PaperCell:
        raise KeyError(name)

    with pytest.raises(UserError, match=r"there is no cell t-1\[a\]\.x"):
        judge(claim(holds="t-1[a].x > 1"), nowhere)

"""Claims: what an expression may say, and when a verdict is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from robench.errors import UserError
from robench.papers.claims import evaluate, judge
from robench.papers.definitions import Claim
from robench.papers.filling import PaperCell
from robench.papers.intervals import UNBOUNDED, Interval


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


def measured(
    value: float, low: float, high: float, *, scale: str | None = "paper", flags: tuple[str, ...] = ()
) -> PaperCell:
    """A cell with an interval."""
    return replace(cell(value=value, scale=scale), low=low, high=high, flags=flags)


def among(**cells: PaperCell) -> Callable[[str], PaperCell]:
    """Find `t-1[a].x` by `a`."""
    return {f"t-1[{row}].x": found for row, found in cells.items()}.__getitem__


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


A_IS_MORE = claim(holds="t-1[a].x > t-1[b].x")


def test_intervals_that_overlap_leave_a_comparison_open() -> None:
    near = judge(A_IS_MORE, among(a=measured(24.84, 23.7, 26.1), b=measured(24.76, 23.6, 26.0)))
    assert near.verdict == "undecided"
    assert near.why == "By our numbers it holds, but within their intervals it may not."
    turned = judge(A_IS_MORE, among(a=measured(24.76, 23.6, 26.0), b=measured(24.84, 23.7, 26.1)))
    assert (turned.verdict, turned.why) == (
        "undecided",
        "By our numbers it does not, but within their intervals it may.",
    )


def test_intervals_that_are_apart_decide_it() -> None:
    high, low = measured(30.0, 28.0, 32.0), measured(20.0, 18.0, 22.0)
    assert judge(A_IS_MORE, among(a=high, b=low)).verdict == "holds"
    assert judge(A_IS_MORE, among(a=low, b=high)).verdict == "does not"
    assert judge(A_IS_MORE, among(a=high, b=low)).why == ""
    assert judge(A_IS_MORE, among(a=low, b=low)).verdict == "undecided"


def test_an_attack_that_was_too_weak_bounds_from_above_alone() -> None:
    high, low = measured(30.0, 28.0, 32.0), measured(20.0, 18.0, 22.0)
    weak = ("not-converged: still falling",)
    found = judge(A_IS_MORE, among(a=replace(high, flags=weak), b=low))
    assert found.verdict == "undecided"
    assert found.why == "By our numbers it holds, but attacks flagged as too weak may hide the difference."
    # However much a stronger attack takes from the smaller one, the other is more.
    assert judge(A_IS_MORE, among(a=high, b=replace(low, flags=weak))).verdict == "holds"
    assert judge(A_IS_MORE, among(a=replace(low, flags=weak), b=high)).verdict == "does not"
    rounded = judge(A_IS_MORE, among(a=replace(high, flags=("eight-bit: 3 of 40",)), b=low))
    assert rounded.verdict == "holds"
    overlap = judge(A_IS_MORE, among(a=replace(low, flags=weak), b=low))
    assert "within their intervals it may, and some of these attacks are flagged as too weak" in overlap.why


def test_a_level_is_near_by_its_value_and_far_by_its_interval() -> None:
    about = claim(printed="50", measure="t-1[a].x", tolerance=2)
    verdicts = {
        value: judge(about, among(a=measured(value, value - 3, value + 3))).verdict for value in (51.5, 54.0, 56.0)
    }
    assert verdicts == {51.5: "holds", 54.0: "undecided", 56.0: "does not"}
    weak = ("not-converged: still falling",)
    assert judge(about, among(a=measured(56.0, 53.0, 59.0, flags=weak))).verdict == "undecided"
    near = judge(about, among(a=measured(51.5, 48.5, 54.5, flags=weak)))
    assert near.verdict == "holds"
    assert "a stronger one may decide otherwise" in near.why
    two = claim(printed="50, 60", measure="(t-1[a].x, t-1[b].x)", tolerance=2)
    open_, far, exact = measured(54.0, 51.0, 57.0), measured(70.0, 66.0, 74.0), measured(60.0, 60.0, 60.0)
    assert judge(two, among(a=open_, b=exact)).verdict == "undecided"
    assert judge(two, among(a=open_, b=far)).verdict == "does not"


def test_a_level_of_a_reduced_training_says_little() -> None:
    about = claim(printed="50", measure="t-1[a].x", tolerance=2)
    far = judge(about, among(a=measured(5.0, 4.0, 6.0, scale="reduced")))
    assert (far.verdict, far.measured) == ("undecided", "5")
    assert far.why == "By our numbers it does not, but at reduced scale levels say little. Tolerance 2."
    assert judge(about, among(a=measured(50.0, 49.0, 51.0, scale="reduced"))).verdict == "undecided"
    # A time or a setting is of no training.
    assert judge(about, among(a=measured(5.0, 4.0, 6.0, scale=None))).verdict == "does not"
    apart = among(a=measured(9.0, 8.0, 10.0, scale="reduced"), b=measured(5.0, 4.0, 6.0, scale="reduced"))
    assert judge(A_IS_MORE, apart).verdict == "holds"


def test_what_lacks_a_number_is_named_beside_what_has_one() -> None:
    ratio = claim(printed="2, 3", measure="(t-1[a].x / t-1[b].x, t-1[c].x / t-1[d].x)")
    known = measured(4.0, 3.0, 5.0, scale=None)
    tiny = measured(4.0, 3.0, 5.0, scale="smoke")
    found = judge(ratio, among(a=known, b=cell(), c=cell(), d=tiny))
    assert found.verdict == "not measured"
    assert found.why == ("t-1[b].x, t-1[c].x: not trained. t-1[d].x: of a smoke run, which is no evidence.")
    assert found.cells["t-1[a].x"] is known
    many = claim(holds=" < ".join(f"t-1[{row}].x" for row in "abcdef"))
    why = judge(many, lambda _: cell()).why
    assert why == "t-1[a].x, t-1[b].x, t-1[c].x and 3 more: not trained."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t-1[a].x + 1 - t-1[b].x", Interval(-3.0, 1.0)),
        ("10 - t-1[a].x", Interval(7.0, 9.0)),
        ("-t-1[a].x * t-1[z].x", Interval(-3.0, 6.0)),
        ("2 * t-1[z].x", Interval(-4.0, 2.0)),
        ("abs(t-1[z].x)", Interval(0.0, 2.0)),
        ("abs(-t-1[a].x)", Interval(1.0, 3.0)),
        ("t-1[a].x / t-1[b].x", Interval(0.2, 1.0)),
        ("1 / t-1[a].x", Interval(1 / 3, 1.0)),
        ("t-1[a].x / t-1[z].x", UNBOUNDED),
        ("1 / (t-1[a].x - 1)", UNBOUNDED),
        ("0 * (1 / t-1[z].x)", Interval(0.0, 0.0)),
        ("1 / t-1[z].x - 1 / t-1[z].x", UNBOUNDED),
        ("max(t-1[a].x, t-1[z].x, 1.5)", Interval(1.5, 3.0)),
        ("min(t-1[a].x, 2)", Interval(1.0, 2.0)),
        ("sqrt(t-1[b].x + 4)", Interval(math.sqrt(7), 3.0)),
        ("sqrt(t-1[z].x)", Interval(0.0, 1.0)),
    ],
)
def test_arithmetic_of_intervals(text: str, expected: Interval) -> None:
    assert evaluate(text, SPANS.__getitem__, {}, claim="x") == expected


SPANS = {"t-1[a].x": Interval(1.0, 3.0), "t-1[b].x": Interval(3.0, 5.0), "t-1[z].x": Interval(-2.0, 1.0)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t-1[a].x < t-1[b].x", None),
        ("t-1[a].x <= t-1[b].x", True),
        ("t-1[b].x < t-1[a].x", False),
        ("t-1[b].x <= t-1[a].x", None),
        ("3 < t-1[b].x", None),
        ("t-1[b].x >= 3", True),
        ("0 < t-1[a].x < 4", True),
        ("0 < t-1[a].x < 2", None),
        ("5 < t-1[a].x < 2", False),
        ("not t-1[a].x > 2", None),
        ("not t-1[a].x > 4", True),
        ("t-1[a].x > 2 and 1 > 2", False),
        ("t-1[a].x > 2 and 1 < 2", None),
        ("t-1[a].x > 2 or 1 < 2", True),
        ("t-1[a].x > 2 or 1 > 2", None),
        ("t-1[a].x / t-1[z].x > 5", None),
        ("t-1[a].x - t-1[a].x > 1", None),
    ],
)
def test_conditions_are_three_valued(text: str, expected: bool | None) -> None:
    assert evaluate(text, SPANS.__getitem__, {}, claim="x") is expected


@pytest.mark.parametrize("text", ["not t-1[a].x", "t-1[a].x and 1 < 2", "t-1[a].x / (1 - 1)"])
def test_an_interval_is_no_condition(text: str) -> None:
    with pytest.raises(UserError, match="claim x"):
        evaluate(text, SPANS.__getitem__, {}, claim="x")


def test_a_claim_needs_a_condition() -> None:
    with pytest.raises(UserError, match="claim x-c1: '2 \\+ 3' is no condition"):
        judge(claim(holds="2 + 3"), among())

"""The papers' claims, evaluated on the cells of their tables.

A claim's expressions are arithmetic and comparisons over

* cells, `atent-2[atent].linf_pgd20`: table, row, column by their ids;
* `measured` and `printed`, the claim's own two numbers;
* facts that need no record: `parameters("wrn_34_10")` of an architecture, `largest_radius(1000, 0.001, 0.25)` that so
  many samples can certify, `recipe("atent_wrn", "epochs")`, `sqrt`, `pi`;
* `abs`, `min`, `max`, `and`, `or`, `not`.

Each is evaluated with the printed values, which says whether the paper's own tables bear the claim out, and with ours.
Ours are samples, so a claim is decided only where it comes out the same for all values in their 95 % intervals
(:mod:`robench.papers.intervals`); under an attack that is flagged as too weak, for all from 0 on, because a stronger
one may leave less. It is undecided otherwise. That errs on the side of "undecided": a cell that occurs twice in an
expression counts as two, and two cells of the same images as if their errors had nothing in common.

A printed number without a condition is a level. It says nothing of trainings at reduced scale; otherwise it holds where
our value is within the tolerance, and does not where all of our interval is outside. Cells of a smoke run are no
evidence, and cells of different scales are not compared.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robench import catalog
from robench.errors import UserError
from robench.papers.definitions import Claim, load_paper
from robench.papers.filling import Filler, PaperCell, setting_of
from robench.papers.intervals import (
    Interval,
    Number,
    Truth,
    both,
    either,
    greatest,
    least,
    negated,
    square_root,
)
from robench.recipe import load_recipe
from robench.smoothing_bounds import largest_radius

Verdict = Literal["holds", "does not", "undecided", "not measured"]
"""Whether our numbers decide a claim, and how; `undecided` where they leave it open, `not measured` where they are
missing."""

_SAYS: Mapping[Truth, Verdict] = {True: "holds", False: "does not", None: "undecided"}

#: How many cells of one kind a sentence names.
_NAMED = 4

_CELL = re.compile(r"([a-z][a-z0-9-]*)\[([^\]]+)\]\.([\w.]*\w)")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with what is known of it."""

    claim: Claim
    verdict: Verdict
    measured: str | None
    """Our number as text."""
    printed_verdict: Verdict
    """What the paper's own tables say."""
    why: str
    """One sentence: what the verdict is from, or what it would take."""
    cells: Mapping[str, PaperCell] = field(default_factory=dict)
    """The evidence, by the cells' names."""


class NotMeasured(Exception):
    """Its text says which cell has no number, and why."""


Look = Callable[[str], Number]


def judge_paper(name: str, filler: Filler) -> list[Judged]:
    """Return the claims of a paper with their verdicts."""

    def cell(text: str) -> PaperCell:
        match = _CELL.fullmatch(text)
        assert match is not None
        table, row, column = match.groups()
        return filler.fill(table).cell(row, column)

    return [judge(claim, cell) for claim in load_paper(name).claims]


def judge(claim: Claim, cell: Callable[[str], PaperCell]) -> Judged:
    """Return a claim's verdict; `cell` finds a cell by its name.

    Raises UserError that names the claim for an expression that cannot be evaluated.
    """
    names = list(dict.fromkeys(m.group() for m in _CELL.finditer(f"{claim.measure or ''} {claim.holds or ''}")))
    try:
        cells = {name: cell(name) for name in names}
    except KeyError as error:
        raise UserError(f"claim {claim.id}: there is no cell {error.args[0]}") from None
    printed = _printed_verdict(claim, lambda name: _printed(name, cells[name]))
    verdict, number, why = _ours_verdict(claim, cells)
    return Judged(claim=claim, verdict=verdict, measured=number, printed_verdict=printed, why=why, cells=cells)


def _printed_verdict(claim: Claim, look: Look) -> Verdict:
    """Return what the paper's own tables say; its numbers are taken as they are printed."""
    try:
        return _SAYS[_said(claim, look)[0]]
    except NotMeasured:
        return "not measured"


def _ours_verdict(claim: Claim, cells: Mapping[str, PaperCell]) -> tuple[Verdict, str | None, str]:
    """Return the verdict with our numbers, our number, and why."""
    if claim.needs:
        return "not measured", None, f"Needs {claim.needs}."
    if lacking := _lacking(cells):
        return "not measured", None, lacking
    try:
        points, measured = _said(claim, lambda name: _value_of(cells[name]))
        sampled, _ = _said(claim, lambda name: _sampled(cells[name]))
        spans, _ = _said(claim, lambda name: _span(cells[name]))
    except NotMeasured as missing:
        return "not measured", None, str(missing)
    number = None if measured is None else _text(measured)
    scales = {c.scale for c in cells.values() if c.scale is not None}
    if len(scales) > 1:
        return "not measured", number, f"Its cells are of different scales: {', '.join(sorted(map(str, scales)))}."
    found = _Outcome(points, sampled, spans, weak=any(map(_is_weak, cells.values())), reduced="reduced" in scales)
    decided, why = _compared(found) if claim.holds else _levelled(found, claim.tolerance)
    return _SAYS[decided], number, why


@dataclass(frozen=True)
class _Outcome:
    """Whether a claim is so with our numbers, and what is known of them."""

    points: Truth
    """By the values."""
    sampled: Truth
    """By the 95 % intervals."""
    spans: Truth
    """By the same, from 0 on where the attack was too weak."""
    weak: bool
    """Some attacks are flagged as too weak."""
    reduced: bool
    """The models are trained at reduced scale."""


def _compared(found: _Outcome) -> tuple[Truth, str]:
    """Return whether a condition holds, and why."""
    said = [] if found.spans is not None else [_open(found.points, _doubt(found))]
    return found.spans, " ".join([*said, *(["At reduced scale."] if found.reduced else [])])


def _levelled(found: _Outcome, tolerance: float) -> tuple[Truth, str]:
    """Return whether a number is as printed, and why."""
    stated = f"Tolerance {tolerance:g}."
    if found.reduced:
        return None, f"{_open(found.points, 'at reduced scale levels say little')} {stated}"
    if not found.points and found.spans is None:
        return None, f"{_open(found.points, _doubt(found))} {stated}"
    if found.weak and found.points:
        stated = f"{stated} Some of these attacks are flagged as too weak: a stronger one may decide otherwise."
    # A value within the tolerance is enough: its interval may well be wider than what the paper's rounding allows.
    return found.points, stated


def _open(points: Truth, doubt: str) -> str:
    """Return the sentence of an open claim: what our values say, and why that does not decide it."""
    return f"By our numbers it {'holds' if points else 'does not'}, but {doubt}."


def _doubt(found: _Outcome) -> str:
    """Return what leaves a claim open: the attacks alone, the intervals alone, or both."""
    if found.sampled is not None:
        return "attacks flagged as too weak may hide the difference"
    within = f"within their intervals it may{' not' if found.points else ''}"
    return f"{within}, and some of these attacks are flagged as too weak" if found.weak else within


def _lacking(cells: Mapping[str, PaperCell]) -> str:
    """Return which cells are no evidence, and why; empty where all are."""
    names = defaultdict(list)
    for name, cell in cells.items():
        if cell.value is None:
            names[cell.missing or "has no number of ours"].append(name)
        elif cell.scale == "smoke":
            names["of a smoke run, which is no evidence"].append(name)
    return " ".join(f"{_few(of)}: {reason}." for reason, of in names.items())


def _few(names: list[str]) -> str:
    """Return names for a sentence, and of many the first and how many more there are."""
    return (
        ", ".join(names)
        if len(names) <= _NAMED
        else f"{', '.join(names[: _NAMED - 1])} and {len(names) - _NAMED + 1} more"
    )


def _said(claim: Claim, look: Look) -> tuple[Truth, Any]:
    """Return whether a claim is so with the numbers that `look` gives, and its own number; raise NotMeasured."""
    printed = _numbers(claim.printed)
    names: dict[str, Any] = {"printed": printed[0] if len(printed) == 1 else printed}
    if claim.measure:
        names["measured"] = evaluate(claim.measure, look, names, claim=claim.id)
    measured = names.get("measured")
    if claim.holds:
        found = evaluate(claim.holds, look, names, claim=claim.id)
        if not isinstance(found, Truth):
            raise UserError(f"claim {claim.id}: {claim.holds!r} is no condition")
        return found, measured
    if measured is None:
        raise NotMeasured("")
    return _near(measured, printed, claim.tolerance), measured


def _near(measured: Any, printed: tuple[float, ...], tolerance: float) -> Truth:
    """Return whether all of our numbers are as near to the printed ones as the tolerance."""
    ours = measured if isinstance(measured, tuple) else (measured,)
    if len(ours) != len(printed):
        return False
    return both(abs(a - b) <= tolerance + 1e-12 for a, b in zip(ours, printed, strict=True))


def _printed(name: str, cell: PaperCell) -> float:
    if cell.printed_value is None:
        raise NotMeasured(f"{name} is not printed.")
    return cell.printed_value


def _value_of(cell: PaperCell) -> float:
    assert cell.value is not None
    return cell.value


def _sampled(cell: PaperCell) -> Interval:
    """Return the 95 % interval of our number; of one that has none, the number alone."""
    value = _value_of(cell)
    return Interval(value if cell.low is None else cell.low, value if cell.high is None else cell.high)


def _span(cell: PaperCell) -> Interval:
    """Return where the truth may be: what is left by an attack that was too weak is only an upper bound of it."""
    sampled = _sampled(cell)
    return Interval(min(sampled.low, 0.0), sampled.high) if _is_weak(cell) else sampled


def _is_weak(cell: PaperCell) -> bool:
    """Tell whether the attack behind a cell is flagged as too weak; that 8 bits undo some of it says no such thing."""
    return not {*cell.flag_names} <= {"eight-bit"}


def _numbers(printed: str | None) -> tuple[float, ...]:
    """Return the numbers of a claim's printed value: `"9.8, 4.99"`."""
    if printed is None:
        return ()
    found = []
    for part in printed.replace(" ", "").split(","):
        try:
            found.append(float(part))
        except ValueError:
            return ()
    return tuple(found)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


def evaluate(text: str, look: Look, names: Mapping[str, Any], *, claim: str) -> Any:
    """Return the value of an expression; it can do arithmetic and compare, and nothing else.

    Where `look` gives intervals, it is an interval, or a condition that is None where they leave it open.
    """
    cells: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        cells.append(match.group())
        return f"_cell({len(cells) - 1})"

    try:
        tree = ast.parse(_CELL.sub(stand_in, text), mode="eval")
        return _value(tree.body, lambda index: look(cells[index]), names)
    except (SyntaxError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"claim {claim}: {text!r} cannot be evaluated: {error}") from None


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: negated}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Truth]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _parameters(architecture: str) -> float:
    return float(catalog.find("architectures", architecture).facts["parameter_counts"][architecture])


def _recipe(name: str, key: str) -> float:
    if name not in catalog.plugins("recipes"):
        raise NotMeasured(f"no recipe {name}.")
    value = setting_of(load_recipe(name), key)
    if not isinstance(value, float | int):
        raise NotMeasured(f"recipe {name} has no number {key}.")
    return float(value)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "min": least,
    "max": greatest,
    "sqrt": square_root,
    "parameters": _parameters,
    "largest_radius": lambda n, alpha, sigma: largest_radius(int(n), alpha, sigma),
    "recipe": _recipe,
}


def _value(node: ast.expr, cell: Callable[[int], Number], names: Mapping[str, Any]) -> Any:
    def of(part: ast.expr) -> Any:
        return _value(part, cell, names)

    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            return math.pi if name == "pi" else names[name]
        case ast.Tuple(elts=parts):
            return tuple(of(part) for part in parts)
        case ast.UnaryOp(op=op, operand=part) if type(op) in _UNARY:
            return _UNARY[type(op)](of(part))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](of(left), of(right))
        case ast.BoolOp() | ast.Compare():
            return _condition(node, of)
        case ast.Call(func=ast.Name(id="_cell"), args=[ast.Constant(value=int() as index)]):
            return cell(index)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(of(argument) for argument in arguments))
    raise TypeError(f"{ast.unparse(node)} is not allowed")


def _condition(node: ast.BoolOp | ast.Compare, of: Callable[[ast.expr], Any]) -> Truth:
    """Return whether it is so; every part is looked at, so that a cell without a number is never passed over."""
    if isinstance(node, ast.BoolOp):
        found = [of(part) for part in node.values]
        return both(found) if isinstance(node.op, ast.And) else either(found)
    if not all(type(op) in _COMPARE for op in node.ops):
        raise TypeError(f"{ast.unparse(node)} is not allowed")
    sides = [of(node.left), *(of(other) for other in node.comparators)]
    return both([_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False)])

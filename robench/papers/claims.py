"""The papers' claims, evaluated on the cells of their tables.

A claim's expressions are arithmetic and comparisons over

* cells, `atent-2[atent].linf_pgd20`: table, row, column by their ids;
* `measured` and `printed`, the claim's own two numbers;
* facts that need no record: `parameters("wrn_34_10")` of an architecture, `largest_radius(1000, 0.001, 0.25)` that so
  many samples can certify, `recipe("atent_wrn", "epochs")`, `sqrt`, `pi`;
* `abs`, `min`, `max`, `and`, `or`, `not`.

Each is evaluated twice: with the printed values, which says whether the paper's own tables bear the claim out, and with
ours. Cells of a smoke run are no evidence, and cells of different scales are not compared.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robench import catalog
from robench.errors import UserError
from robench.papers.definitions import Claim, load_paper
from robench.papers.filling import Filler, PaperCell, setting_of
from robench.recipe import load_recipe
from robench.smoothing_bounds import largest_radius

Verdict = Literal["holds", "does not", "not measured"]

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


Value = float | bool
Look = Callable[[str], float]


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
    printed = _evaluated(claim, lambda name: _printed(name, cells[name]))
    if claim.needs:
        return Judged(
            claim=claim,
            verdict="not measured",
            measured=None,
            printed_verdict=printed[0],
            why=f"Needs {claim.needs}.",
            cells=cells,
        )
    verdict, number, why = _evaluated(claim, lambda name: _ours(name, cells[name]))
    scales = {c.scale for c in cells.values() if c.scale is not None}
    if verdict != "not measured" and len(scales) > 1:
        verdict, why = "not measured", f"Its cells are of different scales: {', '.join(sorted(map(str, scales)))}."
    elif verdict != "not measured" and "reduced" in scales:
        why = f"{why} At reduced scale."
    if verdict != "not measured" and any({*c.flag_names} - {"eight-bit"} for c in cells.values()):
        why = f"{why} Some of these attacks are flagged as too weak: a stronger one may decide otherwise."
    return Judged(
        claim=claim, verdict=verdict, measured=number, printed_verdict=printed[0], why=why.strip(), cells=cells
    )


def _evaluated(claim: Claim, look: Look) -> tuple[Verdict, str | None, str]:
    """Return the verdict with the numbers that `look` gives, our number, and why."""
    names: dict[str, Any] = {}
    try:
        printed = _numbers(claim.printed)
        names["printed"] = printed[0] if len(printed) == 1 else printed
        if claim.measure:
            names["measured"] = evaluate(claim.measure, look, names, claim=claim.id)
        number = _text(names["measured"]) if "measured" in names else None
        if claim.holds:
            return ("holds" if evaluate(claim.holds, look, names, claim=claim.id) else "does not"), number, ""
        if "measured" not in names:
            return "not measured", None, ""
        ours = names["measured"] if isinstance(names["measured"], tuple) else (names["measured"],)
        near = len(ours) == len(printed) and all(
            abs(a - b) <= claim.tolerance + 1e-12 for a, b in zip(ours, printed, strict=True)
        )
    except NotMeasured as missing:
        return "not measured", None, str(missing)
    return "holds" if near else "does not", number, f"Tolerance {claim.tolerance:g}."


def _printed(name: str, cell: PaperCell) -> float:
    if cell.printed_value is None:
        raise NotMeasured(f"{name} is not printed.")
    return cell.printed_value


def _ours(name: str, cell: PaperCell) -> float:
    if cell.value is None:
        raise NotMeasured(f"{name}: {cell.missing or 'has no number of ours'}.")
    if cell.scale == "smoke":
        raise NotMeasured(f"{name}: of a smoke run, which is no evidence.")
    return cell.value


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
    """Return the value of an expression; it can do arithmetic and compare, and nothing else."""
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
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
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
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "parameters": _parameters,
    "largest_radius": lambda n, alpha, sigma: largest_radius(int(n), alpha, sigma),
    "recipe": _recipe,
}


def _value(node: ast.expr, cell: Callable[[int], float], names: Mapping[str, Any]) -> Any:
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


def _condition(node: ast.BoolOp | ast.Compare, of: Callable[[ast.expr], Any]) -> bool:
    """Return whether it is so; every part is looked at, so that a cell without a number is never passed over."""
    if isinstance(node, ast.BoolOp):
        found = [bool(of(part)) for part in node.values]
        return all(found) if isinstance(node.op, ast.And) else any(found)
    if not all(type(op) in _COMPARE for op in node.ops):
        raise TypeError(f"{ast.unparse(node)} is not allowed")
    sides = [of(node.left), *(of(other) for other in node.comparators)]
    return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))

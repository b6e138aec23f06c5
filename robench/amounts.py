"""Amounts written as text, `"steps * max(targets, 1)"`: how an attack's ENTRY says, as a literal, what it costs.

Names, whole numbers, `+`, `-`, `*`, `//` by a positive whole number, parentheses, `max(...)`, `min(...)`, and
`... if name else ...` or `... if name == "text" else ...`. Nothing else, and nothing is executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_FUNCTIONS = {"max": max, "min": min}


@dataclass(frozen=True)
class Amount:
    """An amount that was read and found to be one."""

    tree: ast.expr
    numbers: set[str] = field(default_factory=set)
    """The names that it computes with."""
    conditions: set[str] = field(default_factory=set)
    """The names that it only looks at."""

    @classmethod
    def read(cls, text: str) -> Amount:
        """Raise ValueError for a text that is no amount."""
        try:
            amount = cls(ast.parse(text, mode="eval").body)
            amount._check(amount.tree)
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(
                f"{text!r} is no amount; write names and whole numbers joined by + - * //, max(), min(), if and else, "
                "like 'steps * max(targets, 1)'"
            ) from None
        return amount

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Name(id=name):
                self.numbers.add(name)
            case ast.Constant(value=int()) if not isinstance(node.value, bool):
                pass
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult(), right=right):
                self._check(left)
                self._check(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=ast.Constant(value=int(by))) if by > 0:
                self._check(left)
            case ast.Call(func=ast.Name(id="max" | "min"), args=[_, _, *_] as items, keywords=[]):
                for item in items:
                    self._check(item)
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                self._check_condition(test)
                self._check(body)
                self._check(otherwise)
            case _:
                raise ValueError

    def _check_condition(self, node: ast.expr) -> None:
        match node:
            case ast.Name(id=name):
                self.conditions.add(name)
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[ast.Constant(value=str())]):
                self.conditions.add(name)
            case _:
                raise ValueError

    def value(self, values: Mapping[str, Any]) -> int:
        """Return what it comes to; raise KeyError for a name without a value."""
        return _value(self.tree, values)


def _value(node: ast.expr, values: Mapping[str, Any]) -> int:
    match node:
        case ast.Name(id=name):
            return int(values[name])
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right):
            return int(_OPERATORS[type(op)](_value(left, values), _value(right, values)))
        case ast.Call(func=ast.Name(id=name), args=items):
            return int(_FUNCTIONS[name](_value(item, values) for item in items))
        case ast.IfExp(test=ast.Name(id=name), body=body, orelse=otherwise):
            return _value(body if values[name] else otherwise, values)
        case ast.IfExp(
            test=ast.Compare(left=ast.Name(id=name), comparators=[ast.Constant(value=text)]),
            body=body,
            orelse=otherwise,
        ):
            return _value(body if values[name] == text else otherwise, values)
        case _:
            raise AssertionError(ast.dump(node))

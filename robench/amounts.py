"""Amounts written as text, `"steps * (targets + 1)"`: how an attack's ENTRY says, as a literal, what it costs.

Names, whole numbers, `+`, `*` and parentheses; nothing else, and nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping


def names_in(text: str) -> Collection[str]:
    """Return the names that an amount is made of; raise ValueError for a text that is no amount."""
    return dict.fromkeys(node.id for node in ast.walk(_tree(text)) if isinstance(node, ast.Name))


def amount(text: str, values: Mapping[str, int]) -> int:
    """Return the value of an amount; raise ValueError for a text that is none, KeyError for a name without a value."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.Constant):
            return int(node.value)  # type: ignore[arg-type]  # _tree let nothing else pass
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right

    return value(_tree(text))


def _tree(text: str) -> ast.expr:
    problem = f"{text!r} is no amount; write names and whole numbers joined by + and *, like 'steps * restarts'"
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ValueError(problem) from None
    for node in ast.walk(tree):
        number = isinstance(node, ast.Constant) and type(node.value) is int
        if not number and not isinstance(node, (ast.Name, ast.Load, ast.BinOp, ast.Add, ast.Mult)):
            raise ValueError(problem)
    return tree

"""Tables as JSON: everything that a table holds, for programs; strict JSON, in a stable order."""

from __future__ import annotations

import json
import math
from typing import Any

from robench.tables import Cell, Grid, Table


def table_json(table: Table) -> str:
    """Return the table with its columns, rows, grids and remarks; curves have files of their own.

    A row is an object with a cell for each column's key. Shares are in [0, 1], distances on the [0, 1] scale of pixels;
    what is not finite is the text "inf". `record` is the identity of the question that the number answers.
    """
    content = {
        "name": table.name,
        "title": table.title,
        "caption": table.caption,
        "ranked_by": table.ranked_by,
        "columns": [
            {
                "key": column.key,
                "title": column.title,
                "role": column.role,
                "description": column.description,
                **({"unit": column.unit} if column.unit else {}),
            }
            for column in table.columns
        ],
        "rows": [
            {column.key: cell_facts(cell) for column, cell in zip(table.columns, row, strict=True)}
            for row in table.rows
        ],
        "grids": [_grid(figure) for figure in table.figures if isinstance(figure, Grid)],
        "remarks": table.remarks,
        "warnings": table.warnings,
        "reading": table.reading,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def cell_facts(cell: Cell) -> dict[str, Any]:
    """Return what a cell holds, without what it does not."""
    facts = {
        "value": _exact(cell.value),
        "text": cell.text,
        "low": _exact(cell.low),
        "high": _exact(cell.high),
        "n": cell.n,
        "record": cell.record.name.split(".")[0] if cell.record else None,
        "note": cell.note,
        "warning": cell.warning,
    }
    return {name: value for name, value in facts.items() if value is not None or name == "value"}


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "name": grid.name,
        "title": grid.title,
        "caption": grid.caption,
        "corner": grid.corner,
        "rows": grid.rows,
        "columns": grid.columns,
        "cells": [[cell_facts(cell) for cell in row] for row in grid.cells],
    }


def _exact(value: float | int | str | None) -> float | int | str | None:
    """Return floats with ten digits, as in CSV: enough to get the counts back, and the same on every machine."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.10g}") if math.isfinite(value) else f"{value:g}"

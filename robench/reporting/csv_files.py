"""Tables and figures as CSV: exact numbers, the bounds and the record of each beside it."""

from __future__ import annotations

import csv
import io

from robench.tables import Cell, Column, Curves, Grid, Table

#: Columns whose numbers have bounds.
_MEASURED = {"accuracy", "distance"}


def table_csv(table: Table) -> str:
    """Return the table as CSV with a header.

    Shares are in [0, 1], distances on the [0, 1] scale of pixels (`inf` where nothing was found). A column `x` of
    either is followed by `x_low` and `x_high` (95 % interval, of shares Wilson's), `x_n` and `x_record` (the identity
    of the question, empty where several records make the number). Rank and model are followed by their notes. Cells
    without a value are empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(name for column in table.columns for name in _names(column))
    for row in table.rows:
        pairs = zip(table.columns, row, strict=True)
        writer.writerow(value for column, cell in pairs for value in _values(column, cell))
    return text.getvalue()


def grid_csv(grid: Grid) -> str:
    """Return a grid as CSV: one row per row of it, each column followed by its bounds and count."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*grid.corner, *(f"{name}{end}" for name in grid.columns for end in ("", "_low", "_high", "_n"))])
    for names, cells in zip(grid.rows, grid.cells, strict=True):
        values = [_exact(value) for cell in cells for value in (cell.value, cell.low, cell.high, cell.n)]
        writer.writerow([*names, *values])
    return text.getvalue()


def curves_csv(curves: Curves) -> str:
    """Return curves as CSV: one row per point, shares in [0, 1]."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", curves.x_title, "share", "n"])
    for curve in curves.curves:
        for x, y in zip(curve.x, curve.y, strict=True):
            writer.writerow([curve.title, _exact(x), _exact(y), curve.n])
    return text.getvalue()


def _names(column: Column) -> list[str]:
    if column.role in _MEASURED:
        return [column.key, *(f"{column.key}_{part}" for part in ("low", "high", "n", "record"))]
    return [column.key, f"{column.key}_note"] if column.role in {"rank", "model"} else [column.key]


def _values(column: Column, cell: Cell) -> list[object]:
    if column.role in _MEASURED:
        record = cell.record.name.split(".")[0] if cell.record else None
        return [*map(_exact, (cell.value, cell.low, cell.high, cell.n)), record]
    return [cell.value, cell.note] if column.role in {"rank", "model"} else [_exact(cell.value)]


def _exact(value: float | int | str | None) -> object:
    """Return shares with ten digits: enough to get the counts back, and the same on every machine."""
    return f"{value:.10g}" if isinstance(value, float) else value

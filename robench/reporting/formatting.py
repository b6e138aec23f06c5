"""Numbers as people read them."""

from __future__ import annotations

import math

from robench.tables import Cell, Column


def percent(value: float, n: int | None) -> str:
    """Return a share in percent, with the decimals that n can bear: 91.23 of 10,000, 91.2 of 500."""
    return f"{100 * value:.{2 if n and n >= 5000 else 1}f}"


def count(value: float) -> str:
    """Return a number with thousands separated, and one decimal below 100 where it is no integer."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Return "8.4 s", "5 min 21 s" or "3 h 05 min"; below a tenth of a second "2.31 ms" or "45 µs"."""
    if 0 < seconds < 0.1:
        return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: int) -> str:
    """Return a number of bytes as "1.3 MB"."""
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"


def length(value: float) -> str:
    """Return a distance with three digits; ∞ where there is none."""
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def interval(cell: Cell, column: Column) -> str:
    """Return the bounds of a cell that has them: "91.2–93.0"."""
    assert cell.low is not None
    assert cell.high is not None
    if column.role == "rank":
        return f"{cell.low:.0f}–{cell.high:.0f}"
    if column.role == "distance":
        return f"{length(cell.low)}–{length(cell.high)}"
    if column.unit == "s":
        return f"{duration(cell.low)}–{duration(cell.high)}"
    if column.role == "amount":
        return f"{count(cell.low)}–{count(cell.high)}"
    return f"{percent(cell.low, cell.n)}–{percent(cell.high, cell.n)}"


def sortable(value: float | int | str | None) -> float | int | str:
    """Return a value as a page's script sorts it; nothing where there is none."""
    if value is None:
        return ""
    return "Infinity" if value == math.inf else value


def shown(cell: Cell, column: Column) -> str:
    """Return a cell's value as text; a dash where there is none."""
    if cell.value is None:
        return "–"
    if cell.text is not None or isinstance(cell.value, str):
        return cell.text or str(cell.value)
    if column.role == "accuracy":
        return percent(cell.value, cell.n)
    if column.role == "distance":
        return length(cell.value)
    return duration(cell.value) if column.unit == "s" else count(cell.value)

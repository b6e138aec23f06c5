"""A table keeps the contract it states."""

from __future__ import annotations

from dataclasses import replace

import pytest

from robench.tables import Cell, Column, Table, competition_ranks, natural

COLUMNS = (
    Column(key="rank", title="#", role="rank", description="Place."),
    Column(key="model", title="Model", role="model", description="Name."),
    Column(key="worst", title="Worst case", role="accuracy", description="Share."),
)


def row(rank: int | None, worst: float | None, note: str | None = None) -> tuple[Cell, ...]:
    return Cell(value=rank, note=note), Cell(value="m"), Cell(value=worst)


def table(*rows: tuple[Cell, ...]) -> Table:
    return Table(name="t", title="T", caption="c", columns=COLUMNS, rows=rows, ranked_by="worst")


def test_a_good_table_is_accepted() -> None:
    good = table(row(1, 0.9), row(2, 0.5), row(2, 0.5), row(4, 0.1), row(None, 0.95, "lacks an attack"))
    assert [cell.value for cell in good.column("worst")] == [0.9, 0.5, 0.5, 0.1, 0.95]


@pytest.mark.parametrize(
    "rows",
    [
        [row(1, 0.5), row(2, 0.9)],
        [row(2, 0.9), row(1, 0.5)],
        [row(1, 0.5), row(2, 0.5)],
        [row(1, 0.9), row(1, 0.5)],
        [row(None, 0.9, "why"), row(1, 0.5)],
        [row(2, 0.5), row(1, 0.9)],
        [row(None, 0.9)],
    ],
)
def test_ranks_that_do_not_follow_are_refused(rows: list[tuple[Cell, ...]]) -> None:
    with pytest.raises(ValueError, match="table t"):
        table(*rows)


def test_columns_must_hold_together() -> None:
    good = table(row(1, 0.5))
    for wrong in (
        {"columns": COLUMNS[:2]},
        {"columns": (*COLUMNS[:2], replace(COLUMNS[2], key="model"))},
        {"ranked_by": "model"},
        {"ranked_by": "clean"},
        {"columns": (*COLUMNS, replace(COLUMNS[2], key="more"))},
        {"columns": COLUMNS[1:], "rows": ()},
    ):
        with pytest.raises(ValueError, match="table t"):
            replace(good, **wrong)


def test_competition_ranks() -> None:
    assert competition_ranks([]) == []
    assert competition_ranks([0.9, 0.5, 0.5, 0.1]) == [1, 2, 2, 4]


def test_natural_order() -> None:
    ordered = ["9", "10", "fgsm", "pgd", "pgd-20", "pgd-20 (seed=1)", "pgd-100"]
    assert sorted(set(ordered), key=natural) == ordered


def test_distances_may_rank() -> None:
    columns = (*COLUMNS[:2], replace(COLUMNS[2], role="distance"))
    rows = row(1, float("inf")), row(2, 0.5)
    good = Table(name="t", title="T", caption="c", columns=columns, rows=rows, ranked_by="worst")
    assert good.ranked_by == "worst"
    with pytest.raises(ValueError, match="do not follow"):
        replace(good, rows=good.rows[::-1])

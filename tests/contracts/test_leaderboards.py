"""What every leaderboard keeps, whatever it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import (
    CERTIFIED_RADIUS,
    card,
    certificate_spec,
    first_of,
    put,
    put_certificate,
    put_minimum_norm,
    put_timing,
    put_transfer,
    spec,
)

from robench.catalog import LeaderboardEntry, plugins
from robench.store import Results, Store, file_name
from robench.tables import Cell, Table


@pytest.fixture(params=plugins("leaderboards"))
def entry(request: pytest.FixtureRequest) -> LeaderboardEntry:
    found = plugins("leaderboards")[request.param].load()
    assert isinstance(found, LeaderboardEntry)
    return found


def results(folder: Path, *, backwards: bool = False) -> Results:
    """Three models under two attacks: one complete, one lacks an attack, of one an attack failed.

    All were attacked at a second epsilon.
    Two of them were looked at for minimum norms, too, and shown to each other's images at two epsilons.
    """
    store = Store(folder / "reports")
    for model, start in {"a": 0.1, "b": 0.2}.items():
        put_minimum_norm(store, spec(model, "ddn", threat="L2@0.5"), [start + i / 100 for i in range(50)])
    for epsilon in ("0.1", "0.2"):
        for source in "ab":
            made_on = spec(source, "pgd-40", threat=f"Linf@{epsilon}")
            for target, robust in {"a": 40, "b": 20}.items():
                if (source, target) != ("b", "a") or epsilon == "0.1":
                    put_transfer(store, made_on, spec(target).model, first_of(50, robust))
    for model, robust in {"a": 30, "b": 20, "c": 40}.items():
        put(store, spec(model, "fgsm"), first_of(50, robust + 5))
        if model != "b":
            put(store, spec(model, "pgd-20"), first_of(50, robust), failed=model == "c")
        put(store, spec(model, "fgsm", threat="Linf@0.1"), first_of(50, robust + 8))
    for model, factor in {"a": 1.0, "b": 0.5}.items():
        put_certificate(store, certificate_spec(model), [factor * r for r in CERTIFIED_RADIUS])
    put_certificate(store, certificate_spec("a", "smoothed-prediction"), [0.0] * 10)
    for model, copies in (("a", 1), ("a", 100), ("b", 1)):
        put_timing(store, model, copies=copies, median=0.01 * copies)
    cards = {"a": card(folder / "zoo" / "a", "a")}
    found = store.results(cards)
    way = slice(None, None, -1 if backwards else 1)
    return Results(
        found.records[way], cards, found.outcomes, found.transfers[way], found.certificates[way], found.timings[way]
    )


def test_nothing_makes_no_table(entry: LeaderboardEntry, tmp_path: Path) -> None:
    assert entry.build(Store(tmp_path).results({})) == []


def test_tables_have_names_of_their_own_that_are_safe_as_files(entry: LeaderboardEntry, tmp_path: Path) -> None:
    tables: list[Table] = entry.build(results(tmp_path))
    assert tables
    names = [table.name for table in tables]
    assert names == [file_name(name) for name in names]
    assert len(set(names)) == len(names)
    assert all(name == entry.name or name.startswith(f"{entry.name}-") for name in names)


def test_every_number_says_what_it_is_of(entry: LeaderboardEntry, tmp_path: Path) -> None:
    found = results(tmp_path)
    files = {stored.path for stored in (*found.records, *found.transfers, *found.certificates, *found.timings)}
    for table in entry.build(found):
        assert all(column.description and column.title for column in table.columns)
        for column in table.columns:
            for cell in table.column(column.key):
                assert cell.model is None or cell.model in found.cards
                assert cell.record is None or cell.record in files
                if column.role == "accuracy" and cell.value is not None:
                    assert_accuracy(cell)
        for figure in table.figures:
            for cell in (cell for cells in getattr(figure, "cells", ()) for cell in cells):
                if cell.value is not None:
                    assert_accuracy(cell)


def assert_accuracy(cell: Cell) -> None:
    assert isinstance(cell.value, float)
    assert 0 <= cell.low <= cell.value <= cell.high <= 1
    assert cell.n


def test_the_order_of_the_records_does_not_matter(entry: LeaderboardEntry, tmp_path: Path) -> None:
    forwards, backwards = (entry.build(results(tmp_path, backwards=b)) for b in (False, True))
    assert forwards == backwards

"""Matrices of who is fooled by whose images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import card, first_of, put_transfer, sha, spec

from robench.errors import UnsafeFile
from robench.leaderboards.transfer import transfer
from robench.store import Results, Store, StoredCard
from robench.tables import Grid, Table

CLEAN = first_of(50, 48)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def tables(store: Store, cards: dict[str, StoredCard] | None = None) -> list[Table]:
    return transfer(store.results(cards or {}))


def values(table: Table, key: str) -> list[object]:
    return [cell.value for cell in table.column(key)]


def fill(store: Store, robust: dict[tuple[str, str], np.ndarray], **changes: object) -> None:
    for (target, source), mask in robust.items():
        put_transfer(store, spec(source, "pgd-40", **changes), spec(target).model, mask & CLEAN, clean=CLEAN)


def test_rows_are_targets_and_columns_sources(store: Store) -> None:
    random = np.random.default_rng(5)
    masks = {(t, s): random.random(50) < 0.7 for t in "abc" for s in "abc"}
    fill(store, masks)
    (table,) = tables(store)
    assert table.name == "transfer-mnist-linf-0.3-pgd"
    order = values(table, "model")
    assert [column.key for column in table.columns[4:]] == [f"on {name}" for name in order], "the diagonal is white-box"
    for target in "abc":
        row = table.rows[order.index(target)]
        assert row[3].value == 0.96
        for source, cell in zip(order, row[4:], strict=True):
            assert cell.value == (masks[target, source] & CLEAN).mean()
            assert cell.note == ("white-box" if source == target else None)
            assert cell.record is not None
            assert cell.record.parent.name == target
        # Brute force: one image after the other.
        expected = sum(CLEAN[i] and all(masks[target, s][i] for s in "abc") for i in range(50)) / 50
        assert row[2].value == expected
    (grid,) = table.figures
    assert isinstance(grid, Grid)
    assert grid.heat
    assert grid.columns == ("clean", *order)
    assert [[cell.value for cell in cells] for cells in grid.cells] == [
        [c.value for c in row[3:]] for row in table.rows
    ]


def test_a_missing_entry_unranks(store: Store) -> None:
    fill(store, {("a", "a"): first_of(50, 9), ("a", "b"): first_of(50, 30), ("b", "b"): first_of(50, 40)})
    (table,) = tables(store)
    assert values(table, "model") == ["a", "b"]
    assert values(table, "rank") == [1, None]
    assert [cell.note for cell in table.column("rank")] == [None, "not ranked: without the images of a"]
    assert [cell.note for cell in table.column("on a")] == ["white-box", "not evaluated"]
    assert [cell.note for cell in table.column("worst_case")] == [None, "over 1 of 2 sources"]


def test_attacks_thresholds_and_examples_have_matrices_of_their_own(store: Store) -> None:
    entry = {("a", "a"): first_of(50, 9)}
    fill(store, entry)
    fill(store, entry, seed=1)
    fill(store, entry, threat="L2@2")
    put_transfer(store, spec("a", "fgsm"), spec("a").model, first_of(50, 20))
    put_transfer(store, spec("a", "pgd-40", count=20, split_size=50), spec("a").model, first_of(20, 7))
    found = tables(store)
    names = [table.name for table in found]
    assert len(set(names)) == len(names) == 5
    assert sorted(name for name in names if name.count("-") == 4) == [
        "transfer-mnist-l2-2-pgd",
        "transfer-mnist-linf-0.3-fgsm",
    ]
    assert sum(name.startswith("transfer-mnist-linf-0.3-pgd-") for name in names) == 3
    assert any("pgd-40 (seed=1)" in table.caption for table in found)


def test_several_epsilons_make_an_average(store: Store) -> None:
    standing = {"0.1": 40, "0.3": 20}
    for epsilon, count in standing.items():
        fill(store, {(t, s): first_of(50, count + (t == "b")) for t in "ab" for s in "ab"}, threat=f"Linf@{epsilon}")
    fill(store, {("c", "c"): first_of(50, 9)}, threat="Linf@0.3")
    average = next(table for table in tables(store) if "average" in table.name)
    assert average.name == "transfer-mnist-linf-average-0.3-pgd"
    assert values(average, "model") == ["b", "a"], "c was not there at every epsilon"
    # Trapezoids by hand: 0 to 0.1 from 48 to 40 images, 0.1 to 0.3 from 40 to 20.
    expected = (0.1 * (48 + 40) / 2 + 0.2 * (40 + 20) / 2) / 0.3 / 50
    cell = list(average.column("on b"))[1]
    assert cell.value == pytest.approx(expected)
    near, far = first_of(50, 40).astype(int), first_of(50, 20).astype(int)
    per_image = (0.1 * (CLEAN + near) / 2 + 0.2 * (near + far) / 2) / 0.3
    half = 1.959964 * np.std(per_image, ddof=1) / 50**0.5
    assert (cell.low, cell.high) == pytest.approx((expected - half, expected + half))
    assert cell.record is None
    assert "measured at 0.1, 0.3" in average.caption


def test_a_retrained_twin_is_marked(store: Store, tmp_path: Path) -> None:
    fill(store, {(t, s): first_of(50, 9) for t in "ab" for s in "abc"})
    cards = {}
    for seed, name in enumerate("abc"):
        stored = card(tmp_path / name, name)
        recipe = {**(stored.card.recipe or {}), "seed": seed, **({"epochs": 9} if name == "c" else {})}
        cards[name] = StoredCard(stored.folder, stored.card.model_copy(update={"recipe": recipe}))
    (table,) = tables(store, cards)
    notes = {
        (row[1].value, column.key[-1]): cell.note
        for row in table.rows
        for column, cell in list(zip(table.columns, row, strict=True))[4:]
    }
    twin = "retrained: the same recipe, another seed"
    assert notes == {
        ("a", "a"): "white-box",
        ("a", "b"): twin,
        ("a", "c"): None,
        ("b", "a"): twin,
        ("b", "b"): "white-box",
        ("b", "c"): None,
    }


def test_weights_of_one_name_are_told_apart(store: Store) -> None:
    put_transfer(store, spec("a", "pgd-40"), spec("a").model, first_of(50, 9))
    put_transfer(store, spec("a", "pgd-40", weights="former"), spec("a").model, first_of(50, 20))
    (table,) = tables(store)
    assert values(table, "model") == [f"a (weights {sha('weights of a')[:8]})"]
    assert {column.key for column in table.columns[4:]} == {
        f"on a (weights {sha(weights)[:8]})" for weights in ("weights of a", "former")
    }


def test_rows_of_other_examples_are_refused(store: Store) -> None:
    fill(store, {("a", s): first_of(50, 9) for s in "ab"})
    written = store.results({})
    shifted = replace(
        written,
        outcomes=lambda r: {
            **written.outcomes(r),
            "example_id": written.outcomes(r)["example_id"] + (r.spec.source.model.id == "b"),
        },
    )
    with pytest.raises(UnsafeFile, match="outcomes hold different ones"):
        transfer(shifted)
    assert transfer(Results((), {}, written.outcomes)) == []

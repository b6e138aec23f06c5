"""How far the nearest adversarial examples are, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import first_of, put, put_minimum_norm, spec

from robench.errors import UnsafeFile
from robench.leaderboards.minimum_norm import minimum_norm
from robench.statistics import median_ranks
from robench.store import Store
from robench.tables import Curves, Table

INF = math.inf


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def tables(store: Store) -> list[Table]:
    return minimum_norm(store.results({}))


def cells(table: Table, model: str) -> dict[str, object]:
    row = next(row for row in table.rows if row[1].value == model)
    return {column.key: cell for column, cell in zip(table.columns, row, strict=True)}


def test_statistics_by_hand(store: Store) -> None:
    # Ten images: nine attacked (the last is wrong without an attack), two of them never broken.
    reach = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, INF, INF, 0.0]
    put_minimum_norm(store, spec("a", "ddn", threat="Linf@0.3", count=10), reach, clean=first_of(10, 9))
    (table,) = tables(store)
    assert table.name == "minimum-norm-mnist-linf"
    found = cells(table, "a")
    assert found["median"].value == 0.5
    assert (found["median"].low, found["median"].high) == (0.2, INF)
    assert median_ranks(9) == (1, 7)
    assert found["mean_found"].value == pytest.approx(0.4)
    assert found["mean_found"].n == 7
    assert found["mean_all"].value == pytest.approx(0.28), "failures and wrong images count 0"
    assert found["relative"].value == pytest.approx(0.4)
    assert (found["found"].value, found["found"].n) == (7 / 9, 9)
    assert found["clean"].value == 0.9
    assert found["ddn median"].record is not None


def test_the_nearest_of_all_attacks_ranks(store: Store) -> None:
    near, far = np.linspace(0.1, 0.5, 50), np.linspace(0.1, 0.5, 50)[::-1]
    for attack, reach in (("ddn", near), ("fab", far)):
        put_minimum_norm(store, spec("both", attack), reach)
        put_minimum_norm(store, spec("far", attack), reach + 0.01)
    put_minimum_norm(store, spec("one", "ddn"), near + 1)
    (table,) = tables(store)
    assert [row[1].value for row in table.rows] == ["far", "both", "one"]
    assert [row[0].value for row in table.rows] == [1, 2, None]
    assert table.rows[2][0].note == "not ranked: without fab"
    both = cells(table, "both")
    assert both["median"].value == pytest.approx(np.median(np.minimum(near, far)))
    assert both["ddn median"].value == both["fab median"].value == pytest.approx(np.median(near))
    assert both["median"].value < both["ddn median"].value
    assert cells(table, "one")["fab median"].note == "not evaluated"


def test_half_unbroken_is_infinitely_far_and_equals_share_a_rank(store: Store) -> None:
    for model, count in {"a": 25, "b": 10, "c": 26}.items():
        reach = np.where(first_of(50, count), 0.1, INF)
        put_minimum_norm(store, spec(model, "ddn"), reach)
    (table,) = tables(store)
    found = [(row[0].value, row[1].value, row[2].value) for row in table.rows]
    assert found == [(1, "a", INF), (1, "b", INF), (3, "c", 0.1)]


def test_a_model_that_is_always_wrong_has_no_distances(store: Store) -> None:
    put_minimum_norm(store, spec("a", "ddn"), np.zeros(50), clean=first_of(50, 0))
    put_minimum_norm(store, spec("b", "ddn"), np.full(50, INF))
    (table,) = tables(store)
    assert cells(table, "a")["found"].value is None
    assert cells(table, "a")["rank"].note == "not ranked: right on no image"
    assert cells(table, "b")["mean_found"].value is None
    assert cells(table, "b")["found"].value == 0.0


def test_epsilons_share_a_row_and_norms_do_not(store: Store) -> None:
    reach = np.linspace(0.1, 0.5, 50)
    for threat, length in (("Linf@0.3", reach), ("Linf@0.1", reach), ("L2@0.5", 10 * reach)):
        put_minimum_norm(store, spec("a", "ddn", threat=threat), length)
    put(store, spec("a", "pgd-20"), first_of(50, 20))
    linf, l2 = sorted(tables(store), key=lambda table: table.name, reverse=True)
    assert (linf.name, l2.name) == ("minimum-norm-mnist-linf", "minimum-norm-mnist-l2")
    assert len(linf.rows) == len(l2.rows) == 1
    assert cells(l2, "a")["median"].value == pytest.approx(10 * cells(linf, "a")["median"].value)
    assert not any("pgd" in column.key for column in linf.columns), "an attack on a ball says nothing of distances"


def test_curves_say_what_falls_within_each_distance(store: Store) -> None:
    reach = np.array([*np.linspace(0.1, 0.4, 40), *[INF] * 5, *[0.0] * 5])
    put_minimum_norm(store, spec("a", "ddn"), reach, clean=first_of(50, 45))
    put_minimum_norm(store, spec("a", "fab"), np.where(np.isfinite(reach), reach + 0.1, INF), clean=first_of(50, 45))
    (table,) = tables(store)
    together, ddn, fab = table.figures
    assert isinstance(together, Curves)
    (curve,) = together.curves
    assert curve.n == 45
    for x, y in zip(curve.x, curve.y, strict=True):
        assert y == pytest.approx((reach[:45] <= x).sum() / 45)
    assert curve.y[-1] == pytest.approx(40 / 45)
    assert (ddn.curves[0].x, ddn.curves[0].y) == (curve.x, curve.y)
    assert fab.curves[0].x[1:] == pytest.approx([x + 0.1 for x in curve.x[1:]])
    assert fab.x_end == pytest.approx(np.quantile(reach[:40] + 0.1, 0.99))


def test_rows_of_other_examples_are_refused(store: Store) -> None:
    for attack in ("ddn", "fab"):
        put_minimum_norm(store, spec("a", attack), np.full(50, 0.1))
    written = store.results({})
    shifted = replace(
        written,
        outcomes=lambda r: {
            **written.outcomes(r),
            "example_id": written.outcomes(r)["example_id"] + (r.spec.attack.name == "fab"),
        },
    )
    with pytest.raises(UnsafeFile, match="outcomes hold different ones"):
        minimum_norm(shifted)

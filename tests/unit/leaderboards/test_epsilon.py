"""Accuracy over epsilon: averages by hand, ranks, and what lacks an epsilon."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import first_of, put, put_minimum_norm, spec

from robench.leaderboards.epsilon import over_epsilon
from robench.leaderboards.robustness import robustness
from robench.records import AttackIdentity
from robench.store import Store
from robench.tables import Curves


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def test_the_average_is_the_area_under_the_curve(store: Store) -> None:
    for model, right in {"a": (40, 20), "b": (30, 28)}.items():
        for epsilon, robust in zip(("0.1", "0.3"), right, strict=True):
            put(store, spec(model, threat=f"Linf@{epsilon}"), first_of(50, robust), clean=first_of(50, 45))
    put(store, spec("c", threat="Linf@0.1"), first_of(50, 50))
    put(store, spec("a", "fgsm", threat="Linf@0.1"), first_of(50, 50))
    (table,) = over_epsilon(store.results({}))
    assert table.name == "epsilon-mnist-linf-pgd-20"
    rows = {row[1].value: row for row in table.rows}
    # From 0 to 0.1 and from 0.1 to 0.3, trapezoids over a width of 0.3.
    assert rows["a"][2].value == pytest.approx((0.1 * (0.9 + 0.8) / 2 + 0.2 * (0.8 + 0.4) / 2) / 0.3)
    assert rows["b"][2].value == pytest.approx((0.1 * (0.9 + 0.6) / 2 + 0.2 * (0.6 + 0.56) / 2) / 0.3)
    assert [row[1].value for row in table.rows] == ["a", "b", "c"]
    assert [row[0].value for row in table.rows] == [1, 2, None]
    assert rows["c"][0].note == "not ranked: without epsilon 0.3"
    assert (rows["c"][2].value, rows["c"][2].note) == (None, "not at every epsilon")
    assert [curve.title for curve in table.figures[0].curves] == ["a", "b"]
    assert [cell.value for cell in rows["b"][4:]] == [0.6, 0.56]
    (figure,) = table.figures
    assert isinstance(figure, Curves)
    assert figure.linear
    assert (figure.curves[0].x, figure.curves[0].y) == ((0.0, 0.1, 0.3), (0.9, 0.8, 0.4))


def test_one_epsilon_and_minimum_norms_have_no_curve(store: Store) -> None:
    put(store, spec("a"), first_of(50, 20))
    for epsilon in ("0.1", "0.3"):
        put_minimum_norm(store, spec("a", "ddn", threat=f"Linf@{epsilon}"), [0.1] * 50)
    assert over_epsilon(store.results({})) == []


def test_attacks_of_one_name_have_tables_of_their_own(store: Store) -> None:
    for steps in (10, 20):
        for epsilon in ("0.1", "0.3"):
            put(store, spec("a", threat=f"Linf@{epsilon}", parameters={"steps": steps}), first_of(50, steps))
    tables = over_epsilon(store.results({}))
    assert len({table.name for table in tables}) == 2
    assert {table.title.rpartition(" ")[2] for table in tables} == {"(steps=10)", "(steps=20)"}


def test_noise_of_several_decay_lengths_has_a_curve(store: Store) -> None:
    for model, loss in {"a": 1, "b": 3}.items():
        for length in (1, 8, 16):
            question = spec(model, f"lrc-noise-{length}")
            attack = AttackIdentity(
                name=f"lrc-noise-{length}", entry="lrc-noise", version=1, parameters={"decay_length": float(length)}
            )
            put(store, question.model_copy(update={"attack": attack}), first_of(50, 48 - loss * length))
    (table,) = robustness(store.results({}))
    (curves,) = (figure for figure in table.figures if figure.name == "decay-length")
    assert [curve.title for curve in curves.curves] == ["a", "b"]
    assert curves.curves[0].x == (1.0, 8.0, 16.0)
    assert curves.curves[0].y == (0.94, 0.8, 0.64)

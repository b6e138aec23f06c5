"""Sequential evaluations have tables of their own; what was stopped before its end never counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import card, first_of, put, record, rows, spec

from robench.confidence_sequences import bounds
from robench.errors import UnsafeFile
from robench.leaderboards.robustness import robustness
from robench.records import ConfidenceSequence, EvalSpec, Proportion
from robench.registry import read_cards
from robench.reporting import write_leaderboards
from robench.statistics import wilson
from robench.store import Store, outcome_sha256
from robench.tables import Table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def put_sequential(store: Store, question: EvalSpec, robust: np.ndarray, *, until: float = 0.3) -> None:
    """Write the answer of a sequential evaluation that drew examples 0, 1, ... of 50."""
    question = question.model_copy(update={"until": until})
    outcomes = rows(robust)
    low, high = bounds(int(robust.sum()), len(robust), 50)
    sequence = ConfidenceSequence(level=0.95, width=until, low=low / 50, high=high / 50, of=50)
    store.write(record(question, outcomes).model_copy(update={"sequence": sequence}), outcomes)


def put_partial(store: Store, question: EvalSpec, robust: np.ndarray) -> None:
    outcomes = rows(robust)
    store.write(record(question, outcomes).model_copy(update={"status": "partial"}), outcomes)


def put_partial_without_answers(store: Store, question: EvalSpec) -> None:
    nothing = Proportion(successes=0, n=0, value=0.0, clopper_pearson=(0.0, 1.0), wilson=(0.0, 1.0))
    changes = {"status": "partial", "robust": nothing, "outcomes_sha256": outcome_sha256(rows([]))}
    store.write(record(question, rows([True])).model_copy(update=changes), rows([]))


def tables(store: Store) -> dict[str, Table]:
    return {table.name: table for table in robustness(store.results({}))}


def test_sequential_answers_never_share_a_table_with_full_ones(store: Store) -> None:
    put(store, spec("full"), first_of(50, 20))
    put_sequential(store, spec("quick"), first_of(30, 29))
    put_sequential(store, spec("quick"), first_of(40, 30), until=0.2)
    put_sequential(store, spec("quick", seed=3), first_of(35, 30))
    found = tables(store)
    assert sum(name == "robustness-mnist-linf-0.3" for name in found) == 1
    assert [cell.value for cell in found["robustness-mnist-linf-0.3"].column("model")] == ["full"]
    assert len(found) == 4
    assert "robustness-mnist-linf-0.3-until-0.2" in found
    (quick,) = found["robustness-mnist-linf-0.3-until-0.2"].column("pgd-20")
    low, high = bounds(30, 40, 50)
    assert (quick.value, quick.n, quick.note) == (0.75, 40, "40 of 50, sequential")
    assert (quick.low, quick.high) == (low / 50, high / 50)
    assert "until a 95 % interval is no wider than 20 %" in found["robustness-mnist-linf-0.3-until-0.2"].caption


def test_the_worst_case_is_of_the_examples_that_all_attacks_have(store: Store) -> None:
    put_sequential(store, spec("a", "fgsm"), first_of(30, 25))
    put_sequential(store, spec("a", "pgd-20"), ~first_of(40, 5))
    put_sequential(store, spec("b", "fgsm"), first_of(20, 18))
    put_sequential(store, spec("b", "pgd-20"), first_of(20, 18))
    (table,) = tables(store).values()
    assert [(c.value, c.n) for c in table.column("worst_case")] == [(18 / 20, 20), (20 / 30, 30)]
    worst = list(table.column("worst_case"))[1]
    low, high = bounds(20, 30, 50)
    assert (worst.low, worst.high) == (low / 50, high / 50)
    assert (worst.low, worst.high) != wilson(20, 30)
    assert [c.value for c in table.column("rank")] == [1, 2]
    assert [c.value for c in table.column("passes")] == pytest.approx([82, 82])


def test_rows_that_are_no_beginning_of_one_drawing_are_refused(store: Store) -> None:
    put_sequential(store, spec("a", "fgsm"), first_of(30, 25))
    put_sequential(store, spec("a", "pgd-20"), first_of(40, 25))
    results = store.results({})

    def shifted(answer):
        found = dict(results.outcomes(answer))
        return {**found, "example_id": found["example_id"] + 100 * (answer.spec.attack.name == "fgsm")}

    with pytest.raises(UnsafeFile, match="outcomes hold different ones"):
        robustness(type(results)(results.records, {}, shifted))


def test_a_partial_record_never_ranks_and_is_listed(store: Store) -> None:
    put(store, spec("full"), first_of(50, 20))
    put(store, spec("full", "fgsm"), first_of(50, 30))
    put(store, spec("stopped", "fgsm"), first_of(50, 45))
    put_partial(store, spec("stopped"), first_of(10, 10))
    (table,) = tables(store).values()
    assert [(r.value, m.value) for r, m in zip(table.column("rank"), table.column("model"), strict=True)] == [
        (1, "full"),
        (None, "stopped"),
    ]
    assert [cell.note for cell in table.column("pgd-20")] == [None, "stopped at 10"]
    (remark,) = table.remarks
    assert "stopped under pgd-20 was stopped after 10 of 50 images and does not count" in remark


def test_a_later_record_takes_the_place_of_a_partial_one(store: Store) -> None:
    put_partial(store, spec(), first_of(10, 5))
    put_partial(store, spec(), first_of(20, 9))
    (stored,) = store.records()
    assert (stored.path.name, stored.record.robust.n) == (f"{spec().identity}.partial.json", 20)
    put(store, spec(), first_of(30, 30), failed=True)
    assert [s.record.status for s in store.records()] == ["failed"]
    put_partial(store, spec(), first_of(20, 9))
    assert [s.record.status for s in store.records()] == ["partial"]
    put(store, spec(), first_of(50, 20))
    assert [s.record.status for s in store.records()] == ["complete"]
    assert len(list((store.root / "outcomes").iterdir())) == 1
    put_partial(store, spec(), first_of(20, 9))
    assert [s.record.status for s in store.records()] == ["complete"]
    assert len(list((store.root / "outcomes").iterdir())) == 1


def test_a_models_page_tells_them_apart(store: Store, tmp_path: Path) -> None:
    card(tmp_path / "zoo" / "a", "a")
    put_sequential(store, spec("a"), first_of(30, 20))
    put_partial(store, spec("a"), first_of(10, 5))
    put_partial_without_answers(store, spec("a", "fgsm"))
    write_leaderboards(["robustness"], store, read_cards([tmp_path / "zoo"]), tmp_path / "out")
    page = (tmp_path / "out" / "models" / "a.html").read_text(encoding="utf-8")
    low, high = bounds(20, 30, 50)
    assert f"{100 * low / 50:.1f}–{100 * high / 50:.1f}" in page
    assert "30 of 50, sequential" in page
    assert "stopped at 10" in page
    assert "stopped at 0" in page

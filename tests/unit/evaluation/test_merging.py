"""A record follows from the rows alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from robench.evaluation.merging import merge, sort_rows, total_cost
from robench.records import OUTCOME_TYPES, Cost, EvalRecord, Provenance, ShardError

COST = Cost(forward_passes=3, backward_passes=2, seconds=0.5)
MADE = Provenance(
    robench="0",
    code="c",
    torch="2",
    python="3",
    device="cpu",
    threads=1,
    command="robench",
    finished="2026-01-01",
)


def rows_of(robust, attacked, ids=None):
    count = len(robust)
    rows = {name: np.zeros(count, kind) for name, kind in OUTCOME_TYPES.items()}
    rows["example_id"] = np.arange(count) if ids is None else np.asarray(ids)
    rows["robust"], rows["attacked"] = np.asarray(robust), np.asarray(attacked)
    rows["broken"] = rows["attacked"] & ~rows["robust"]
    rows["clean_rank"] = np.where(attacked, 0, 7)
    rows["linf"] = np.arange(count) / 100
    return rows


def record_of(spec, rows, errors=(), num_classes=10):
    return merge(
        spec,
        rows,
        cost=COST,
        errors=errors,
        num_classes=num_classes,
        provenance=MADE,
        outcomes_sha256="0" * 64,
    )


@pytest.fixture
def spec(spec_of):
    found, _ = spec_of()
    return found.model_copy(update={"examples": found.examples.model_copy(update={"count": 6})})


ROBUST = np.array([True, False, True, False, False, True])
ATTACKED = np.array([True, True, True, False, True, True])


def test_shares_by_hand(spec):
    record = record_of(spec, rows_of(ROBUST, ATTACKED))
    assert (record.status, record.clean.successes, record.robust.successes) == ("complete", 5, 3)
    assert record.robust.value == 0.5
    assert record.robust.clopper_pearson == pytest.approx((beta.ppf(0.025, 3, 4), beta.ppf(0.975, 4, 3)))
    assert record.median_distance == pytest.approx(np.median([0.01, 0.04]))
    assert record.clean_top5 is None
    assert record_of(spec, rows_of(ROBUST, ATTACKED), num_classes=1000).clean_top5.successes == 5


def test_order_and_cut_do_not_matter(spec):
    rows = rows_of(ROBUST, ATTACKED)
    parts = [{n: v[i] for n, v in rows.items()} for i in ([5, 1], [0, 4], [3, 2])]
    assert record_of(spec, sort_rows(parts)) == record_of(spec, sort_rows(parts[::-1])) == record_of(spec, rows)


def test_missing_examples_and_errors_make_it_fail(spec):
    rows = rows_of(ROBUST, ATTACKED)
    assert record_of(spec, {n: v[:5] for n, v in rows.items()}).status == "failed"
    error = ShardError(first_id=0, count=1, kind="crash", message="x")
    assert record_of(spec, rows, errors=[error]).status == "failed"
    assert record_of(spec, sort_rows([]), errors=[error]).robust.n == 0


def test_an_example_that_came_twice_is_refused():
    rows = rows_of(ROBUST, ATTACKED)
    with pytest.raises(ValueError, match="twice"):
        sort_rows([rows, rows])


def test_costs_add_up():
    assert total_cost([COST, COST]) == Cost(forward_passes=6, backward_passes=4, seconds=1.0)


def test_a_record_comes_back_equal(spec):
    record = record_of(spec, rows_of(ROBUST, ATTACKED), errors=())
    assert EvalRecord.from_json(record.to_json(), origin="here") == record
    assert EvalRecord.from_json(record.to_json(), origin="here").spec.identity == spec.identity

"""Evaluations that stop early: where they stop depends on the question alone, and what they say holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from robench import catalog
from robench.confidence_sequences import RunningBounds, bounds
from robench.errors import EvaluationFailed
from robench.evaluation.campaign import Campaign, Execution
from robench.evaluation.deadline import Deadline, OutOfTime, Pace
from robench.evaluation.sampling import Sampling, drawing_order
from robench.store import Store
from tests.unit.evaluation.conftest import same
from tests.unit.evaluation.test_campaign import Watcher
from tests.unit.evaluation.test_merging import MADE

WIDTH = 0.25


@pytest.fixture
def campaign(model, images, tmp_path):
    def make(watcher=None, folder="reports", **options):
        execution = Execution(
            device=torch.device("cpu"), provenance=lambda: MADE, **({"batch_size": 64, "shard_size": 50} | options)
        )
        store = Store(tmp_path / folder)
        return Campaign(model, images, store=store, execution=execution, progress=watcher or Watcher())

    return make


@pytest.fixture
def question(spec_of):
    spec, ids = spec_of()
    return spec.model_copy(update={"until": WIDTH}), ids


def by_hand(store_of_all, spec, ids):
    """Stop after every answer of a full evaluation; return how many it takes, and the bounds."""
    rows = store_of_all
    robust = dict(zip(rows["example_id"].tolist(), rows["robust"].tolist(), strict=True))
    running = RunningBounds(len(ids))
    for example in drawing_order(ids, spec.seed).tolist():
        running.add(robust[example])
        if running.width <= spec.until:
            break
    return running


def test_it_stops_where_a_full_evaluation_looked_at_in_order_would(campaign, question, spec_of):
    spec, ids = question
    full = campaign(folder="full")
    (whole,) = full.answer([spec_of()[0]], ids)
    expected = by_hand(full.store.outcomes(whole), spec, ids)
    sequential = campaign()
    (record,) = sequential.answer([spec], ids)
    assert (record.status, record.robust.n) == ("complete", expected.drawn)
    assert 50 < record.robust.n < len(ids), "the question is one that can stop early"
    assert record.robust.successes == expected.successes
    found = record.sequence
    assert (found.level, found.width, found.of) == (0.95, WIDTH, len(ids))
    assert (found.low, found.high) == (expected.low / len(ids), expected.high / len(ids))
    assert found.low <= whole.robust.value <= found.high
    assert bounds(expected.successes, expected.drawn, len(ids))[0] <= expected.low
    rows, all_rows = sequential.store.outcomes(record), full.store.outcomes(whole)
    drawn = np.isin(all_rows["example_id"], drawing_order(ids, spec.seed)[: expected.drawn])
    assert all(same(rows[name], all_rows[name][drawn], name) for name in rows)
    assert sequential.store.find(spec) == record
    assert sequential.store.find(spec_of()[0]) is None, "it is another question"


@pytest.mark.parametrize("cut", [{"shard_size": 7, "batch_size": 5}, {"shard_size": 250}, {"batch_size": 1}])
def test_shards_and_batches_do_not_move_the_stop(campaign, question, cut):
    spec, ids = question
    (expected,) = campaign(folder="usual").answer([spec], ids)
    (record,) = campaign(**cut).answer([spec], ids)
    facts = ("status", "robust", "clean", "sequence", "median_distance")
    assert [getattr(record, f) for f in facts] == [getattr(expected, f) for f in facts]


def backwards(task, items):
    """Answer all shards, the last one first."""
    return (task(shard) for shard in reversed(list(items)))


def test_answers_in_any_order_give_the_same_stop(question, campaign, spec_of):
    """Many workers return shards as they like: here the last first, and some of them never needed."""
    spec, ids = question
    (expected,) = campaign(folder="usual").answer([spec], ids)
    (record,) = campaign(executor=backwards, shard_size=20).answer([spec], ids)
    assert (record.robust, record.sequence) == (expected.robust, expected.sequence)


def test_interrupted_and_resumed_stops_at_the_same_example(campaign, question):
    spec, ids = question
    (expected,) = campaign(folder="straight").answer([spec], ids)
    with pytest.raises(KeyboardInterrupt):
        campaign(Watcher(patience=2), shard_size=20).answer([spec], ids)
    watcher = Watcher()
    resumed = campaign(watcher)
    (record,) = resumed.answer([spec], ids)
    assert watcher.begun == [40]
    assert (record.robust, record.sequence) == (expected.robust, expected.sequence)
    assert not list((resumed.store.root / ".work").glob("*.parquet"))


def test_few_answers_are_computed_that_do_not_count(campaign, question):
    watcher = Watcher()
    spec, ids = question
    (record,) = campaign(watcher).answer([spec], ids)
    assert record.robust.n <= watcher.computed <= record.robust.n + 32


def test_a_narrow_interval_takes_all_examples_and_is_exact(campaign, question):
    spec, ids = question
    spec = spec.model_copy(update={"until": 1e-9})
    (record,) = campaign().answer([spec], ids)
    assert (record.status, record.robust.n) == ("complete", len(ids))
    assert record.sequence.low == record.sequence.high == record.robust.value


def test_an_attack_that_crashes_before_the_stop_fails_and_one_beyond_it_does_not(campaign, question, monkeypatch):
    spec, ids = question
    (expected,) = campaign(folder="usual").answer([spec], ids)
    order = drawing_order(ids, spec.seed)
    plugin = catalog.find("attacks", "pgd")
    pgd = plugin.load().attack
    bad = []

    def crash_on_some(model, images, labels, *, random, **options):
        if np.isin(random.ids.numpy(), bad).any():
            raise ZeroDivisionError("on purpose")
        return pgd(model, images, labels, random=random, **options)

    entry = dataclasses.replace(plugin.load(), attack=crash_on_some)
    monkeypatch.setattr(catalog.Plugin, "load", lambda self: entry)
    bad[:] = order[expected.robust.n + 40 :]
    (record,) = campaign(folder="beyond", shard_size=10).answer([spec], ids)
    assert (record.status, record.robust) == ("complete", expected.robust)
    (record,) = campaign(folder="backwards", shard_size=10, executor=backwards).answer([spec], ids)
    assert (record.status, record.robust, record.errors) == ("complete", expected.robust, ())
    bad[:] = order[5:15]
    failing = campaign(folder="before", shard_size=10)
    with pytest.raises(EvaluationFailed, match="on purpose"):
        failing.answer([spec], ids)
    (stored,) = failing.store.records()
    assert (stored.record.status, failing.store.find(spec)) == ("failed", None)


def test_only_the_adversarials_that_count_are_saved(campaign, question):
    spec, ids = question
    saving = campaign(save_adversarials=True)
    (record,) = saving.answer([spec], ids)
    saved = load_file(saving.store.root / "adversarials" / f"{spec.identity}.safetensors")
    assert np.array_equal(saved["example_ids"], saving.store.outcomes(record)["example_id"])


def test_the_order_is_random_is_the_seeds_and_is_for_ever():
    ids = np.arange(0, 20_000, 2)
    order = drawing_order(ids, 0)
    assert np.array_equal(np.sort(order), ids)
    assert np.array_equal(drawing_order(ids[::-1], 0), order)
    assert (drawing_order(ids, 1) != order).mean() > 0.99
    # No trend: the correlation of place and id of a random order has standard deviation 1 / sqrt(n).
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4 / np.sqrt(len(order))
    assert drawing_order(np.arange(10), 0).tolist() == FROZEN


FROZEN = [9, 8, 7, 6, 4, 0, 2, 3, 5, 1]


def test_the_guarantee_holds_through_the_engine(question):
    """Coverage of the record's interval over seeds, that is over orders, for answers that are given."""
    spec, ids = question
    robust = np.isin(ids, np.random.default_rng(0).permutation(ids)[:110])
    missed, stops = 0, []
    for seed in range(400):
        sampling = Sampling(spec.model_copy(update={"seed": seed, "until": 0.2}), ids)
        for shard in sampling.shards(50):
            sampling.learn({"example_id": shard.ids, "robust": robust[shard.ids]})
        missed += not sampling.sequence.low <= robust.mean() <= sampling.sequence.high
        stops.append(len(sampling.drawn))
    assert missed / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert 60 < np.mean(stops) < 200


class Clock:
    """A clock that moves when it is told to, and by `tick` whenever it is looked at."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


class Timekeeper(Watcher):
    """Lets time pass with every example that was answered."""

    def __init__(self, clock, seconds=0.1):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def advance(self, spec, *, examples, robust):
        super().advance(spec, examples=examples, robust=robust)
        self.clock.now += self.seconds * examples


def limited(seconds, clock):
    deadline = Deadline(seconds, clock=clock)
    deadline.start()
    return deadline


def test_what_was_answered_in_time_is_a_partial_record_that_is_gone_on_with(campaign, spec_of):
    spec, ids = spec_of()
    other, _ = spec_of(attack="fgsm")
    clock = Clock()
    stopped = campaign(Timekeeper(clock), deadline=limited(10, clock))
    (record,) = stopped.answer([spec, other], ids)
    assert (record.status, record.robust.n, record.errors) == ("partial", 100, ())
    assert 0 < record.robust.successes < 100
    assert stopped.store.find(spec) is None
    (stored,) = stopped.store.records()
    assert stored.record == record
    assert stored.path.name == f"{spec.identity}.partial.json"
    drawn = np.sort(drawing_order(ids, spec.seed)[:100])
    assert np.array_equal(stopped.store.outcomes(record)["example_id"], drawn), "a random sample, not the first ones"

    watcher = Watcher()
    (complete,) = campaign(watcher).answer([spec], ids)
    assert (watcher.begun, watcher.computed) == ([100], 150)
    straight = campaign(folder="straight")
    (expected,) = straight.answer([spec], ids)
    assert complete.robust == expected.robust
    rows, expected_rows = stopped.store.outcomes(complete), straight.store.outcomes(expected)
    assert all(same(rows[name], expected_rows[name], name) for name in rows)
    assert [s.record.status for s in stopped.store.records()] == ["complete"]
    assert len(list((stopped.store.root / "outcomes").iterdir())) == 1


def test_a_sequential_evaluation_that_runs_out_of_time_says_what_it_knows(campaign, question):
    spec, ids = question
    clock = Clock()
    (partial,) = campaign(Timekeeper(clock), shard_size=20, deadline=limited(5, clock)).answer([spec], ids)
    assert (partial.status, partial.robust.n) == ("partial", 60)
    assert partial.sequence.high - partial.sequence.low > WIDTH
    (complete,) = campaign().answer([spec], ids)
    (expected,) = campaign(folder="straight").answer([spec], ids)
    assert (complete.status, complete.robust, complete.sequence) == ("complete", expected.robust, expected.sequence)


def test_time_enough_changes_nothing(campaign, spec_of):
    spec, ids = spec_of()
    (record,) = campaign(deadline=limited(1e6, Clock())).answer([spec], ids)
    (expected,) = campaign(folder="straight").answer([spec], ids)
    assert (record.status, record.robust) == ("complete", expected.robust)


def test_an_attack_is_ended_in_the_middle_of_a_batch(campaign, spec_of):
    """Time passes inside the attack: the batch that is under way is given up, those before it count."""
    spec, ids = spec_of(attack="pgd-100:stop_when_broken=false")
    clock = Clock(tick=0.001)
    some = campaign(deadline=limited(0.45, clock))
    (record,) = some.answer([spec], ids)
    assert record.status == "partial"
    assert record.robust.n == 9, "one; two, which the rest of the time is for; six"
    assert clock.now < 0.5
    # Not even one image: nothing is written, and the question is left.
    clock, watcher = Clock(tick=0.001), Watcher()
    none = campaign(watcher, folder="none", deadline=limited(0.05, clock))
    assert none.answer([spec], ids) == []
    assert (watcher.abandoned, watcher.known, list(none.store.records())) == ([spec], [], [])
    assert clock.now < 0.06
    assert 30 < none.execution.deadline.passes < 60
    assert none.execution.deadline.answered == 0
    (complete,) = campaign().answer([spec], ids)
    assert (complete.status, complete.robust.n) == ("complete", 250)


def test_time_for_one_image_at_a_time_gets_to_the_end(campaign, spec_of):
    """A time in which eight images are never finished is used for fewer: every command leaves more answers."""
    spec, ids = spec_of(attack="pgd-100:stop_when_broken=false")
    answered = []
    for _ in range(4):
        clock = Clock(tick=0.001)
        (record,) = campaign(deadline=limited(0.15, clock)).answer([spec], ids)
        answered.append(record.robust.n)
    assert answered == [1, 2, 3, 4]


class Diary(Watcher):
    """Notes what happens in which order."""

    def __init__(self):
        super().__init__()
        self.events = []

    def begin(self, spec, *, done):
        self.events.append("begin " + spec.attack.entry)

    def probe(self, spec, *, examples):
        self.events.append("probe")

    def end(self, record, path, *, known):
        self.events.append("end " + record.spec.attack.entry)


def test_probes_have_what_the_questions_leave_of_the_time_and_end_with_it(campaign, spec_of):
    (spec, ids), (other, _) = spec_of(), spec_of(attack="fgsm")
    usual = Diary()
    (expected, *_) = campaign(usual, folder="usual").answer([spec, other], ids)
    assert usual.events == ["begin pgd", "probe", "end pgd", "begin fgsm", "end fgsm"]
    ample = Diary()
    (record, *_) = campaign(ample, folder="ample", deadline=limited(1e6, Clock())).answer([spec, other], ids)
    assert ample.events == ["begin pgd", "begin fgsm", "probe", "end pgd", "end fgsm"]
    assert record.diagnostics == expected.diagnostics

    scarce, clock = Diary(), Clock(tick=0.001)
    records = campaign(scarce, folder="scarce", deadline=limited(0.5, clock)).answer([spec, other], ids)
    assert scarce.events == ample.events
    assert clock.now < 0.51, "the probes, which take several times as long, were cut off"
    assert [r.status for r in records] == ["complete", "complete"]
    for made in records:
        *looked_at, eight_bit = made.diagnostics
        assert {d.verdict for d in looked_at} == {"not applicable"}
        assert {d.evidence for d in looked_at} == {"not examined: the 0.5 seconds are over"}
        assert eight_bit.verdict == "ok", "the rows are enough for this"
    assert not list((campaign(folder="scarce").store.root / ".work").glob("findings-*")), "it is looked at another time"


@pytest.mark.usefixtures("nearest")
def test_with_a_time_limit_too_one_search_serves_every_epsilon(campaign, spec_of):
    questions = [spec_of("nearest", f"Linf@{epsilon}") for epsilon in ("0.05", "0.1")]
    watcher = Watcher()
    records = campaign(watcher, deadline=limited(1e6, Clock())).answer([q[0] for q in questions], questions[0][1])
    assert (watcher.computed, [r.status for r in records]) == (250, ["complete", "complete"])


def test_batches_grow_and_then_fit_the_time_that_is_left():
    clock = Clock()
    pace = Pace(limited(100, clock))
    sizes = []
    while size := pace.largest(64):
        sizes.append(size)
        pace.begin()
        clock.now += 0.5 * size
        pace.end(size)
    assert sizes[:4] == [1, 4, 16, 64]
    assert sizes[4:] == sorted(sizes[4:], reverse=True)
    assert 180 < sum(sizes) <= 200, "nearly all of the time is used, and no more"
    assert pace.deadline.passed, "what is left is too short for anything"


def test_the_time_runs_from_the_start_on():
    clock = Clock()
    deadline = Deadline(2, clock=clock)
    clock.now = 100
    assert not deadline.passed
    deadline.start()
    clock.now = 101
    deadline.start()
    assert deadline.remaining == 1
    clock.now = 102
    with pytest.raises(OutOfTime, match="2 seconds"):
        deadline.check()

"""Each verdict from hand-made outcomes, and each way of tampering with the line that says so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robench.errors import UserError
from robench.gate import baseline as baselines
from robench.gate import rendering
from robench.gate.metrics import Metric
from robench.gate.verdicts import Rules, Verdict, judged, paired
from robench.records import Decision
from tests import synthetic
from tests.unit.gate.conftest import standing


def kinds(found):
    return {v.metric: v.kind for v in found.verdicts}


def only(found, kind):
    """The lines of the failing verdicts, which are all of that kind."""
    assert not found.passes
    failing = [v for v in found.verdicts if not v.passes]
    assert {v.kind for v in failing} == {kind}, [rendering.line(v) for v in failing]
    return "\n".join(rendering.line(v) for v in failing)


def test_the_same_weights_are_the_same(bench):
    bench.put(standing(1000, 800))
    bench.set()
    found = bench.check()
    assert found.passes
    assert kinds(found) == {"clean": "same", "pgd-20": "same"}


def test_worse_needs_a_clear_and_a_large_loss(bench):
    bench.put(standing(1000, 800))
    bench.set()
    bench.put(standing(1000, 760), "new")
    found = bench.check()
    assert kinds(found) == {"clean": "same", "pgd-20": "worse"}
    assert [v.lost.tolist() for v in found.verdicts if v.kind == "worse"] == [list(range(760, 800))]
    assert "80.0 % -> 76.0 % (-4.00 [" in only(found, "worse")
    assert bench.check(tolerance=4.0).passes, "the tolerance is not exceeded"
    assert not bench.check(tolerance=3.9).passes


def test_a_large_loss_that_may_be_chance_passes_with_a_remark(bench):
    bench.put(standing(50, 40))
    bench.set()
    bench.put(standing(50, 38), "new")
    found = bench.check()
    assert found.passes
    assert "4.0 points less may be chance on 50 examples; evaluate more to know" in rendering.markdown(found)


def test_losses_and_gains_that_cancel_are_no_change(bench):
    bench.put(standing(1000, 800))
    bench.set()
    bench.put(standing(1000, 800, start=100), "new")
    assert bench.check().passes


def test_better_passes_and_is_told(bench):
    bench.put(standing(1000, 760))
    bench.set()
    bench.put(standing(1000, 800), "new")
    found = bench.check()
    assert found.passes
    assert kinds(found)["pgd-20"] == "better"


def test_the_worst_case_can_fail_alone(bench):
    bench.put(standing(1000, 900))
    bench.put(standing(1000, 900), attack="fgsm")
    bench.set()
    bench.put(standing(1000, 900), "new")
    bench.put(standing(1000, 900, start=100), "new", attack="fgsm")
    found = bench.check()
    assert kinds(found) == {
        "clean": "same",
        "pgd-20": "same",
        "fgsm": "same",
        "worst case under Linf@0.3": "worse",
    }


def test_clean_accuracy_is_checked_once(bench):
    bench.put(standing(1000, 600))
    bench.put(standing(1000, 600), attack="fgsm")
    bench.set()
    clean = standing(1000, 950)
    bench.put(standing(1000, 600), "new", clean=clean)
    bench.put(standing(1000, 600), "new", clean=clean, attack="fgsm")
    found = bench.check()
    assert [v.metric for v in found.verdicts].count("clean") == 1
    assert kinds(found)["clean"] == "worse"


def test_the_worst_case_says_of_which_predictions_it_is(bench):
    for attack in ("pgd-20", "fgsm"):
        for top_k in (1, 2):
            question = bench.spec(attack=attack, count=100).model_copy(update={"decision": Decision(top_k=top_k)})
            synthetic.put(bench.store, question, standing(100, 80))
    bench.old = [stored.record for stored in bench.store.records()]
    bench.set()
    rows = {(v.question, v.metric) for v in checked(bench, "old").verdicts}
    worst = {asked for asked, metric in rows if metric == "worst case under Linf@0.3"}
    assert worst == {asked for asked, metric in rows if metric == "clean"}
    assert {asked.partition("mnist")[2] for asked in worst} == {"", ", top_k 2"}


def test_distances_are_compared_by_ranks(bench):
    reach = np.linspace(0.4, 0.6, 200)
    synthetic.put_minimum_norm(bench.store, bench.spec(count=200, attack="ddn-100"), reach)
    bench.old = [s.record for s in bench.store.records()]
    bench.set()
    for factor, kind in ((0.8, "worse"), (0.995, "same"), (1.3, "better")):
        place = bench.store.record_path(bench.spec("new", count=200, attack="ddn-100")).parent
        for path in place.glob("*.json"):
            if path.stem != bench.old[0].spec.identity:
                path.unlink()
        synthetic.put_minimum_norm(bench.store, bench.spec("new", count=200, attack="ddn-100"), factor * reach)
        bench.problems = {}
        found = checked(bench, "new", count=200)
        assert kinds(found)["ddn-100 median Linf distance"] == kind, factor


def checked(bench, weights, **rules):
    """A check whose new weights are told instead of guessed by date."""
    from robench.gate.verdicts import Candidates, check

    known = baselines.read(bench.path)
    identity = bench.spec(weights).model
    candidates = Candidates(bench.store, bench.place, {"m:factory": "m:factory"}, {"m:factory": identity}, {})
    rules.pop("count", None)
    return check(known, bench.path, candidates, Rules(**rules))


def test_certified_radii_are_compared(bench):
    radius = np.linspace(0.0, 1.0, 10)
    spec = synthetic.certificate_spec("m:factory")
    old = synthetic.put_certificate(bench.store, spec, radius, [1] * 10)
    bench.old = [old]
    bench.set()
    new_model = bench.spec("new").model
    synthetic.put_certificate(bench.store, spec.model_copy(update={"model": new_model}), radius * 0.5, [1] * 10)
    found = checked(bench, "new", alpha=0.05)
    assert kinds(found)["cohen average radius"] == "worse"
    assert kinds(found)["cohen certified at 0.25"] == "same", "ten examples do not tell"
    assert "cohen certified at 2" not in kinds(found), "nobody reaches that far"


def test_missing_answers_fail(bench):
    bench.put(standing(100, 80))
    bench.set()
    said = only(checked(bench, "new"), "missing")
    assert "was not asked: pgd-20 under Linf@0.3, 100 test images of mnist" in said
    assert "robench check --measure" in said


def test_failed_and_partial_answers_fail(bench):
    bench.put(standing(100, 80))
    bench.put(standing(100, 80), attack="fgsm")
    bench.set()
    bench.put(standing(100, 80), "new", failed=True)
    bench.put(standing(30, 30), "new", attack="fgsm", count=100, status="partial")
    said = only(bench.check(), "missing")
    assert "failed (crash: RuntimeError: no gradient); put that right and run it again" in said
    assert "stopped at 30 of 100 examples; run it again to the end" in said


def test_fewer_examples_than_planned_fail(bench):
    bench.put(standing(1000, 800), split_size=5000)
    bench.set()
    bench.put(standing(500, 500), "new", split_size=5000)
    assert "500 examples were evaluated, fewer than the 1,000 of the baseline" in only(bench.check(), "not comparable")


def test_another_question_is_not_comparable(bench):
    bench.put(standing(100, 80))
    bench.set()
    bench.put(standing(100, 99), "new", parameters={**synthetic.PGD, "steps": 10})
    said = only(bench.check(), "not comparable")
    assert "attack.parameters.steps is 10, was 20" in said
    assert "robench baseline set" in said


def test_a_missing_baseline_record_is_damage(bench):
    answer = bench.put(standing(100, 80))
    bench.set()
    bench.store.record_path(answer.spec).unlink()
    assert "is missing; restore it from version control" in only(bench.check(), "damaged")


def test_a_tampered_baseline_record_is_damage(bench):
    answer = bench.put(standing(100, 80))
    bench.set()
    path = bench.store.record_path(answer.spec)
    path.write_text(path.read_text().replace('"value": 0.8', '"value": 0.7'))
    assert "was changed since the baseline was set" in only(bench.check(), "damaged")


@pytest.mark.parametrize("side", ["old", "new"])
def test_truncated_rows_are_damage(bench, side):
    answers = {"old": bench.put(standing(100, 80))}
    bench.set()
    answers["new"] = bench.put(standing(100, 80), "new")
    rows = bench.store.outcomes_path(answers[side])
    rows.write_bytes(rows.read_bytes()[:-100])
    said = only(bench.check(), "damaged")
    assert "does not match its record's outcomes_sha256" in said
    assert "restore it" in said


def test_a_new_record_that_says_more_than_its_rows_is_damage(bench):
    bench.put(standing(100, 80))
    bench.set()
    answer = bench.put(standing(100, 20), "new")
    path = bench.store.record_path(answer.spec)
    content = json.loads(path.read_text())
    content["robust"] |= {"successes": 90, "value": 0.9}
    path.write_text(json.dumps(content))
    assert "it says 90 of 100, its rows say 20 of 100" in only(bench.check(), "damaged")


def test_a_record_from_a_newer_robench_is_damage(bench):
    bench.put(standing(100, 80))
    bench.set()
    answer = bench.put(standing(100, 80), "new")
    path = bench.store.record_path(answer.spec)
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 9', 1))
    said = only(bench.check(), "damaged")
    assert "has schema version 9" in said
    assert "upgrade robench" in said


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ('"pgd-20" = 0.8', '"pgd-20" = 0.7', "pgd-20 = 0.7, but its rows give 0.8"),
        ("examples = 100", "examples = 10", "examples = 10, but the record says 100"),
        ('"pgd-20" = 0.8\n', "", "pgd-20 = nothing"),
    ],
)
def test_a_baseline_that_was_edited_is_damage(bench, before, after, what):
    bench.put(standing(100, 80))
    bench.set()
    text = bench.path.read_text()
    assert before in text
    bench.path.write_text(text.replace(before, after))
    assert what in only(bench.check(), "damaged")


def test_a_baseline_is_read_as_it_was_written(bench):
    reach = np.where(np.arange(20) < 12, np.inf, 0.1)
    synthetic.put_minimum_norm(bench.store, bench.spec(count=20, attack="ddn-100"), reach)
    bench.old = [s.record for s in bench.store.records()]
    made = bench.set()
    assert made.entries[0].values["ddn-100 median Linf distance"] == np.inf
    assert baselines.read(bench.path).to_toml() == bench.path.read_text()
    assert bench.check().passes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "is no TOML"),
        ("schema_version = 1\nentries = []", "names no answers"),
        ("schema_version = 7\nentries = []", "has schema version 7"),
        ("schema_version = 1\nwhat = 1\nentries = []", "is no valid Baseline: what"),
        (
            "schema_version = 1",
            "is no valid Baseline: entries: Field required; restore it, or run robench baseline set again",
        ),
        ("schema_version = 0\nentries = []", "reads 1; restore it, or run robench baseline set again"),
        ("schema_version = 2026-01-01\nentries = []", "schema_version = 2026-01-01 is no whole number; restore it"),
        ("schema_version = 1\nentries = 2026-01-01", "is no valid Baseline: entries: .*; restore it, or run robench"),
    ],
)
def test_a_baseline_that_is_none(bench, text, said):
    bench.path.write_text(text)
    with pytest.raises(UserError, match=said):
        baselines.read(bench.path)


def test_no_baseline_names_the_command(bench):
    with pytest.raises(UserError, match="make one: robench baseline set"):
        baselines.read(bench.path)


# The engine gate: the same weights, other answers.


@pytest.fixture
def engine(bench):
    """New answers of the same weights, in another folder."""
    from dataclasses import replace

    from robench.gate.verdicts import Candidates, check
    from robench.store import Store

    fresh = replace(bench, store=Store(bench.store.root.parent / "fresh"), old=[])

    def run(**rules):
        known = baselines.read(bench.path)
        candidates = Candidates(fresh.store, bench.place, {"m:factory": "m:factory"}, {}, {})
        return check(known, bench.path, candidates, Rules(gate="engine", **{"tolerance": 0.0, **rules}))

    fresh.run = run
    return fresh


def test_a_weaker_attack_fails_the_engine_gate(bench, engine):
    bench.put(standing(1000, 500))
    bench.set()
    engine.put(standing(1000, 508))
    assert "the attack got weaker on frozen weights" in only(engine.run(), "worse")


def test_rounding_passes_the_engine_gate(bench, engine):
    bench.put(standing(1000, 500))
    bench.set()
    engine.put(standing(1000, 502))
    assert engine.run().passes


def test_a_stronger_attack_passes_with_a_remark(bench, engine):
    bench.put(standing(1000, 500))
    bench.set()
    engine.put(standing(1000, 450))
    found = engine.run()
    assert found.passes
    assert kinds(found)["pgd-20"] == "better"
    assert "raise its version" in rendering.github(found)


def test_clean_accuracy_must_not_move_either_way(bench, engine):
    bench.put(standing(1000, 500), clean=standing(1000, 900))
    bench.set()
    engine.put(standing(1000, 500), clean=standing(1000, 900, start=10))
    assert "preprocessing" in only(engine.run(), "worse")


def test_longer_distances_fail_the_engine_gate_and_rounding_does_not(bench, engine):
    reach = np.linspace(0.4, 0.6, 200)
    spec = bench.spec(count=200, attack="ddn-100")
    synthetic.put_minimum_norm(bench.store, spec, reach)
    bench.old = [s.record for s in bench.store.records()]
    bench.set()
    synthetic.put_minimum_norm(engine.store, spec, reach * 1.0001)
    assert engine.run().passes
    engine.store.record_path(spec).unlink()
    synthetic.put_minimum_norm(engine.store, spec, reach * 1.05)
    assert "the attack got weaker" in only(engine.run(), "worse")


def test_certificates_must_not_move_on_frozen_weights(bench, engine):
    spec = synthetic.certificate_spec("m:factory")
    bench.old = [synthetic.put_certificate(bench.store, spec, np.linspace(0.1, 1.0, 10), [1] * 10)]
    bench.set()
    synthetic.put_certificate(engine.store, spec, np.linspace(0.1, 1.0, 10) * 1.1, [1] * 10)
    assert "the certificate moved" in only(engine.run(), "worse")


# Error rates of the whole gate.


def gate_fails(random, n, *, lose, gain, attacks=3):
    """Draw the answers of two models on n examples to several attacks, which share most of what happens."""
    pairs = []
    ids = np.arange(n)
    fate = random.random(n)
    for k in range(attacks):
        own = np.where(random.random(n) < 0.2, random.random(n), fate)
        before = (own < 0.8) | (own > 1 - gain)
        lost, gained = own < lose, own > 1 - gain
        old, new = before & ~gained, (before & ~lost) | gained
        pairs.append([Metric(f"attack {k}", "share", "attack", ids, side) for side in (old, new)])
    rules = Rules()
    spec = synthetic.spec(count=n)
    found = judged([paired(old, new, "m", spec, asked="", rules=rules) for old, new in pairs], rules)
    return any(not v.passes for v in found)


def test_without_a_change_the_gate_fails_at_most_alpha_of_the_time():
    random = np.random.default_rng(0)
    # 500 examples, of which a tenth changes: chance alone often makes more than the tolerance of one point.
    failed = sum(gate_fails(random, 500, lose=0.05, gain=0.05) for _ in range(2000))
    assert failed <= 0.01 * 2000 + 3 * np.sqrt(20), failed


def test_two_points_less_on_ten_thousand_examples_are_caught():
    random = np.random.default_rng(1)
    caught = sum(gate_fails(random, 10_000, lose=0.04, gain=0.02) for _ in range(200))
    assert caught >= 0.95 * 200, caught


@pytest.mark.parametrize(("metrics", "kind"), [(1, "worse"), (4, "worse"), (20, "same")])
def test_many_metrics_need_more_evidence_each(metrics, kind):
    alike = [
        Verdict(model="m", question="q", metric=str(i), kind="same", before=0.8, now=0.7, n=100, p=0.002)
        for i in range(metrics)
    ]
    assert {v.kind for v in judged(alike, Rules(alpha=0.01))} == {kind}


def test_a_partial_answer_that_was_renamed_does_not_count(bench):
    bench.put(standing(100, 80))
    bench.set()
    answer = bench.put(standing(30, 30), "new", count=100, status="partial")
    complete = bench.store.record_path(answer.spec)
    complete.with_suffix(".partial.json").rename(complete)
    assert "stopped at 30 of 100 examples" in only(bench.check(), "missing")

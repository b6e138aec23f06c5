"""What is known is not computed again; what was begun goes on; what cannot be trusted is not written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from robench import catalog
from robench.errors import EvaluationFailed
from robench.evaluation.campaign import Campaign, Execution
from robench.findings import Findings
from robench.store import Store
from tests.unit.evaluation.conftest import same
from tests.unit.evaluation.test_merging import MADE


class Watcher:
    """Counts what is computed; interrupts after `patience` shards."""

    def __init__(self, patience=1000):
        self.patience, self.begun, self.computed, self.known, self.probed = patience, [], 0, [], []
        self.abandoned = []

    def begin(self, spec, *, done):
        self.begun.append(done)

    def advance(self, spec, *, examples, robust):
        self.computed += examples
        self.patience -= 1
        if self.patience == 0:
            raise KeyboardInterrupt

    def probe(self, spec, *, examples):
        self.probed.append(examples)

    def end(self, record, path, *, known):
        assert path.exists()
        self.known.append(known)

    def abandon(self, spec):
        self.abandoned.append(spec)


@pytest.fixture
def campaign(model, images, tmp_path):
    def make(watcher=None, folder="reports", **options):
        execution = Execution(
            device=torch.device("cpu"),
            provenance=lambda: MADE,
            **({"batch_size": 64, "shard_size": 50} | options),
        )
        store = Store(tmp_path / folder)
        return Campaign(model, images, store=store, execution=execution, progress=watcher or Watcher())

    return make


def same_outcomes(a, b):
    return all(same(a[name], b[name], name) for name in a)


def test_a_known_question_is_not_computed_again(campaign, spec_of):
    spec, ids = spec_of()
    first, second = Watcher(), Watcher()
    (made,) = campaign(first).answer([spec], ids)
    (known,) = campaign(second).answer([spec], ids)
    assert (first.computed, second.computed) == (len(ids), 0)
    assert known == made
    assert second.known == [True]
    assert 0 < made.robust.successes < made.clean.successes == 225
    assert made.cost.backward_passes > made.clean.successes


def test_interrupted_and_resumed_equals_straight_through(campaign, spec_of):
    spec, ids = spec_of()
    straight = campaign(folder="straight")
    (expected,) = straight.answer([spec], ids)
    with pytest.raises(KeyboardInterrupt):
        campaign(Watcher(patience=2)).answer([spec], ids)
    watcher = Watcher()
    resumed = campaign(watcher, batch_size=16, shard_size=33)
    (record,) = resumed.answer([spec], ids)
    assert watcher.begun == [100]
    assert watcher.computed == 150
    assert record.robust == expected.robust
    assert same_outcomes(resumed.store.outcomes(record), straight.store.outcomes(expected))
    assert abs(record.cost.backward_passes - expected.cost.backward_passes) <= 0.01 * expected.cost.backward_passes
    assert not list((resumed.store.root / ".work").glob("*.parquet")), "the journal goes when the record stands"


def test_a_failed_evaluation_keeps_what_succeeded_and_never_ranks(campaign, spec_of, monkeypatch):
    spec, ids = spec_of()
    plugin = catalog.find("attacks", "pgd")
    pgd = plugin.load().attack

    def crash_on_some(model, images, labels, *, random, **options):
        if (random.ids == 121).any():
            raise ZeroDivisionError("on purpose")
        return pgd(model, images, labels, random=random, **options)

    with monkeypatch.context() as patch:
        entry = dataclasses.replace(plugin.load(), attack=crash_on_some)
        patch.setattr(catalog.Plugin, "load", lambda self: entry)
        failing = campaign()
        with pytest.raises(EvaluationFailed, match=r"pgd-10 on m: crash: ZeroDivisionError: on purpose"):
            failing.answer([spec], ids)
    (stored,) = failing.store.records()
    assert stored.record.status == "failed"
    assert stored.record.robust.n == 200
    assert failing.store.find(spec) is None
    # The cause removed, the same question is asked again: only the shard that failed is computed.
    watcher = Watcher()
    (record,) = campaign(watcher).answer([spec], ids)
    assert (watcher.computed, record.status, record.robust.n) == (50, "complete", 250)
    assert len(list(failing.store.records())) == 1


def test_saved_adversarials_are_those_of_the_outcomes(campaign, spec_of, images, model):
    spec, ids = spec_of(precision="fp32")
    with pytest.raises(KeyboardInterrupt):
        campaign(Watcher(patience=2), save_adversarials=True).answer([spec], ids)
    saving = campaign(save_adversarials=True)
    (record,) = saving.answer([spec], ids)
    saved = load_file(saving.store.root / "adversarials" / f"{spec.identity}.safetensors")
    rows = saving.store.outcomes(record)
    assert (saved["example_ids"] == rows["example_id"]).all()
    clean = images.images.astype(np.float64) / 255
    assert np.abs(saved["adversarial_images"] - clean).max(axis=(1, 2, 3)) == pytest.approx(rows["linf"], abs=1e-6)
    predictions = model(torch.from_numpy(saved["adversarial_images"])).argmax(1).numpy()
    assert (predictions == rows["adversarial_prediction"]).all()


def test_adversarials_of_a_known_record_are_made_only_if_it_is_reproduced(campaign, spec_of, images, model):
    spec, ids = spec_of(precision="fp32")
    plain = campaign()
    (record,) = plain.answer([spec], ids)
    campaign(save_adversarials=True).answer([spec], ids)
    path = plain.store.root / "adversarials" / f"{spec.identity}.safetensors"
    assert path.exists()
    path.unlink()
    other = Campaign(
        type(model)(model.network, input_shape=(1, 4, 4), num_classes=5),
        dataclasses.replace(images, images=255 - images.images),
        store=plain.store,
        execution=dataclasses.replace(plain.execution, save_adversarials=True),
        progress=Watcher(),
    )
    with pytest.raises(EvaluationFailed, match="other outcomes"):
        other.answer([spec], ids)
    assert not path.exists()
    assert plain.store.find(spec) == record


def test_the_probes_run_once_for_all_questions_and_survive_an_interruption(campaign, spec_of):
    (pgd, ids), (fgsm, _), (other, _) = spec_of(), spec_of("fgsm"), spec_of(threat="L2@0.1")
    first = Watcher()
    records = campaign(first).answer([pgd, fgsm, other], ids)
    assert first.probed == [50, 50], "once for each threat model"
    names = [diagnostic.name for diagnostic in records[0].diagnostics]
    assert names == [d.name for d in records[1].diagnostics]
    assert len(names) == len(set(names)) == 8
    assert {d.examples for d in records[0].diagnostics[:7] if d.verdict != "not applicable"} == {50}
    # A later command, and one whose probes were interrupted.
    second = Watcher()
    campaign(second).answer([spec_of("pgd-20")[0]], ids)
    assert second.probed == []

    class Interrupted(Watcher):
        def probe(self, spec, *, examples):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        campaign(Interrupted(), folder="fresh").answer([pgd], ids)
    resumed = Watcher()
    (record,) = campaign(resumed, folder="fresh").answer([pgd], ids)
    assert (resumed.computed, resumed.probed) == (0, [50])
    assert record.diagnostics == records[0].diagnostics


def test_an_attack_is_compared_with_other_records_of_the_same_examples(campaign, spec_of, monkeypatch):
    """Steps that are too small leave much that PGD breaks, and the probes, which here break nothing, do not know."""
    (timid, ids), (pgd, _) = spec_of("pgd-10:step_size=0.0001"), spec_of("pgd-40")
    others = [spec_of("pgd-40", threat="Linf@0.2")[0], spec_of("pgd-10:step_size=0.0001", seed=1)[0]]

    def blind(worker, spec, ids):
        no = {"ce": (), "margin": ()}
        return Findings(ids=tuple(ids.tolist()), zero_gradients=no, unbroken_in_box=no)

    monkeypatch.setattr("robench.evaluation.campaign.probe", blind)

    def verdict_after(*first, folder):
        campaign(folder=folder).answer(first, ids)
        (record,) = campaign(folder=folder).answer([timid], ids)
        return {d.name: d for d in record.diagnostics}["ce-above-worst"]

    assert verdict_after(folder="alone").verdict == "ok"
    assert verdict_after(*others, folder="elsewhere").verdict == "ok"
    found = verdict_after(*others, pgd, folder="beside")
    assert (found.verdict, found.stronger) == ("flag", "pgd-40")
    (path,) = (campaign(folder="beside").store.root / "outcomes").glob(f"{pgd.identity}-*")
    path.unlink()
    again = campaign(folder="beside")
    again.store.record_path(timid).unlink()
    assert {d.name: d for d in again.answer([timid], ids)[0].diagnostics}["ce-above-worst"].verdict == "ok"


def test_damaged_findings_are_made_again(campaign, spec_of):
    spec, ids = spec_of()
    made = campaign()
    (record,) = made.answer([spec], ids)
    (path,) = (made.store.root / ".work").glob("findings-*.json")
    path.write_text("{")
    watcher = Watcher()
    (other,) = campaign(watcher).answer([spec_of("fgsm")[0]], ids)
    assert watcher.probed == [50]
    assert other.diagnostics[0].examples == record.diagnostics[0].examples == 50


def test_a_failed_evaluation_has_no_diagnostics(campaign, spec_of, monkeypatch):
    spec, ids = spec_of()

    def crash(*unused, **options):
        raise ZeroDivisionError("on purpose")

    entry = dataclasses.replace(catalog.find("attacks", "pgd").load(), attack=crash)
    monkeypatch.setattr(catalog.Plugin, "load", lambda self: entry)
    failing, watcher = campaign(), Watcher()
    failing.progress = watcher
    with pytest.raises(EvaluationFailed):
        failing.answer([spec], ids)
    (stored,) = failing.store.records()
    assert (stored.record.diagnostics, watcher.probed) == ((), [])

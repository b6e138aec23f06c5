"""A transfer matrix says what each model makes of images that were made on each."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from robench import planning
from robench.classifier import Classifier
from robench.datasets import select_examples
from robench.errors import EvaluationFailed, UnsafeFile
from robench.evaluation.adversarials import AdversarialFiles
from robench.evaluation.campaign import Campaign, Execution
from robench.evaluation.second_look import Bench
from robench.evaluation.transfer import fill_matrix
from robench.records import Configured, Decision, ModelIdentity, TransferSpec
from robench.store import Store
from robench.threat_model import ThreatModel
from tests.models import Linear, numbers
from tests.unit.evaluation.test_campaign import Watcher
from tests.unit.evaluation.test_merging import MADE

CPU = torch.device("cpu")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def models():
    """Three linear models that resemble each other."""
    made = {}
    for seed, name in enumerate(NAMES):
        network = Linear(5, 16, seed=10)
        with torch.no_grad():
            network.weight += 0.3 * numbers(5, 16, seed=20 + seed)
        made[name] = Classifier(network.eval(), input_shape=(1, 4, 4), num_classes=5)
    return made


@pytest.fixture(scope="module")
def problem(models, images):
    """The engine's images, labelled by the first model but for every eighth."""
    labels = models["a"](torch.from_numpy(images.images / 255)).argmax(1)
    labels[::8] = (labels[::8] + 1) % 5
    return dataclasses.replace(images, labels=labels.numpy())


class Laboratory:
    """Models, their evaluations with saved images, and how often a model was asked for."""

    def __init__(self, models, images, root):
        self.models, self.images, self.store = models, images, Store(root)
        self.examples, self.ids = select_examples(images, dataset="digits", split="test", count=None)
        self.loaded = []

    def identity(self, name):
        return ModelIdentity(id=name, weights_sha256=name * 64, architecture=Configured(name="linear"))

    def attacked(self, name, attack="pgd-10:stop_when_broken=false", **changes):
        request = planning.Request(
            self.identity(name),
            self.examples,
            [ThreatModel.parse(changes.pop("threat", "Linf@0.05"))],
            [attack],
            precision="fp64",
            **changes,
        )
        execution = Execution(
            device=CPU, provenance=lambda: MADE, batch_size=64, save_adversarials=True, attack_misclassified=True
        )
        runs = Campaign(self.models[name], self.images, store=self.store, execution=execution, progress=Watcher())
        (record,) = runs.answer(planning.plan(request), self.ids)
        return record

    def add(self, name, function):
        """Replace a model by any function from images to logits."""

        class Anything(torch.nn.Module):
            def forward(self, images):
                return function(images)

        classifier = Classifier(Anything().eval(), input_shape=(1, 4, 4), num_classes=5)
        self.models = {**self.models, name: classifier}

    def matrix(self, sources, targets=NAMES):
        def load(identity):
            self.loaded.append(identity.id)
            return self.models[identity.id]

        found = fill_matrix(
            sources,
            [self.identity(name) for name in targets],
            bench=Bench(load, CPU),
            images=self.images,
            store=self.store,
            provenance=lambda: MADE,
        )
        return {(r.spec.target.id, r.spec.source.model.id): r for r in found}


@pytest.fixture
def laboratory(models, problem, tmp_path):
    return Laboratory(models, problem, tmp_path)


def test_entries_are_what_brute_force_finds(laboratory):
    sources = [laboratory.attacked(name) for name in NAMES]
    matrix = laboratory.matrix(sources)
    assert set(matrix) == {(t, s) for t in NAMES for s in NAMES}
    labels = torch.from_numpy(laboratory.images.labels)
    clean = torch.from_numpy(laboratory.images.images / 255)
    for (target, source), record in matrix.items():
        made = next(s for s in sources if s.spec.model.id == source)
        path = AdversarialFiles(laboratory.store.root).path(made.spec)
        adversarial = torch.from_numpy(load_file(path)["adversarial_images"])
        answer = laboratory.models[target]
        before, after = answer(clean).argmax(1) == labels, answer(adversarial).argmax(1) == labels
        assert record.clean.successes == int(before.sum())
        assert record.robust.successes == int((before & after).sum())
        rows = laboratory.store.outcomes(record)
        assert (rows["robust"] == (before & after).numpy()).all()
        assert (rows["adversarial_prediction"] == answer(adversarial).argmax(1).numpy()).all()
        assert rows["linf"] == pytest.approx((adversarial - clean).abs().amax((1, 2, 3)).numpy())
        fell = (laboratory.models[source](clean).argmax(1) == labels) & before
        fell &= laboratory.models[source](adversarial).argmax(1) != labels
        assert (record.fooled.successes, record.fooled.n) == (int((fell & ~after).sum()), int(fell.sum()))
        assert record.spec.white_box == (target == source)


def test_the_diagonal_is_the_white_box_record(laboratory):
    sources = [laboratory.attacked(name) for name in NAMES]
    matrix = laboratory.matrix(sources)
    for source in sources:
        entry = matrix[source.spec.model.id, source.spec.model.id]
        assert (entry.clean, entry.robust) == (source.clean, source.robust)
        others = [matrix[t, source.spec.model.id].robust.value for t in NAMES if t != source.spec.model.id]
        assert entry.fooled.value == 1.0
        assert all(0 <= value <= 1 for value in others)


def test_examples_that_a_source_gets_wrong_are_attacked_too(laboratory):
    source = laboratory.attacked("a")
    rows = laboratory.store.outcomes(source)
    assert (~rows["attacked"]).sum() > 20
    (record,) = laboratory.matrix([source], ["b"]).values()
    shown = laboratory.store.outcomes(record)
    assert shown["linf"][~rows["attacked"]].min() > 0.04, "moved to the ball's boundary like all others"


def test_what_is_known_is_not_computed_again_and_a_model_can_be_added(laboratory):
    first = [laboratory.attacked(name) for name in "ab"]
    small = laboratory.matrix(first, "ab")
    assert laboratory.loaded == ["a", "b", "a", "b"], "first the sources' own look, then the targets', one at a time"
    laboratory.loaded.clear()
    assert laboratory.matrix(first, "ab") == small
    assert laboratory.loaded == []
    laboratory.matrix([*first, laboratory.attacked("c")])
    assert laboratory.loaded == ["a", "b", "c", "a", "b", "c"]
    files = list((laboratory.store.root / "transfers").rglob("*.json"))
    assert len(files) == 9


def test_no_target_sees_images_that_contradict_their_record(laboratory):
    source = laboratory.attacked("a")
    path = AdversarialFiles(laboratory.store.root).path(source.spec)
    tensors = load_file(path)
    rows = laboratory.store.outcomes(source)
    (row, *_) = np.flatnonzero(rows["broken"] & rows["attacked"])
    tensors["adversarial_images"][row] = laboratory.images.images[row] / 255
    facts = {"identity": source.spec.identity, "weights_sha256": "a" * 64, "misclassified": "attacked"}
    save_file(tensors, path, metadata=facts)
    with pytest.raises(UnsafeFile, match="1 of 250 images"):
        laboratory.matrix([source])
    assert laboratory.loaded == ["a"]
    assert not (laboratory.store.root / "transfers").exists()


def test_images_without_those_of_misclassified_examples_are_no_transfer(laboratory):
    source = laboratory.attacked("a")
    path = AdversarialFiles(laboratory.store.root).path(source.spec)
    clean, rows = laboratory.images.images / 255, laboratory.store.outcomes(source)
    tensors = load_file(path)
    tensors["adversarial_images"][~rows["attacked"]] = clean[~rows["attacked"]]
    facts = {"identity": source.spec.identity, "weights_sha256": "a" * 64, "misclassified": "left"}
    save_file(tensors, path, metadata=facts)
    with pytest.raises(ValueError, match="leaves examples alone"):
        laboratory.matrix([source])


def touched(images):
    """Tell of each image, `(N, 1)`, whether something was done to it: a file has whole grey levels only."""
    away = (images * 255 - (images * 255).round()).abs() > 0.01
    return away.flatten(1).any(1)[:, None]


def test_who_is_wrong_without_an_attack_is_not_robust_by_luck(laboratory):
    source = laboratory.attacked("a")
    always = torch.nn.functional.one_hot(torch.tensor([0, 1]), 5).double()
    laboratory.add("b", lambda images: torch.where(touched(images), always[0], always[1]))
    (record,) = laboratory.matrix([source], ["b"]).values()
    rows = laboratory.store.outcomes(record)
    lucky = (rows["clean_rank"] > 0) & (rows["adversarial_rank"] == 0)
    assert lucky.sum() > 20
    assert (record.robust.successes, rows["robust"].sum()) == (0, 0)


def test_a_target_that_gives_nan_has_no_entry(laboratory):
    source = laboratory.attacked("a")
    network = laboratory.models["b"].network
    laboratory.add("b", lambda images: torch.where(touched(images), torch.nan, network(images)))
    with pytest.raises(EvaluationFailed, match=r"b on images of a: .*NaN"):
        laboratory.matrix([source], ["b"])


def test_votes_are_the_source_s(laboratory):
    decision = Decision(votes=5, sigma=0.05)
    source = laboratory.attacked("a", decision=decision)
    matrix = laboratory.matrix([source], ["a", "b"])
    assert matrix["a", "a"].robust == source.robust
    rows = laboratory.store.outcomes(matrix["b", "a"])
    assert set(rows["forward_passes"]) == {10, 15}
    plain = laboratory.attacked("a")
    assert laboratory.matrix([plain], ["b"])["b", "a"].robust != matrix["b", "a"].robust


def test_a_record_comes_back_equal_and_every_part_names_it(laboratory):
    source = laboratory.attacked("a")
    (record,) = laboratory.matrix([source], ["b"]).values()
    spec = record.spec
    assert laboratory.store.find_transfer(spec) == record
    assert laboratory.store.transfer_path(spec).name == f"{spec.identity}.json"
    other = TransferSpec(source=spec.source.model_copy(update={"seed": 1}), target=spec.target)
    swapped = TransferSpec(source=spec.source, target=laboratory.identity("c"))
    assert len({spec.identity, other.identity, swapped.identity, source.spec.identity}) == 4
    assert laboratory.store.find_transfer(swapped) is None

"""What can be asked of another library is known before any work, and what it answers is judged like our own."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robench import backends, catalog, planning
from robench.backends import _running
from robench.classifier import Classifier
from robench.datasets import ArrayImages, select_examples
from robench.errors import UnknownName, UserError
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.leaderboards.robustness import attack_titles
from robench.random_streams import RandomStream
from robench.records import AttackIdentity, Configured, Decision, ModelIdentity
from robench.threat_model import ThreatModel
from tests.models import SmallNet, numbers, pictures

LINF = ThreatModel.parse("Linf@0.05")
FACTS = {
    "name": "mine",
    "version": 7,
    "distribution": "my-library",
    "precisions": ("fp32",),
    "offers": {
        "pgd": (
            {
                "norms": ("Linf",),
                "translated": ("steps", "step_size", "restarts", "start"),
                "fixed": {"loss": ("ce", "margin")},
                "notes": ("walks on",),
            },
            {"norms": ("Linf",), "translated": ("steps",), "fixed": {"stop_when_broken": (False,)}},
        )
    },
}


@pytest.fixture
def mine(monkeypatch):
    """A library whose answer is what the test says, `answers["mine"]`."""
    answers = {"mine": lambda model, images, labels, question: images}
    plugin = catalog.Plugin("backends", "mine", "mine", Path("mine.py"), FACTS)
    monkeypatch.setitem(catalog.plugins("backends"), "mine", plugin)
    load = catalog.Plugin.load

    def search(*given):
        return answers["mine"](*given)

    def loaded(self):
        return SimpleNamespace(search=search) if self.entry == "mine" else load(self)

    monkeypatch.setattr(catalog.Plugin, "load", loaded)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2" if name == "my-library" else version(name))
    return answers


@pytest.fixture(scope="module")
def images():
    model = SmallNet().eval().float()
    pixels = (numbers(40, 1, 4, 4) * 60 + 128).clamp(0, 255).to(torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    return ArrayImages(images=pixels.numpy(), labels=labels.numpy(), classes=tuple("abcde"), origin="test")


def plan(images, *, attack="pgd-10", threat=LINF, backend="mine", **changes):
    examples, ids = select_examples(images, dataset="digits", split="test", count=None)
    identity = ModelIdentity(id="m", weights_sha256="0" * 64, architecture=Configured(name="small"))
    request = planning.Request(identity, examples, [threat], [attack], backend=backend, **changes)
    return planning.plan(request)[0], ids


def evaluate(images, **changes):
    spec, ids = plan(images, **changes)
    model = Classifier(SmallNet().eval().float(), input_shape=(1, 4, 4), num_classes=5)
    worker = Worker(model, images, device=torch.device("cpu"), precision="fp32", batch_size=40, keep_adversarials=True)
    return worker(Shard(spec, ids))


def test_the_library_and_its_version_are_part_of_the_question(mine, images, monkeypatch):
    native, _ = plan(images, backend="native")
    spec, _ = plan(images)
    assert (spec.attack.name, spec.attack.version, spec.attack.backend) == ("pgd-10", 7, "mine 1.2")
    assert (spec.attack.library, spec.attack.title) == ("mine", "pgd-10 (mine)")
    assert spec.attack.parameters == native.attack.parameters
    assert (native.attack.backend, native.attack.title) == ("native", "pgd-10")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.3")
    newer, _ = plan(images)
    assert len({native.identity, spec.identity, newer.identity}) == 3
    titles = attack_titles([native, spec])
    assert sorted(titles.values()) == ["pgd-10", "pgd-10 (mine)"]
    assert sorted(attack_titles([spec, newer]).values()) == [
        "pgd-10 (mine) (backend=mine 1.2)",
        "pgd-10 (mine) (backend=mine 1.3)",
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"backend": "mein"}, "unknown backend 'mein'; did you mean 'mine'"),
        ({"attack": "fgsm"}, "backend mine has no attack fgsm; it has pgd"),
        ({"threat": ThreatModel.parse("L2@1")}, "has pgd for Linf only, not for L2$"),
        (
            {"attack": "pgd:loss=dlr"},
            "has pgd with loss=ce or loss=margin only, not with dlr, or with loss=ce only, not with dlr$",
        ),
        (
            {"attack": "pgd:stop_when_broken=false,restarts=2"},
            "with stop_when_broken=true only, not with false, or with restarts=1 only, not with 2$",
        ),
        ({"precision": "bf16"}, "searches in fp32 only, not in bf16"),
    ],
)
def test_what_a_library_cannot_do_is_said_when_planning(mine, images, changes, problem):
    with pytest.raises(UserError, match=problem) as caught:
        plan(images, **changes)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("decision", [Decision(top_k=2), Decision(votes=3), Decision(sigma=0.1)])
def test_a_library_knows_one_kind_of_decision(mine, images, decision):
    spec, _ = plan(images)
    with pytest.raises(UserError, match="top-1 decisions of one forward pass"):
        backends.check(spec.model_copy(update={"decision": decision}))
    native, _ = plan(images, backend="native")
    backends.check(native.model_copy(update={"decision": decision}))


def test_translated_parameters_take_any_value(mine, images):
    spec, _ = plan(images, attack="pgd:steps=3,step_size=0.01,restarts=4,start=image,loss=margin")
    assert spec.attack.parameters["restarts"] == 4


def test_an_attack_may_be_offered_in_several_forms(mine, images):
    spec, _ = plan(images, attack="pgd:steps=3,stop_when_broken=false")
    assert spec.attack.parameters["stop_when_broken"] is False


def test_an_absent_library_is_one_line_with_the_remedy(mine, images, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"^backend mine is not installed; pip install my-library$"):
        plan(images)


def test_another_version_does_not_answer_in_its_place(mine, images, monkeypatch):
    spec, _ = plan(images)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.3")
    with pytest.raises(UserError, match=r"backend mine 1\.2 is asked for, but mine 1\.3 is installed"):
        backends.attack_of(spec.attack, "Linf")


def test_an_unknown_backend_names_what_there_is():
    with pytest.raises(UnknownName, match="native"):
        backends.offers("none")


def test_the_library_is_asked_with_robenchs_parameters(mine, images):
    asked = []

    def search(model, images, labels, question):
        asked.append((len(images), question))
        return images

    mine["mine"] = search
    result = evaluate(images, attack="pgd-10:restarts=2")
    assert result.error is None
    ((count, question),) = asked
    assert count == 40
    assert (question.attack, str(question.threat)) == ("pgd", "Linf@0.05")
    assert question.parameters["restarts"] == 2
    assert question.parameters["steps"] == 10
    assert set(question.parameters) == set(result.shard.spec.attack.parameters)
    assert result.notes == {
        "mine walks on",
        "mine has no stop_when_broken of pgd, and goes without",
        "random numbers of mine, where it draws any, belong to the batch: another batch size may give other answers",
    }


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda images: (images + 0.06).clamp(0, 1), "outside-ball"),
        (lambda images: images + 0.2, "outside-box"),
        (lambda images: images * torch.nan, "not-a-number"),
        (lambda images: images[:1], "wrong-shape"),
        (lambda images: 1 / 0, "crash"),
    ],
)
def test_a_librarys_answer_is_believed_no_more_than_our_own(mine, images, answer, kind):
    mine["mine"] = lambda model, images, labels, question: answer(images)
    result = evaluate(images)
    assert result.error.kind == kind
    assert not result.rows


def test_success_is_judged_by_the_engine(mine, images):
    mine["mine"] = lambda model, images, labels, question: images
    assert evaluate(images).rows["robust"].all()


def test_rounding_at_the_edges_is_put_right_and_no_more():
    images = pictures(4).float()
    images[3] = 0.999
    threat = ThreatModel.parse("L2@0.5")
    direction = numbers(4, 1, 4, 4).float()
    direction[:3] /= direction[:3].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    far = torch.tensor([0.5 * (1 + 5e-6), 0.5 * (1 + 5e-5), 0.4]).view(-1, 1, 1, 1)
    found = images + torch.cat([direction[:3] * far, torch.full((1, 1, 4, 4), 0.001 + 4e-7)])
    settled = _running.in_ball(_running.in_box(found), images, threat)
    lengths = (settled - images).double().flatten(1).norm(dim=1)
    assert lengths[0] <= 0.5 * (1 + 1e-6)
    assert torch.equal(settled[1:3], found[1:3])
    assert float(settled[3].max()) == 1.0
    assert float(_running.in_box(images + 0.7).max()) > 1


def test_generators_are_seeded_by_the_examples_and_put_back(mine):
    drawn = []

    def search(model, images, labels, question):
        drawn.append((question.seed, float(torch.empty(1).uniform_()), float(np.random.random())))
        return images

    mine["mine"] = search
    identity = AttackIdentity(
        name="pgd",
        entry="pgd",
        version=7,
        parameters=catalog.find("attacks", "pgd").settings(),
        backend="mine 1.2",
    )
    attack = backends.attack_of(identity, "Linf")
    model, images, labels = SmallNet().eval(), pictures(3).float(), torch.zeros(3, dtype=torch.int64)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for seed, ids in ((0, [1, 2, 3]), (0, [3, 1, 2]), (1, [1, 2, 3]), (0, [1, 2, 4])):
        random = RandomStream(seed, torch.tensor(ids))
        attack(model, images, labels, threat=LINF, random=random, **identity.parameters)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert drawn[0] == drawn[1], "the order of the batch does not matter"
    assert len({seed for seed, _, _ in drawn}) == 3


def test_restarts_go_on_with_those_that_stand():
    model = SmallNet().eval().float()
    images = pictures(6).float()
    labels = model(images).argmax(1)
    labels[2] = (labels[2] + 1) % 5
    runs = []

    def once(model, images, labels, at_random):
        runs.append((len(images), at_random))
        return images

    _running.restarted(once, model, images, labels, parameters={"restarts": 3, "start": "image"})
    assert runs == [(6, False), (5, True), (5, True)]

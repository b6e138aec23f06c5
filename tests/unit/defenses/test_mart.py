"""MART: the loss and its gradients by an independent transcription, its limits, where its ascent goes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from robench.defenses import mart as module
from robench.defenses.mart import mart
from robench.defenses.trades import trades
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import ThreatModel
from robench.training.objective import build_objective
from tests.models import SmallNet, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def small_net():
    return SmallNet().double().train()


def call(model, threat=LINF, **options):
    images, labels, random = batch()
    return mart(model, images, labels, random=random, progress=0.0, threat=threat, **options)


def transcription(model, images, labels, adversarial, beta):
    """The paper's loss with numbers written out."""
    p, q = model(images).softmax(1), model(adversarial).softmax(1)
    total = 0.0
    for i, y in enumerate(labels.tolist()):
        other = max(q[i, j] for j in range(q.shape[1]) if j != y)
        divergence = sum(p[i, j] * (p[i, j] / q[i, j]).log() for j in range(p.shape[1]))
        total = total - q[i, y].log() - (1.0001 - other).log() + beta * divergence * (1 - p[i, y])
    return total / len(labels)


@each_threat
@pytest.mark.parametrize("options", [{}, {"start": "random", "attack_mode": "train"}], ids=str)
def test_loss_and_its_gradients_are_the_formula_at_what_the_ascent_found(threat, options):
    images, labels, _ = batch()
    model = small_net()
    twin = copy.deepcopy(model)
    loss = call(model, threat, beta=2.5, **options)
    loss.total.backward()
    assert torch.equal(loss.views["clean"].images, images)
    expected = transcription(twin, images, labels, loss.views["adversarial"].images, 2.5)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


def test_without_perturbation_nothing_diverges(monkeypatch):
    monkeypatch.setattr(module, "climbed", lambda _, images, *__, **___: images)
    loss, alone = call(small_net(), beta=7.0), call(small_net(), beta=0.0)
    assert loss.parts["divergence"].item() == 0
    assert loss.total.item() == alone.total.item() > 0


def test_a_label_that_is_certainly_another_has_a_finite_loss():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = module._boosted_cross_entropy(logits, torch.tensor([1]))
    assert loss.item() == pytest.approx(200 + 9.2103, rel=1e-3), "log 1e-4, to the rounding of 1.0001 in float32"
    loss.backward()
    assert logits.grad.isfinite().all()


def test_the_boosted_cross_entropy_looks_at_the_largest_other_probability():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]], dtype=torch.float64)
    loss = module._boosted_cross_entropy(probabilities.log(), torch.tensor([0, 0]))
    expected = [-math.log(0.7) - math.log(1.0001 - 0.2), -math.log(0.3) - math.log(1.0001 - 0.6)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


@each_threat
def test_the_inner_maximisation_climbs_the_cross_entropy_as_that_of_trades(threat, monkeypatch):
    """From the same start points, which the streams' names decide."""
    images, labels, random = batch()
    monkeypatch.setattr(RandomStream, "at", lambda self, *_: self)
    ours = call(small_net(), threat)
    theirs = trades(small_net(), images, labels, random=random, progress=0.0, threat=threat, inner="ce", start="noise")
    assert torch.equal(ours.views["adversarial"].images, theirs.views["adversarial"].images)
    before = nn.functional.cross_entropy(small_net().eval()(images), labels)
    after = nn.functional.cross_entropy(small_net().eval()(ours.views["adversarial"].images), labels)
    assert after > before + 0.05


def test_where_the_ascent_starts():
    images = batch()[0]
    noise, random = (
        (call(small_net(), steps=1, step_size=1e-9, **options).views["adversarial"].images - images).abs().max().item()
        for options in ({}, {"start": "random"})
    )
    assert 0.001 < noise < 0.006, "normal noise of standard deviation 0.001"
    assert 0.03 < random <= 0.05


@pytest.mark.parametrize(("attack_mode", "passes"), [("eval", 2), ("train", 5)])
def test_attack_mode_decides_whether_the_ascent_moves_running_statistics(attack_mode, passes):
    model = small_net()
    call(model, steps=3, attack_mode=attack_mode)
    assert model.features[1].num_batches_tracked.item() == passes


def recipe(**changes):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "mart"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": "Linf@0.1",
    }
    return parse_recipe({**values, **changes}, origin="test")


def test_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"defense mart trains against a threat model; add --set threat=Linf@8/255"):
        build_objective(recipe(threat=None))
    with pytest.raises(UserError, match=r"beta = -1.0: input should be greater than or equal to 0"):
        recipe(defense={"name": "mart", "parameters": {"beta": -1.0}})
    with pytest.raises(UserError, match=r"start = 'image'"):
        recipe(defense={"name": "mart", "parameters": {"start": "image"}})

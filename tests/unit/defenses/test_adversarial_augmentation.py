"""Adversarial augmentation: its images and its loss by independent transcriptions, its limits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from robench import catalog
from robench.defenses.adversarial_augmentation import AdversarialAugmentation
from robench.errors import UserError
from robench.lp_geometry import random_start
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import ThreatModel
from robench.training.objective import build_objective
from tests.models import SmallNet, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)
each_attack = pytest.mark.parametrize("attack", ["fgsm", "pgd"])


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def small_net():
    return SmallNet().double().train()


def call(model, threat=LINF, **options):
    images, labels, random = batch()
    return AdversarialAugmentation(**options)(model, images, labels, random=random, progress=0.5, threat=threat)


def length(slope, threat):
    """Return a gradient's direction of unit length in the threat's norm."""
    return slope.sign() if threat.norm == "Linf" else slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def into_ball(moved, images, threat):
    if threat.norm == "Linf":
        return (images + (moved - images).clamp(-threat.radius, threat.radius)).clamp(0, 1)
    delta = moved - images
    delta = delta * (threat.radius / delta.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)
    return (images + delta).clamp(0, 1)


def attacked(model, threat, *, attack, labels, start="random"):
    """FGSM, or four steps of PGD, in eval mode, written out."""
    images, _, random = batch()
    model = copy.deepcopy(model).eval()
    current = images
    if attack == "pgd" and start == "random":
        current = random_start(images, threat, random.at("adversarial_augmentation").at("restart", 0))
    for _ in range(1 if attack == "fgsm" else 4):
        current = current.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(current), labels, reduction="sum"), current)
        step = threat.radius if attack == "fgsm" else 0.02
        current = into_ball(current.detach() + step * length(slope, threat), images, threat)
    return current


@each_threat
@each_attack
@pytest.mark.parametrize("label", ["predicted", "true"])
def test_loss_and_gradients_are_the_mixture_at_the_images_against_that_label(attack, threat, label):
    images, labels, _ = batch()
    model = small_net()
    twin = copy.deepcopy(model)
    predicted = copy.deepcopy(model).eval()(images).argmax(1)
    assert (predicted != labels).any(), "else the labels would not matter"
    own = {} if attack == "fgsm" else {"steps": 4, "step_size": 0.02}
    loss = call(model, threat, attack=attack, share=0.3, attacked_label=label, **own)
    loss.total.backward()
    worst = attacked(twin, threat, attack=attack, labels=predicted if label == "predicted" else labels)
    assert torch.allclose(loss.views["adversarial"].images, worst, rtol=0, atol=1e-12)
    # The loss has the true label, whichever was attacked, and clean and adversarial images are batches of their own.
    expected = 0.7 * F.cross_entropy(twin(images), labels) + 0.3 * F.cross_entropy(twin(worst), labels)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@each_attack
def test_half_and_half_is_the_default_and_the_ends_are_one_of_both(attack):
    images, labels, _ = batch()
    half, clean, worst = (
        call(small_net(), attack=attack, **share).total.item() for share in ({}, {"share": 0.0}, {"share": 1.0})
    )
    assert half == pytest.approx((clean + worst) / 2, rel=1e-12)
    assert clean == pytest.approx(F.cross_entropy(small_net()(images), labels).item(), rel=1e-12)


def test_pgd_may_start_at_the_image():
    model = small_net()
    loss = call(model, start="image", steps=4, step_size=0.02, attacked_label="true")
    worst = attacked(small_net(), LINF, attack="pgd", labels=batch()[1], start="image")
    assert torch.allclose(loss.views["adversarial"].images, worst, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("attack_mode", "passes"), [("eval", 2), ("train", 2 + 1 + 3)])
def test_attack_mode_decides_whether_the_attack_moves_running_statistics(attack_mode, passes):
    model = small_net()
    call(model, steps=3, attack_mode=attack_mode)
    assert model.features[1].num_batches_tracked.item() == passes


def test_passes_are_those_of_attack_prediction_and_two_losses():
    for name, parameters, expected in (("fgsm_adv", {}, 4), ("pgd_adv", {"steps": 7}, 10)):
        plugin = catalog.find("defenses", name)
        assert plugin.training_passes(plugin.settings(parameters), classes=10) == expected


def recipe(**parameters):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "fgsm_adv", "parameters": parameters},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": "Linf@0.1",
    }
    return parse_recipe(values, origin="test")


def test_refuses_what_contradicts_itself():
    with pytest.raises(UserError, match=r"step_size = 0.1 belongs to attack=pgd, and attack is fgsm; take --set"):
        build_objective(recipe(step_size=0.1))
    with pytest.raises(UserError, match=r"start = image belongs to attack=pgd"):
        build_objective(recipe(start="image"))
    with pytest.raises(UserError, match=r"share = 1.5: input should be less than or equal to 1"):
        recipe(share=1.5)
    build_objective(recipe(attack="pgd", step_size=0.1, start="image"))

"""SmoothAdv: its direction and its loss by independent transcriptions, its limits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from robench.defenses import smooth_adv as module
from robench.defenses.smooth_adv import smooth_adv
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import ThreatModel
from robench.training.objective import build_objective
from tests.models import SmallNet, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_outer = pytest.mark.parametrize("outer", ["all", "one", "none"])


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def small_net():
    return SmallNet().double().train()


def call(model, threat=L2, *, progress=0.5, **options):
    images, labels, random = batch()
    return smooth_adv(model, images, labels, random=random, progress=progress, threat=threat, **options)


def watched(model, monkeypatch):
    """Return the model, and where it is evaluated with gradients to its weights."""
    seen = []
    original = model.forward

    def forward(images):
        if model.classify.weight.requires_grad:
            seen.append(images.detach().clone())
        return original(images)

    monkeypatch.setattr(model, "forward", forward)
    return seen


def noises(sigma, count):
    images, _, random = batch()
    stream = random.at("smooth_adv").at("noise")
    return [sigma * stream.at("copy", i).normal(images) for i in range(count)]


def perturbed(model, *, sigma, copies, steps, radius):
    """The authors' attack: unit steps of -log of the mean probability, clamped to the box, then shortened."""
    images, labels, _ = batch()
    model = copy.deepcopy(model).eval()
    delta = torch.zeros_like(images)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        mean = sum(model(images + delta + noise).softmax(1) for noise in noises(sigma, copies)) / copies
        loss = -torch.stack([mean[i, y].log() for i, y in enumerate(labels.tolist())]).sum()
        (slope,) = torch.autograd.grad(loss, delta)
        moved = delta + 2 * radius / steps * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (images + moved).clamp(0, 1) - images
        delta = moved * (radius / moved.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)
    return images + delta.detach()


@each_outer
@pytest.mark.parametrize("steps", [1, 4])
def test_loss_and_its_gradients_are_those_at_the_image_that_is_worst_for_the_averaged_probability(
    outer, steps, monkeypatch
):
    model, labels = small_net(), batch()[1]
    twin = copy.deepcopy(model)
    worst = perturbed(twin, sigma=0.2, copies=3, steps=steps, radius=0.3)
    seen = watched(model, monkeypatch)
    loss = call(model, sigma=0.2, copies=3, steps=steps, outer=outer)
    loss.total.backward()
    points = [worst] if outer == "none" else [worst + n for n in noises(0.2, 3 if outer == "all" else 1)]
    assert torch.allclose(torch.cat(seen), torch.cat(points), rtol=0, atol=1e-9)
    p = twin(torch.cat(points)).softmax(1)
    expected = -torch.stack([p[i, labels[i % 6]].log() for i in range(len(p))]).sum() / len(p)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-8)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


def test_without_a_ball_it_is_training_with_noise(monkeypatch):
    model, (images, labels, _) = small_net(), batch()
    loss = call(model, progress=0.0, warmup=0.5, sigma=0.2, copies=2)
    points = torch.cat([images + noise for noise in noises(0.2, 2)])
    assert loss.total.item() == pytest.approx(F.cross_entropy(small_net()(points), labels.repeat(2)).item(), rel=1e-12)


def test_warmup_shrinks_radius_and_step_size():
    small = ThreatModel.parse("L2@0.15")
    growing = call(small_net(), progress=0.1, warmup=0.2, step_size=0.1)
    assert growing.total.item() == call(small_net(), small, step_size=0.05).total.item()
    assert call(small_net(), progress=0.2, warmup=0.2).total.item() == call(small_net()).total.item()


@pytest.mark.parametrize(("threat", "norm"), [(L2, 2), (LINF, torch.inf)], ids=str)
def test_stays_in_the_ball(threat, norm, monkeypatch):
    model = small_net()
    seen = watched(model, monkeypatch)
    call(model, threat, outer="none")
    lengths = torch.linalg.vector_norm((seen[0] - batch()[0]).flatten(1), ord=norm, dim=1)
    assert (lengths <= threat.radius + 1e-15).all(), "to the rounding of the difference"
    assert (lengths > 0.99 * threat.radius).any()


@pytest.mark.parametrize(("attack_mode", "passes"), [("eval", 1), ("train", 1 + 3 * 2)])
def test_attack_mode_decides_whether_the_ascent_moves_running_statistics(attack_mode, passes):
    model = small_net()
    call(model, steps=3, copies=2, attack_mode=attack_mode)
    assert model.features[1].num_batches_tracked.item() == passes


def test_the_noise_of_training_is_that_of_the_attack():
    images, _, random = batch()
    drawn = module._noises(random.at("smooth_adv"), images, sigma=0.2, copies=2)
    assert all(torch.equal(a, b) for a, b in zip(drawn, noises(0.2, 2), strict=True))


def recipe(**changes):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "smooth_adv"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": "L2@0.1",
    }
    return parse_recipe({**values, **changes}, origin="test")


def test_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"defense smooth_adv trains against a threat model; add --set threat="):
        build_objective(recipe(threat=None))
    with pytest.raises(UserError, match=r"sigma = 0.0: input should be greater than 0"):
        recipe(defense={"name": "smooth_adv", "parameters": {"sigma": 0.0}})
    with pytest.raises(UserError, match=r"outer = 'two'"):
        recipe(defense={"name": "smooth_adv", "parameters": {"outer": "two"}})

"""TRADES with noise: its images and its loss by independent transcriptions, its limits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from robench.defenses.trades import trades
from robench.defenses.trades_smoothing import trades_smoothing
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import SmallNet, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def small_net():
    return SmallNet().double().train()


def call(model, threat=L2, **options):
    images, labels, random = batch()
    return trades_smoothing(model, images, labels, random=random, progress=0.5, threat=threat, **options)


def divergence(p, q):
    """KL(p || q) of softmax outputs, summed over classes and images."""
    return sum((p[i, j] * (p[i, j] / q[i, j]).log()) for i in range(p.shape[0]) for j in range(p.shape[1]))


def watched(model, monkeypatch):
    seen = {True: [], False: []}
    original = model.forward

    def forward(images):
        seen[model.classify.weight.requires_grad].append(images.detach().clone())
        return original(images)

    monkeypatch.setattr(model, "forward", forward)
    return seen


def test_loss_and_gradients_are_those_of_trades_with_the_same_noise_everywhere(monkeypatch):
    images, labels, random = batch()
    noise = 0.2 * random.at("noise").normal(images)
    model = small_net()
    twin = copy.deepcopy(model)
    asleep = copy.deepcopy(model).eval()
    delta = 0.001 * random.at("trades").normal(images)
    clean = asleep(images + noise).softmax(1).detach()
    for _ in range(4):
        delta = delta.detach().requires_grad_()
        slope = torch.autograd.grad(divergence(clean, asleep(images + delta + noise).softmax(1)), delta)[0]
        moved = delta.detach() + 2 * 0.3 / 4 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = moved * (0.3 / moved.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)
        delta = (images + moved).clamp(0, 1) - images
    seen = watched(model, monkeypatch)
    loss = call(model, sigma=0.2, beta=2.5, steps=4)
    loss.total.backward()
    assert torch.allclose(torch.stack(seen[True]), torch.stack([images, images + delta]) + noise, rtol=0, atol=1e-9)
    p = twin(images + noise)
    q = twin(images + delta + noise)
    expected = F.cross_entropy(p, labels) + 2.5 * divergence(p.softmax(1), q.softmax(1)) / len(images)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-8)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_every_step_stays_in_ball_and_box_around_the_image_without_noise(threat, monkeypatch):
    images, _, random = batch()
    model = small_net()
    seen = watched(model, monkeypatch)
    call(model, threat, sigma=0.5)
    noise = 0.5 * random.at("noise").normal(images)
    moved = torch.stack([points - noise for points in seen[True] + seen[False]])
    order = torch.inf if threat.norm == "Linf" else 2
    lengths = torch.linalg.vector_norm((moved - images).flatten(2), ord=order, dim=2)
    assert lengths.max() <= threat.radius + 1e-12
    assert lengths.max() > 0.9 * threat.radius
    assert moved.min() >= -1e-12
    assert moved.max() <= 1 + 1e-12
    assert torch.stack(seen[True]).min() < 0, "noisy images leave the box"


def test_almost_no_noise_is_trades():
    images, labels, random = batch()
    plain = trades(small_net(), images, labels, random=random, progress=0.5, threat=L2)
    assert call(small_net(), sigma=1e-9).total.item() == pytest.approx(plain.total.item(), rel=1e-5)


def test_without_beta_it_is_training_with_noise():
    images, labels, random = batch()
    noise = 0.2 * random.at("noise").normal(images)
    expected = F.cross_entropy(small_net()(images + noise), labels).item()
    assert call(small_net(), sigma=0.2, beta=0.0).total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("attack_mode", "passes"), [("eval", 2), ("train", 2 + 1 + 3)])
def test_attack_mode_decides_whether_the_ascent_moves_running_statistics(attack_mode, passes):
    model = small_net()
    call(model, steps=3, attack_mode=attack_mode)
    assert model.features[1].num_batches_tracked.item() == passes

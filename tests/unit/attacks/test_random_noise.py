"""The worst of many random points: uniform ones, and really the worst."""

from __future__ import annotations

import pytest
import torch

from robench.attacks.random_noise import random_noise
from robench.losses import Criterion, margin
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, pictures

LINF = ThreatModel(norm="Linf", epsilon="0.1")


def problem(count=30):
    model = SmallNet().eval().requires_grad_(False).double()
    images = pictures(count)
    return model, images, model(images).argmax(1), RandomStream(1, torch.arange(count))


def candidates(model, images, labels, random, threat, samples):
    """Return all points one by one: what one sample gives under the attack's own numbers for it."""
    points = []
    for sample in range(samples):
        stream = random.at("sample", sample)
        points.append((images + (2 * stream.uniform(images) - 1) * threat.radius).clamp(0, 1))
    return torch.stack(points)


@pytest.mark.parametrize("top_k", [1, 2])
def test_returns_the_first_broken_point_else_the_one_with_the_largest_margin(top_k):
    model, images, labels, random = problem()
    criterion = Criterion(top_k)
    points = candidates(model, images, labels, random, LINF, 40)
    broken = torch.stack([criterion.broken(model(p), labels) for p in points])
    value = torch.stack([criterion.margin(model(p), labels) for p in points])
    fallen = broken.any(0)
    assert 0 < int(fallen.sum()) < 30
    chosen = torch.where(fallen, broken.int().argmax(0), value.argmax(0))
    found = random_noise(model, images, labels, threat=LINF, random=random, samples=40, criterion=criterion)
    assert torch.equal(found, points[chosen, torch.arange(30)])


def test_more_samples_never_help_the_defender():
    model, images, labels, random = problem()
    worst = [
        margin(model(random_noise(model, images, labels, threat=LINF, random=random, samples=s)), labels)
        for s in (1, 10, 60)
    ]
    broken = [w > 0 for w in worst]
    assert (broken[0] <= broken[1]).all()
    assert (broken[1] <= broken[2]).all()
    assert int(broken[0].sum()) < int(broken[2].sum())
    stands = ~broken[2]
    assert (worst[0][stands] <= worst[1][stands]).all()
    assert (worst[1][stands] <= worst[2][stands]).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_points_fill_the_ball_uniformly(norm):
    model = Linear(2, 3).requires_grad_(False)
    images = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64)
    threat = ThreatModel(norm=norm, epsilon="0.2")
    found = random_noise(
        model,
        images,
        torch.zeros(4000, dtype=torch.int64),
        threat=threat,
        random=RandomStream(0, torch.arange(4000)),
        samples=1,
    )
    # In three dimensions the distance over the radius has the distribution function r^3.
    share = (distance(found - images, norm) / threat.radius).sort().values
    grid = torch.arange(1, 4001) / 4000
    assert float((share**3 - grid).abs().max()) < 1.63 / 4000**0.5  # Kolmogorov-Smirnov at 1 %
    assert float((found - images).mean((0, 1, 2)).abs().max()) < 0.01


def test_examples_leave_and_the_others_share_calls_of_the_first_size():
    model, images, labels, random = problem()
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    ledger = Ledger.of(30)
    threat = ThreatModel(norm="Linf", epsilon="0.2")
    found = random_noise(Target(model, ledger), images, labels, threat=threat, random=random, samples=100)
    assert ledger.unattributed == (0, 0)
    assert int(ledger.forward_passes.sum()) == sum(sizes)
    assert int(ledger.backward_passes.sum()) == 0
    assert max(sizes) == 30
    assert len(sizes) < 100
    fallen = model(found).argmax(1) != labels
    assert (ledger.forward_passes[~fallen] == 100).all()
    assert (ledger.forward_passes[fallen] < 100).any()


def test_answer_is_the_same_in_any_batch():
    model, images, labels, random = problem(9)
    whole = random_noise(model, images, labels, threat=LINF, random=random)
    rows = torch.tensor([7, 2, 5])
    part = random_noise(model, images[rows], labels[rows], threat=LINF, random=random[rows])
    assert torch.equal(part, whole[rows])


def test_constant_models_keep_the_first_point():
    model = Linear(3, 16).requires_grad_(False)
    model.weight.data.zero_()
    images, random = pictures(4), RandomStream(0, torch.arange(4))
    labels = model(images).argmax(1)
    one, many = (random_noise(model, images, labels, threat=LINF, random=random, samples=s) for s in (1, 50))
    assert torch.equal(one, many)

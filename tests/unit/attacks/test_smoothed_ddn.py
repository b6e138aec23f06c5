"""DDN behind noisy copies: the loop of the paper, known distances, and what it returns when nothing is found."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from robench.attacks.smoothed_ddn import quantised, smoothed_ddn
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, pictures

THREAT = ThreatModel(norm="L2", epsilon="0.5")


def problem(count=10):
    model = SmallNet().eval().requires_grad_(False).double()
    images = pictures(count)
    return model, images, model(images).argmax(1), RandomStream(5, torch.arange(count))


def attack(model, images, labels, random, **changes):
    return smoothed_ddn(model, images, labels, threat=THREAT, random=random, **changes)


@pytest.mark.parametrize(("levels", "agreement"), [(None, "majority"), (256, "majority"), (None, "sure")])
def test_loop_is_that_of_the_paper(levels, agreement):
    """One image at a time: store, step, shrink or grow, rescale, quantise, clamp."""
    model, images, labels, random = problem()
    found = attack(model, images, labels, random, steps=20, levels=levels, copies=5, sigma=0.1, agreement=agreement)
    nearest = []
    for row in range(10):
        image, label, own = images[row : row + 1], labels[row : row + 1], random[torch.tensor([row])]
        eta = torch.cat([0.1 * own.at("noise", "copy", copy).normal(image) for copy in range(5)])
        delta, rho, best = torch.zeros_like(image), 1.0, torch.zeros_like(image)
        shortest = math.inf
        for step in range(20):
            point = (image + delta).requires_grad_()
            logits = model(point + eta)
            votes = logits.argmax(1).bincount(minlength=5).double() + 0.5 * F.softmax(logits, 1).mean(0)
            adversarial = int(votes.argmax()) != int(label)
            if agreement == "sure":  # 2 sqrt(5) of five copies are all of them
                adversarial &= bool((logits.argmax(1) != label).all())
            adversarial &= step > 0  # the image itself is no success of the attack
            if adversarial and float(delta.norm()) < shortest:
                best, shortest = delta, float(delta.norm())
            (gradient,) = torch.autograd.grad(-torch.log(F.softmax(logits, 1)[:, label].mean()), point)
            size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / 20)) / 2
            delta = delta + size * gradient / gradient.norm()
            rho = min(rho * (0.95 if adversarial else 1.05), float(torch.maximum(image, 1 - image).norm()))
            moved = image + delta * rho / delta.norm()
            moved = moved if levels is None else (moved * 255).round() / 255
            delta = moved.clamp(0, 1) - image
        assert torch.allclose(found[row], (image + best)[0], atol=1e-9)
        nearest.append(shortest)
    assert any(math.isfinite(d) for d in nearest)


def test_finds_the_distance_of_two_linear_classes():
    model = Linear(2, 16).requires_grad_(False)
    images = pictures(40)
    labels = model(images).argmax(1)
    margins = model.margins(images, labels, "L2")
    found = attack(model, images, labels, RandomStream(0, torch.arange(40)))
    inside = margins < 0.8
    assert inside.sum() > 10
    assert (model(found).argmax(1) != labels)[inside].all()
    ratio = distance(found - images, "L2")[inside] / margins[inside]
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio <= 1.005).all()


def test_few_steps_cannot_shrink_the_norm_below_their_power():
    model, images, labels, random = problem()
    found = attack(model, images, labels, random, steps=20)
    length = distance(found - images, "L2")
    assert (length[length > 0] >= 0.95**18 * 0.999).all()


def test_returns_the_image_itself_where_nothing_is_found():
    model = Linear(2, 16).requires_grad_(False)
    model.weight.data.zero_()
    images = pictures(4)
    labels = model(images).argmax(1)
    assert torch.equal(attack(model, images, labels, RandomStream(0, torch.arange(4))), images)


def test_what_is_broken_already_is_returned_as_it_is():
    model, images, labels, random = problem()
    wrong = (labels + 1) % 5
    assert torch.equal(attack(model, images, wrong, random, steps=5), images)


@pytest.mark.parametrize("agreement", ["sure", "majority"])
def test_noise_that_fools_the_model_by_itself_is_no_success(agreement):
    """Such an image is moved on, towards where other noise fools the model, too."""
    model, images, labels, random = problem(40)
    noise = 0.3 * random.at("noise", "copy", 0).normal(images)
    fooled = model(images + noise).argmax(1) != labels
    assert 5 < fooled.sum() < 35
    found = attack(model, images, labels, random, steps=30, sigma=0.3, agreement=agreement)
    assert (distance(found - images, "L2")[fooled] > 0.1).all()


def test_quantises_to_so_many_levels():
    model, images, labels, random = problem()
    found = attack(model, images, labels, random, steps=30, levels=16)
    moved = distance(found - images, "L2") > 0
    assert moved.any()
    scaled = found[moved] * 15
    assert torch.allclose(scaled, scaled.round(), atol=1e-9)
    assert torch.equal(quantised(images, None), images)


def test_norm_never_exceeds_the_boxs():
    """From a start norm far beyond the box the walk must still end in it, at no more than the farthest corner."""
    model, images, labels, random = problem()
    found = attack(model, images, labels, random, steps=3, init_norm=100.0)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert (distance(found - images, "L2") <= distance(torch.maximum(images, 1 - images), "L2") + 1e-9).all()


def test_same_answer_in_any_batch_and_every_pass_charged():
    model, images, labels, random = problem()
    ledger = Ledger.of(10)
    run = functools.partial(attack, steps=8, copies=3, sigma=0.1)
    whole = run(Target(model, ledger), images, labels, random)
    rows = torch.tensor([7, 2, 5])
    assert torch.allclose(run(model, images[rows], labels[rows], random[rows]), whole[rows], atol=1e-10)
    assert ledger.unattributed == (0, 0)
    assert (ledger.forward_passes == 24).all()
    assert (ledger.backward_passes == 24).all()

"""ATENT's walk against the formulas, PGD and the radii at which it must settle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from robench.attacks.atent import LangevinWalk, atent, default_step_size, langevin_walk
from robench.attacks.pgd import pgd
from robench.evaluation.verification import find_violation
from robench.losses import cross_entropy
from robench.lp_geometry import distance, project
from robench.random_streams import RandomStream
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, pictures

LINF, L2 = ThreatModel(norm="Linf", epsilon="0.05"), ThreatModel(norm="L2", epsilon="0.3")


def net():
    return SmallNet().eval().requires_grad_(False).double()


def problem(count=6):
    model, images = net(), pictures(count)
    return model, images, model(images).argmax(1), RandomStream(3, torch.arange(count))


def walk(threat, **changes):
    plain = {
        "threat": threat,
        "steps": 8,
        "step_size": 0.01,
        "noise": 0.0,
        "gamma": 0.0,
        "restoring": "direct",
        "gradient_transform": "unit",
        "init": "none",
        "init_std": 0.001,
        "projection_target": "total",
        "projection_when": "never",
    }
    return LangevinWalk(**(plain | changes))


def gradient_of(model, point, labels):
    point = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), labels, reduction="sum"), point)
    return gradient


def unit(gradient):
    return gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_without_noise_and_pull_it_is_projected_gradient_descent(threat):
    model, images, labels, random = problem()
    found = atent(
        model,
        images,
        labels,
        threat=threat,
        random=random,
        steps=13,
        step_size=0.02,
        noise=0.0,
        gamma=0.0,
        init="none",
        projection_when="every",
    )
    expected = pgd(
        model,
        images,
        labels,
        threat=threat,
        random=random,
        steps=13,
        step_size=0.02,
        start="image",
        stop_when_broken=False,
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, images)


@pytest.mark.parametrize(("restoring", "gamma", "radius"), [("direct", 0.1, 0.1), ("times_step", 10.0, 0.1)])
def test_a_straight_walk_settles_where_pull_and_step_are_equal(restoring, gamma, radius):
    """The code's form at step / gamma, the printed one at 1 / gamma: the reason to take the code's."""
    model = Linear(2, 16).requires_grad_(False)
    images = pictures(3)
    labels = model(images).argmax(1)
    how = walk(L2, steps=300, gamma=gamma, restoring=restoring)
    *_, last = langevin_walk(
        model, images, labels, walk=how, random=RandomStream(0, torch.arange(3)), loss=cross_entropy
    )
    assert torch.allclose(distance(last - images, "L2"), torch.full((3,), radius, dtype=torch.float64), atol=1e-9)


def test_walk_is_the_codes_formula():
    """x' <- clip(x' + eta u(grad) + gamma (x - x') + sqrt(2 eta) eps z), from a point of the sphere."""
    model, images, labels, random = problem()
    eta, gamma, amplitude = 0.03, 0.08, 0.02
    how = walk(L2, steps=4, step_size=eta, gamma=gamma, noise=amplitude, init="sphere")
    iterates = list(langevin_walk(model, images, labels, walk=how, random=random, loss=cross_entropy))
    current = (images + 0.3 * unit(random.at("init").normal(images))).clamp(0, 1)
    for number, iterate in enumerate(iterates, start=1):
        z = random.at("noise", number).normal(images)
        current = (
            current
            + eta * unit(gradient_of(model, current, labels))
            + gamma * (images - current)
            + math.sqrt(2 * eta) * amplitude * z
        ).clamp(0, 1)
        assert torch.allclose(iterate, current, atol=1e-12)
        assert not iterate.requires_grad
    assert len(iterates) == 4


def test_printed_form_clips_the_last_increment_only():
    """x' <- x' + eta grad + sqrt(2 eta) eps z; at k = K the increment is cut at 1/gamma = epsilon (equation 14)."""
    model, images, labels, random = problem()
    threat = ThreatModel(norm="Linf", epsilon="0.001")
    how = walk(
        threat,
        steps=3,
        step_size=0.05,
        gradient_transform="raw",
        noise=0.01,
        init="normal",
        projection_target="increment",
        projection_when="last",
    )
    iterates = list(langevin_walk(model, images, labels, walk=how, random=random, loss=cross_entropy))
    current = images + 0.001 * random.at("init").normal(images)
    for number, iterate in enumerate(iterates, start=1):
        z = random.at("noise", number).normal(images)
        increment = 0.05 * gradient_of(model, current, labels) + math.sqrt(0.1) * 0.01 * z
        cut = increment.clamp(-0.001, 0.001)
        assert not torch.equal(cut, increment)
        current = current + (cut if number == 3 else increment)
        assert torch.allclose(iterate, current, atol=1e-12)
    assert (distance(iterates[-1] - images, "Linf") > 0.002).all()


def test_noise_has_the_stated_amplitude():
    model = Linear(2, 400).requires_grad_(False)
    model.weight.data.zero_()
    images = pictures(50, (1, 20, 20))
    how = walk(L2, steps=2, step_size=0.02, noise=0.1)
    first, second = langevin_walk(
        model,
        images,
        torch.zeros(50, dtype=torch.int64),
        walk=how,
        random=RandomStream(0, torch.arange(50)),
        loss=cross_entropy,
    )
    for increment in (first - images, second - first):
        assert float(increment.std()) == pytest.approx(math.sqrt(0.04) * 0.1, rel=0.02)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("init", ["corner", "sphere"])
def test_start_lies_at_the_radius(threat, init):
    images = pictures(5)
    start = walk(threat, init=init).start(images, RandomStream(0, torch.arange(5)))
    assert torch.allclose(distance(start - images, threat.norm), torch.tensor(threat.radius, dtype=torch.float64))
    if init == "corner":
        offset = (start - images).abs().flatten(1)
        assert torch.allclose(offset, offset[:, :1].expand_as(offset))


def test_step_is_that_of_table_six():
    assert default_step_size(ThreatModel(norm="Linf", epsilon="8/255"), 20) == 0.003
    assert default_step_size(ThreatModel(norm="Linf", epsilon="2/255"), 20) == 0.003 / 4
    assert default_step_size(ThreatModel(norm="Linf", epsilon="8/255"), 40) == 0.003 / 2
    assert default_step_size(ThreatModel(norm="L2", epsilon="2"), 40) == 0.125


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("keep", ["last", "first_broken"])
def test_always_ends_in_the_ball(threat, keep):
    model, images, labels, random = problem()
    images = (3 * (images - 0.5) + 0.5).clamp(0, 1)  # some pixels at the box
    choices = itertools.product(
        ("corner", "sphere", "normal", "uniform", "none"),
        ("total", "increment"),
        ("last", "every", "never"),
    )
    for init, target, when in choices:
        found = atent(
            model,
            images,
            labels,
            threat=threat,
            random=random,
            steps=3,
            step_size=0.4,
            noise=0.1,
            init=init,
            init_std=1.0,
            projection_target=target,
            projection_when=when,
            keep=keep,
        )
        assert find_violation(found, images, threat) is None


@pytest.mark.parametrize("when", ["every", "last"])
def test_first_broken_is_the_first_iterate_that_is_broken_in_the_ball(when):
    model, images, labels, random = problem(12)
    threat = ThreatModel(norm="Linf", epsilon="0.03")
    how = walk(
        threat,
        steps=20,
        step_size=default_step_size(threat, 20),
        noise=0.001,
        init="corner",
        gradient_transform="sign",
        projection_when=when,
    )
    points = [how.start(images, random)]
    points += langevin_walk(model, images, labels, walk=how, random=random, loss=cross_entropy)
    points = torch.stack([project(p, images, threat) for p in points])
    broken = torch.stack([model(p).argmax(1) != labels for p in points])
    first = torch.where(broken, torch.arange(21)[:, None], 20).amin(0)
    assert 0 < int((first < 20).sum()) < 12
    assert len(first.unique()) > 3
    found, last = (
        atent(model, images, labels, threat=threat, random=random, keep=keep, projection_when=when)
        for keep in ("first_broken", "last")
    )
    assert torch.allclose(found, points[first, torch.arange(12)], atol=1e-12)
    assert torch.equal(last, points[-1])
    assert ((model(found).argmax(1) != labels) >= (model(last).argmax(1) != labels)).all()


def test_first_broken_lets_examples_go_and_needs_one_pass_inside_the_ball():
    model, images, labels, random = problem(12)
    threat = ThreatModel(norm="Linf", epsilon="0.03")
    forward = {}
    for keep, when in (("last", "every"), ("first_broken", "every"), ("first_broken", "last")):
        ledger = Ledger.of(12)
        atent(
            Target(model, ledger),
            images,
            labels,
            threat=threat,
            random=random,
            keep=keep,
            projection_when=when,
        )
        assert ledger.unattributed == (0, 0)
        forward[keep, when] = ledger.forward_passes
    assert (forward["last", "every"] == 20).all()
    assert (forward["first_broken", "every"] <= 20).all()
    assert (forward["first_broken", "every"] < 20).any()
    assert (forward["first_broken", "last"] <= 40).all()


def test_pull_acts_in_linf_when_it_is_asked_for():
    model, images, labels, random = problem()
    plain, pulled = (atent(model, images, labels, threat=LINF, random=random, gamma=gamma) for gamma in (None, 0.5))
    assert (distance(pulled - images, "L2") < distance(plain - images, "L2")).all()


@pytest.mark.parametrize("keep", ["last", "first_broken"])
def test_answer_is_the_same_in_any_batch(keep):
    model, images, labels, random = problem(9)
    whole = atent(model, images, labels, threat=LINF, random=random, keep=keep)
    rows = torch.tensor([7, 2, 5])
    part = atent(model, images[rows], labels[rows], threat=LINF, random=random[rows], keep=keep)
    assert torch.allclose(part, whole[rows], atol=1e-12)

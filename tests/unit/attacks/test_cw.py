"""Carlini and Wagner's attack: what it minimises, how it searches, what it returns."""

from __future__ import annotations

import pytest
import torch

from robench.attacks.cw import Adam, Problem, cw_l2
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, numbers, pictures

L2 = ThreatModel(norm="L2", epsilon="1")


def attacked(model, images, labels, **parameters):
    random = RandomStream(0, torch.arange(len(images)))
    return cw_l2(model, images, labels, threat=L2, random=random, **parameters)


@pytest.fixture
def net():
    return SmallNet().eval().requires_grad_(False).double()


@pytest.mark.parametrize("variable", ["box", "tanh"])
def test_gradient_is_the_objectives(net, variable):
    """|x' - x|^2 + c max(z_y - max z_j + kappa, 0), written again, against finite differences."""
    images, labels, constant = pictures(3), torch.tensor([0, 1, 2]), torch.tensor([0.5, 2.0, 7.0]).double()
    problem = Problem(net, images, labels, TOP_1, 5.0, variable)
    free = problem.free() + 0.05 * numbers(3, 1, 4, 4, seed=3)

    def objective(point):
        candidate = (torch.tanh(point) + 1) / 2 if variable == "tanh" else point
        logits = net(candidate)
        others = logits.clone()
        others[torch.arange(3), labels] = -torch.inf
        gap = logits[torch.arange(3), labels] - others.amax(1) + 5.0
        return ((candidate - images) ** 2).sum((1, 2, 3)) + constant * gap.clamp_min(0)

    _, _, gradient = problem.look(free, constant)
    for pixel in range(0, 16, 5):
        nudge = torch.zeros_like(free).flatten(1)
        nudge[:, pixel] = 1e-6
        nudge = nudge.view_as(free)
        slope = (objective(free + nudge) - objective(free - nudge)) / 2e-6
        assert torch.allclose(gradient.flatten(1)[:, pixel], slope, atol=1e-5)


def test_adam_is_torchs():
    weight = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer, own = torch.optim.Adam([weight], lr=0.1), Adam.at(weight.detach())
    moved = weight.detach().clone()
    for step in range(5):
        gradient = numbers(4, 3, seed=step)
        weight.grad = gradient.clone()
        optimizer.step()
        moved = moved - 0.1 * own.direction(gradient)
    assert torch.allclose(moved, weight.detach(), atol=1e-9)


def test_a_broken_image_is_returned_as_it_is_and_so_is_one_that_cannot_be_broken(net):
    images = pictures(4)
    labels = net(images).argmax(1)
    wrong = (labels + 1) % 5
    assert torch.equal(attacked(net, images, wrong), images)
    assert torch.equal(attacked(net, images, labels, criterion=Criterion(5)), images), "all five are in the top five"
    constant = Linear(3, 16).requires_grad_(False)
    constant.weight.zero_()
    constant.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(attacked(constant, images, torch.zeros(4, dtype=torch.int64)), images)


@pytest.mark.parametrize("variable", ["box", "tanh"])
def test_more_rounds_and_the_final_search_never_help_the_defender(net, variable):
    images = pictures(16)
    labels = net(images).argmax(1)
    budgets = ({"rounds": 1, "final_search": 0}, {"rounds": 3, "final_search": 0}, {"rounds": 3, "final_search": 3})
    before = torch.full((16,), torch.inf, dtype=torch.float64)
    for budget in budgets:
        found = attacked(net, images, labels, steps=40, variable=variable, **budget)
        broken = net(found).argmax(1) != labels
        assert broken.any()
        assert torch.equal(found[~broken], images[~broken])
        length = torch.where(broken, distance(found - images, "L2"), torch.inf)
        assert (length <= before * (1 + 1e-12)).all()
        before = length


def test_the_constant_follows_the_scale_of_the_logits(net):
    class Scaled(torch.nn.Module):
        def forward(self, images):
            return 1000 * net(images)

    images = pictures(8)
    labels = net(images).argmax(1)
    plain, scaled = attacked(net, images, labels), attacked(Scaled(), images, labels)
    assert torch.allclose(distance(plain - images, "L2"), distance(scaled - images, "L2"), rtol=1e-6)


def test_confidence_is_kept(net):
    images = pictures(8)
    labels = net(images).argmax(1)
    found = attacked(net, images, labels, confidence=0.5)
    moved = (found != images).flatten(1).any(1)
    assert moved.any()
    assert (TOP_1.margin(net(found), labels)[moved] >= 0.5).all()

"""Carlini and Wagner's Linf attack: what it minimises, how tau and c move, what it returns."""

from __future__ import annotations

import pytest
import torch

from robench.attacks._boundaries import Candidates, Nearest, Run
from robench.attacks.cw_linf import _begin, _Search, cw_linf
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, numbers, pictures

LINF = ThreatModel(norm="Linf", epsilon="1")
#: The paper's search, without what was added to it.
PUBLISHED = {"start": "image", "final_search": 0}


def attacked(model, images, labels, **parameters):
    random = RandomStream(0, torch.arange(len(images)))
    return cw_linf(model, images, labels, threat=LINF, random=random, **parameters)


@pytest.fixture
def net():
    return SmallNet().eval().requires_grad_(False).double()


def search_of(**changes):
    usual = {
        "criterion": TOP_1,
        "solve_steps": 10,
        "step_size": None,
        "doublings": 2,
        "shrink": 0.9,
        "tolerance": 0.01,
        "confidence": 0.0,
        "variable": "box",
    }
    return _Search(**{**usual, **changes})


def begun(model, images, labels, search, **how):
    """Return the state in which a search begins, and what was found before it: nothing."""
    rows = torch.arange(len(images))
    run = Run(rows, images, images, labels, Candidates.nearest(model(images), labels, 4), model)
    return _begin(run, search, **{"constant": None, "at_boundary": False, **how}), Nearest.to(images)


@pytest.mark.parametrize("variable", ["box", "tanh"])
def test_gradient_is_the_objectives(net, variable):
    """c max(z_y - max z_j + kappa, 0) + sum max(|x' - x| - tau, 0), written again, against finite differences."""
    images, labels = pictures(3), torch.tensor([0, 1, 2])
    search = search_of(confidence=5.0, variable=variable)
    state, _ = begun(net, images, labels, search)
    state.tau, state.constant = torch.tensor([0.01, 0.03, 0.06]).double(), torch.tensor([0.5, 2.0, 7.0]).double()
    state.free = state.free + 0.05 * numbers(3, 1, 4, 4, seed=3)

    def objective(point):
        candidate = (torch.tanh(point) + 1) / 2 if variable == "tanh" else point
        logits = net(candidate)
        others = logits.clone()
        others[torch.arange(3), labels] = -torch.inf
        gap = logits[torch.arange(3), labels] - others.amax(1) + 5.0
        excess = ((candidate - images).abs() - state.tau[:, None, None, None]).clamp_min(0).sum((1, 2, 3))
        return excess + state.constant * gap.clamp_min(0)

    _, _, gradient = search.look(state)
    for pixel in range(0, 16, 3):
        nudge = torch.zeros_like(state.free).flatten(1)
        nudge[:, pixel] = 1e-6
        nudge = nudge.view_as(state.free)
        slope = (objective(state.free + nudge) - objective(state.free - nudge)) / 2e-6
        assert torch.allclose(gradient.flatten(1)[:, pixel], slope, atol=1e-5)


@pytest.mark.parametrize("how", [{}, PUBLISHED], ids=["usual", "published"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_linear_models_are_broken_at_their_margin(classes, how):
    model = Linear(classes, 16).requires_grad_(False)
    images = pictures(16)
    labels = model(images).argmax(1)
    margins = model.margins(images, labels, "Linf")
    inside = margins < 0.3
    found = attacked(model, images, labels, **how)
    ratio = distance(found - images, "Linf")[inside] / margins[inside]
    assert (model(found).argmax(1) != labels)[inside].all()
    assert (ratio >= 1 - 1e-9).all()
    # From the image it goes to the class that leads, which need not be the one whose boundary is nearest.
    assert (ratio.median() if how and classes > 2 else ratio.max()) <= 1.02


def test_the_changed_variable_comes_to_the_margin_too():
    model = Linear(3, 16).requires_grad_(False)
    images = pictures(16)
    labels = model(images).argmax(1)
    found = attacked(model, images, labels, variable="tanh", steps=600)
    assert (distance(found - images, "Linf") <= 1.02 * model.margins(images, labels, "Linf")).all()


def test_tau_shrinks_where_nothing_exceeds_it(net):
    images = pictures(4)
    labels = (net(images).argmax(1) + 1) % 5  # broken already
    search = search_of()
    state, nearest = begun(net, images, labels, search)
    state.free = images + torch.tensor([0.1, 0.2, 0.001, 0.002]).double()[:, None, None, None]
    state.tau = torch.tensor([0.2, 0.1, 0.2, 0.0005]).double()
    state.doubled, state.constant = torch.full((4,), 2), torch.full((4,), 8.0).double()
    search.step(state, nearest)
    assert torch.allclose(state.tau, torch.tensor([0.09, 0.1, 0.0009, 0.0005]).double())
    assert state.constant.tolist() == [2.0, 8.0, 2.0, 8.0], "c goes back to where it began"
    assert torch.allclose(nearest.distance, torch.tensor([0.1, 0.2, 0.001, 0.002]).double())


def test_c_doubles_until_tau_is_given_up(net):
    images = pictures(2)
    labels = net(images).argmax(1)
    search = search_of(solve_steps=1, step_size=1e-9)  # gets nowhere
    state, nearest = begun(net, images, labels, search)
    state.tau, nearest.distance[1] = torch.full((2,), 0.01, dtype=torch.float64), 0.04
    begin, courses = state.constant.clone(), []
    for _ in range(4):
        search.step(state, nearest)
        values = zip((state.constant / begin).tolist(), state.tau.tolist(), strict=True)
        courses.append([(round(constant, 9), round(tau, 9)) for constant, tau in values])
    never, found = zip(*courses, strict=True)
    assert never == ((2, 0.02), (4, 0.04), (8, 0.08), (16, 0.16)), "tau doubles, too, until something is found"
    # Two doublings, a last look, then half way between 0.01 and 0.04 in the logarithm.
    assert found == ((2, 0.01), (4, 0.01), (4, 0.01), (1, 0.02))
    assert state.in_vain.tolist() == [0, 0.01]


def test_the_nearest_is_kept_not_the_last(net):
    """The same search with more steps holds all that the shorter ones found."""
    images = pictures(12)
    labels = net(images).argmax(1)
    before = torch.full((12,), torch.inf, dtype=torch.float64)
    for steps in range(4, 60, 5):
        found = attacked(net, images, labels, steps=steps, **PUBLISHED)
        broken = net(found).argmax(1) != labels
        assert torch.equal(found[~broken], images[~broken])
        length = torch.where(broken, distance(found - images, "Linf"), torch.inf)
        assert (length <= before).all()
        before = length
    searched = attacked(net, images, labels, steps=steps, start="image", final_search=3)
    assert (distance(searched - images, "Linf") <= before * (1 + 1e-12)).all()


def test_answer_belongs_to_the_example(net):
    images = pictures(9)
    labels = net(images).argmax(1)
    whole = attacked(net, images, labels)
    for rows in ([4], [7, 2, 5]):
        assert torch.allclose(attacked(net, images[rows], labels[rows]), whole[rows], atol=1e-9)


@pytest.mark.parametrize("variable", ["box", "tanh"])
def test_stays_in_the_box_at_black_and_white_pixels(net, variable):
    images = (0.5 + 0.6 * numbers(12, 1, 4, 4)).clamp(0, 1)
    labels = net(images).argmax(1)
    found = attacked(net, images, labels, variable=variable)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (net(found).argmax(1) != labels).float().mean() > 0.7


def test_top_two_is_broken_under_top_two():
    model = Linear(6, 16).requires_grad_(False)
    images = pictures(12)
    labels = model(images).argmax(1)
    second = Criterion(2)
    found = attacked(model, images, labels, criterion=second)
    first = distance(attacked(model, images, labels) - images, "Linf")
    assert second.broken(model(found), labels).all()
    # Behind the second nearest boundary, where the box leaves it alone.
    logits, weight = model(images), model.weight
    gaps = logits.gather(1, labels[:, None]) - logits
    ways = gaps / (weight[labels][:, None] - weight[None]).abs().sum(2).clamp_min(1e-30)
    ways = ways.scatter(1, labels[:, None], torch.inf).sort(1).values[:, 1]
    ratio = (distance(found - images, "Linf") / ways)[ways < 0.3]
    assert (ratio >= 0.999).all()
    assert ratio.median() <= 1.1
    assert (distance(found - images, "Linf") >= first).all()


def test_a_broken_image_is_returned_as_it_is_and_so_is_one_that_cannot_be_broken(net):
    images = pictures(4)
    labels = net(images).argmax(1)
    assert torch.equal(attacked(net, images, (labels + 1) % 5), images)
    assert torch.equal(attacked(net, images, labels, criterion=Criterion(5)), images), "all five are in the top five"
    constant = Linear(3, 16).requires_grad_(False)
    constant.weight.zero_()
    constant.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(attacked(constant, images, torch.zeros(4, dtype=torch.int64)), images)


def test_a_long_search_in_vain_stays_finite():
    """Where no class can overtake the label, c doubles to the end: the answer is the image and no number overflows."""
    model = Linear(3, 16).requires_grad_(False).float()
    model.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    images, labels = pictures(2).float(), torch.zeros(2, dtype=torch.int64)
    search = search_of(doublings=0, solve_steps=1)
    state, nearest = begun(model, images, labels, search)
    for _ in range(300):
        search.step(state, nearest)
    assert all(x.isfinite().all() for x in (state.free, state.constant, state.second, state.tau))
    assert torch.equal(attacked(model, images, labels), images)


def test_the_constant_follows_the_scale_of_the_logits(net):
    class Scaled(torch.nn.Module):
        def forward(self, images):
            return 1024 * net(images)

    images = pictures(8)
    labels = net(images).argmax(1)
    plain, scaled = attacked(net, images, labels), attacked(Scaled(), images, labels)
    assert torch.allclose(distance(plain - images, "Linf"), distance(scaled - images, "Linf"), rtol=1e-3)


def test_confidence_is_kept(net):
    images = pictures(8)
    labels = net(images).argmax(1)
    found = attacked(net, images, labels, confidence=0.5)
    moved = (found != images).flatten(1).any(1)
    assert moved.any()
    assert (TOP_1.margin(net(found), labels)[moved] >= 0.5).all()

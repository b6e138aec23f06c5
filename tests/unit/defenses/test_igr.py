"""IGR: the penalty and its second derivatives by an independent transcription, its limits, where it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench import catalog
from robench.defenses.gn import gn
from robench.defenses.igr import InputGradientRegularizer
from robench.defenses.standard import standard
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import ThreatModel
from robench.training.objective import build_objective
from tests.models import numbers, pictures

BASES = ["standard", "pgd_training", "trades", "mart", "gaussian_noise"]


class TwoLayers(nn.Module):
    """softmax(V tanh(W x)): derivatives of any order, written out below."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(0.7 * numbers(6, 16, seed=1))
        self.second = nn.Parameter(0.7 * numbers(4, 6, seed=2))

    def forward(self, images):
        return torch.tanh(images.flatten(1) @ self.first.T) @ self.second.T

    def gradient(self, image, label):
        """The gradient of one image's cross-entropy, by the chain rule."""
        hidden = torch.tanh(self.first @ image.flatten())
        p = (self.second @ hidden).softmax(0)
        error = p - F.one_hot(torch.tensor(label), 4)
        return (self.first.T @ ((1 - hidden**2) * (self.second.T @ error))).view_as(image)


def batch(count=6):
    return pictures(count), torch.arange(count) % 4, RandomStream(3, torch.arange(count), ("test",))


def recipe(base="trades", **parameters):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": base},
        "regularizers": [{"name": "igr", "parameters": parameters}],
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": None if base in {"standard", "gaussian_noise"} else "Linf@0.1",
    }
    return parse_recipe(values, origin="test")


def call(base, model, **parameters):
    images, labels, random = batch()
    return build_objective(recipe(base, **parameters))(model, images, labels, random=random, progress=0.0)


def alone(base, model):
    images, labels, random = batch()
    threat = {} if base in {"standard", "gaussian_noise"} else {"threat": ThreatModel.parse("Linf@0.1")}
    return catalog.find("defenses", base).load().objective(model, images, labels, random=random, progress=0.0, **threat)


@pytest.mark.parametrize("base", BASES)
def test_penalty_and_its_gradients_are_the_formula_where_the_objective_takes_its_cross_entropy(base):
    model, twin = TwoLayers(), TwoLayers()
    loss = call(base, model, strength=0.7)
    loss.total.backward()
    at = "adversarial" if base == "pgd_training" else "clean"
    points = loss.views[at].images.detach() if at in loss.views else batch()[0]
    norms = [twin.gradient(x, y).square().sum() for x, y in zip(points, batch()[1].tolist(), strict=True)]
    expected = alone(base, twin).total + 0.7 * torch.stack(norms).mean()
    expected.backward()
    assert loss.parts["igr"].item() == pytest.approx(torch.stack(norms).mean().item(), rel=1e-9)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("base", BASES)
def test_strength_zero_is_the_objective_alone(base):
    model, twin = TwoLayers(), TwoLayers()
    loss, plain = call(base, model, strength=0.0), alone(base, twin)
    loss.total.backward()
    plain.total.backward()
    assert loss.total.item() == plain.total.item()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("at", ["clean", "adversarial"])
def test_where_it_is_taken_can_be_said(at):
    model = TwoLayers()
    loss = call("trades", model, at=at)
    points = loss.views[at].images.detach()
    norms = [model.gradient(x, y).square().sum() for x, y in zip(points, batch()[1].tolist(), strict=True)]
    assert loss.parts["igr"].item() == pytest.approx(torch.stack(norms).mean().item(), rel=1e-9)


def test_of_the_whole_loss_an_image_and_its_perturbation_move_together():
    """By central differences of TRADES' loss of one image, with the offset to its adversarial form held."""
    model = TwoLayers()
    loss = call("trades", model, of="loss")
    clean, worst = (loss.views[at].images.detach() for at in ("clean", "adversarial"))

    def of_one(i, shift):
        p, q = model(clean[i : i + 1] + shift).softmax(1), model(worst[i : i + 1] + shift).softmax(1)
        return (-p[0, batch()[1][i]].log() + 6 * (p * (p / q).log()).sum()).item()

    squares = []
    for i in range(len(clean)):
        steps = 1e-5 * torch.eye(16, dtype=torch.float64).view(16, 1, 1, 4, 4)
        slopes = [(of_one(i, step) - of_one(i, -step)) / 2e-5 for step in steps]
        squares.append(sum(s**2 for s in slopes))
    assert loss.parts["igr"].item() == pytest.approx(sum(squares) / len(squares), rel=1e-6)


@pytest.mark.parametrize("base", ["standard", "trades"])
def test_of_the_whole_loss_the_penalty_is_learned_from(base):
    """Parameter gradients by central differences of the penalty, at the same images."""
    model = TwoLayers()
    loss = call(base, model, of="loss", strength=1.0)
    plain = alone(base, model).total
    found = torch.autograd.grad(loss.total - plain, model.first)[0]
    places = {at: view.images.detach() for at, view in loss.views.items()}
    assert places, "the objective shows its images"

    def penalty():
        leaves = {at: images.clone().requires_grad_() for at, images in places.items()}
        logits = {at: model(images) for at, images in leaves.items()}
        labels = batch()[1]
        each = F.cross_entropy(logits["clean"], labels, reduction="none")
        if base == "trades":
            p, q = logits["clean"].log_softmax(1), logits["adversarial"].log_softmax(1)
            each = each + 6.0 * (p.exp() * (p - q)).sum(1)
        gradients = torch.autograd.grad(each.sum(), list(leaves.values()))
        return torch.stack(gradients).sum(0).square().flatten(1).sum(1).mean()

    step = 1e-6
    for place in [(0, 0), (2, 7), (5, 15)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                model.first[place] += sign * step
            values.append(penalty().item())
            with torch.no_grad():
                model.first[place] -= sign * step
        assert found[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("base", ["standard", "pgd_training"])
def test_of_a_plain_cross_entropy_both_readings_agree(base):
    a, b = (call(base, TwoLayers(), of=of).total.item() for of in ("ce", "loss"))
    assert a == pytest.approx(b, rel=1e-12)


def test_is_twice_gn():
    images, labels, random = batch()
    leaf, model = images.requires_grad_(), TwoLayers()
    base = standard(model, leaf, labels, random=random, progress=0.0)
    ours = InputGradientRegularizer(strength=0.3)(model, leaf, labels, random=random, progress=0.0, base=base)
    theirs = gn(model, leaf, labels, random=random, progress=0.0, base=base, strength=0.3)
    assert ours.total.item() == pytest.approx(2 * theirs.total.item(), rel=1e-12)


def test_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"igr: at = clean says where of=ce is taken, and of is loss; take --set"):
        build_objective(recipe(of="loss", at="clean"))
    with pytest.raises(UserError, match=r"igr: of = loss, but this objective shows none of its images; take of=ce"):
        call("gaussian_noise", TwoLayers(), of="loss")
    with pytest.raises(UserError, match=r"regularizer igr: at = adversarial, but defense standard trains on no"):
        build_objective(recipe("standard", at="adversarial"))
    with pytest.raises(UserError, match=r"strength = -1.0: input should be greater than or equal to 0"):
        recipe(strength=-1.0)

"""Effective margin regularisation: rows of the Jacobian by an independent way, limits, batch norm, composition."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian

from robench.architectures.wide_resnet import build as wide_resnet
from robench.classifier import mode
from robench.defenses import LossParts, View
from robench.defenses._piecewise_linear import PiecewiseLinear
from robench.defenses.emr import EffectiveMarginRegularizer
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.training.objective import build_objective
from tests.models import Linear, SmallNet, numbers, pictures


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def penalty(model, images, *, learning_rate=1.0, base=None, **options):
    """Return strength times the regulariser."""
    labels, random = torch.zeros(len(images), dtype=torch.int64), RandomStream(0, torch.arange(len(images)))
    term = EffectiveMarginRegularizer(**options)
    base = base or LossParts(torch.zeros(()))
    return term(model, images, labels, random=random, progress=0.0, learning_rate=learning_rate, base=base).total


def rows(model, images):
    """Return W `(N, K, d)`, each image's Jacobian in eval mode, taken one image at a time."""
    with mode(model, training=False):
        return torch.stack([jacobian(lambda x: model(x[None])[0], image).flatten(1) for image in images])


def small_net():
    return SmallNet().double().train()


class SmoothNet(nn.Module):
    """Second derivatives everywhere, and a batch norm whose running statistics are no batch's."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.last = nn.Linear(48, 4, dtype=torch.float64)
        with torch.no_grad():
            for position, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * numbers(*parameter.shape, seed=position))
            self.norm.running_mean.copy_(0.1 * numbers(3, seed=50))
            self.norm.running_var.copy_(1 + 0.5 * numbers(3, seed=51).abs())

    def forward(self, images):
        return self.last(torch.tanh(self.norm(self.convolution(images))).flatten(1))


def test_exact_form_sums_the_squared_rows_of_all_classes():
    model, (images, *_) = small_net(), batch()
    expected = rows(model, images).square().sum((1, 2)).mean()
    assert penalty(model, images, form="exact").item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.3, None, 1.0, 40.0])
def test_approximate_form_is_equation_7(temperature):
    model, (images, *_) = small_net(), batch()
    with mode(model, training=False), torch.no_grad():
        p = (model(images) / (temperature or 1.0)).softmax(1)
    w = rows(model, images)
    expected = sum(
        p[i, j] * p[i, k] * (w[i, j] @ w[i, k]) for i, j, k in itertools.product(range(6), range(5), range(5))
    )
    assert penalty(model, images, temperature=temperature).item() == pytest.approx(expected.item() / 6, rel=1e-10)


def test_low_temperature_takes_the_predicted_row_and_high_the_mean_row():
    model, (images, *_) = small_net(), batch()
    w = rows(model, images)
    with mode(model, training=False), torch.no_grad():
        predicted = w[torch.arange(6), model(images).argmax(1)]
    assert penalty(model, images, temperature=1e-4).item() == pytest.approx(
        predicted.square().sum(1).mean().item(), rel=1e-9
    )
    assert penalty(model, images, temperature=1e9).item() == pytest.approx(
        w.mean(1).square().sum(1).mean().item(), rel=1e-6
    )


def test_of_a_linear_model_it_is_the_weights():
    model, images = Linear(4, 16), pictures(3)
    assert penalty(model, images, form="exact").item() == pytest.approx(model.weight.square().sum().item())
    assert penalty(model, images, temperature=1e9).item() == pytest.approx(
        model.weight.mean(0).square().sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("form", ["exact", "approximate"])
def test_strength_reduction_and_learning_rate_are_factors(form):
    model, (images, *_) = small_net(), batch()
    plain = penalty(model, images, form=form).item()
    assert plain > 0
    assert penalty(model, images, form=form, strength=3.0).item() == pytest.approx(3 * plain)
    assert penalty(model, images, form=form, strength=0.0).item() == 0
    assert penalty(model, images, form=form, reduction="official").item() == pytest.approx(plain / 6)
    assert penalty(model, images, form=form, learning_rate=0.1).item() == pytest.approx(0.1 * plain)
    assert penalty(model, images, form=form, learning_rate=0.1, follows_learning_rate=False).item() == plain


def test_official_reduction_sums_the_squared_gradient_of_the_batch_mean():
    model, (images, *_) = small_net(), batch()
    with mode(model, training=False):
        points = images.clone().requires_grad_()
        logits = model(points)
        h = (logits.detach().softmax(1) * logits).sum(1)
        (gradient,) = torch.autograd.grad(h.mean(), points)
    expected = gradient.square().sum().item()
    assert penalty(model, images, reduction="official").item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("form", ["exact", "approximate"])
def test_an_image_does_not_depend_on_the_rest_of_the_batch(form):
    model, (images, *_) = small_net(), batch()
    alone = [penalty(model, images[i : i + 1], form=form).item() for i in range(6)]
    assert penalty(model, images, form=form).item() == pytest.approx(sum(alone) / 6, rel=1e-10)
    assert penalty(model, images[:2], form=form).item() == pytest.approx(sum(alone[:2]) / 2, rel=1e-10)


def test_leaves_running_statistics_and_modes_alone():
    model, (images, *_) = small_net(), batch()
    model.classify.eval()
    before = copy.deepcopy(model.state_dict())
    penalty(model, images).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.features[1].training
    assert not model.classify.training


@pytest.mark.parametrize("temperature", [0.2, 5.0, None], ids=["cold", "warm", "exact"])
def test_gradients_are_finite_differences_at_constant_weights(temperature):
    """The weights of the mean row stand still in the differences, as they do in the gradient."""
    model, (images, *_) = SmoothNet().train(), batch()
    with mode(model, training=False), torch.no_grad():
        p = torch.eye(4).double().expand(6, 4, 4) if temperature is None else None
        if p is None:
            p = (model(images) / temperature).softmax(1)[:, None]
    options = {"form": "exact"} if temperature is None else {"temperature": temperature}
    penalty(model, images, **options).backward()

    def value():
        return (p @ rows(model, images)).square().sum((1, 2)).mean().item()

    step = 1e-5
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for position in range(0, len(flat), max(1, len(flat) // 3)):
            before = flat[position].item()
            flat[position] = before + step
            above = value()
            flat[position] = before - step
            below = value()
            flat[position] = before
            gradient = 0.0 if parameter.grad is None else parameter.grad.view(-1)[position].item()
            assert gradient == pytest.approx((above - below) / (2 * step), rel=2e-6, abs=1e-9), name


def test_is_taken_where_the_objective_trains():
    model, (images, *_) = small_net(), batch()
    adversarial = (images + 0.05 * numbers(*images.shape, seed=1)).requires_grad_()
    base = LossParts(torch.zeros(()), views={"adversarial": View(adversarial, model(adversarial))})
    there, here = penalty(model, adversarial).item(), penalty(model, images).item()
    assert there != here
    assert penalty(model, images, base=base).item() == there
    assert penalty(model, images, base=base, at="adversarial").item() == there
    assert penalty(model, images, base=base, at="clean").item() == here


def recipe(defense, **parameters):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": defense},
        "regularizers": [{"name": "emr", "parameters": parameters}],
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": None if defense == "standard" else "Linf@0.05",
    }
    return parse_recipe(values, origin="test")


@pytest.mark.parametrize("name", ["standard", "pgd_training", "trades"])
def test_adds_to_an_objective_where_that_one_trains(name):
    images, labels, random = batch()
    model, twin = small_net(), small_net()
    objective = build_objective(recipe(name, strength=0.7))
    both = objective(model, images, labels, random=random, progress=0.0, learning_rate=0.1)
    alone = objective.base(twin, images, labels, random=random, progress=0.0)
    points = alone.views["clean" if name == "standard" else "adversarial"].images
    added = penalty(twin, points, strength=0.7, learning_rate=0.1)
    assert both.total.item() == pytest.approx((alone.total + added).item(), rel=1e-12)
    assert both.parts["emr"].item() == pytest.approx(added.item() / 0.07)
    both.total.backward()
    (alone.total + added).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"strength = -1.0: input should be greater than or equal to 0"):
        recipe("standard", strength=-1.0)
    for temperature in (0.0, -2.0):
        with pytest.raises(UserError, match=r"temperature = .*: input should be greater than 0"):
            recipe("standard", temperature=temperature)
    with pytest.raises(UserError, match=r"take --set regularizers.emr.at=clean"):
        build_objective(recipe("standard", at="adversarial"))
    with pytest.raises(UserError, match=r"temperature = 2 .* take --set regularizers.emr.temperature=none"):
        build_objective(recipe("standard", form="exact", temperature=2.0))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("call", ["relu", "torch", "leaky"])
def test_piecewise_linear_activations_keep_their_numbers_and_gradients(call, inplace):
    if call == "torch":
        function = torch.relu
    else:
        function = {"relu": nn.ReLU(inplace=inplace), "leaky": nn.LeakyReLU(0.1, inplace=inplace)}[call]
    values = torch.tensor([-2.0, -0.0, 0.0, 3.0], requires_grad=True)
    expected = function(values * 1.0)
    (slope,) = torch.autograd.grad(expected.sum(), values)
    with PiecewiseLinear():
        fed = values * 1.0
        found = function(fed)
    assert torch.equal(found, expected)
    assert (fed.data_ptr() == found.data_ptr()) is (inplace and call != "torch")
    assert torch.equal(torch.autograd.grad(found.sum(), values)[0], slope)
    with PiecewiseLinear():
        assert F.softplus(values).requires_grad, "others are left as they are"


@pytest.mark.parametrize("flavour", ["trades", "madry"])
def test_networks_are_differentiated_twice_as_without_the_cheap_activations(flavour):
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = wide_resnet(num_classes=4, input_shape=(3, 8, 8), depth=10, width=1, flavour=flavour).double()
    images = pictures(2, (3, 8, 8))
    penalty(model, images).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    points = images.clone().requires_grad_()
    with mode(model, training=False):
        logits = model(points)
    h = (logits.detach().softmax(1) * logits).sum()
    (gradient,) = torch.autograd.grad(h, points, create_graph=True)
    (gradient.square().sum() / 2).backward()
    for name, parameter in model.named_parameters():
        if found[name] is None:
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-12, name
        else:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-8, atol=1e-14), name

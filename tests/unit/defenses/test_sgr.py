"""SGR and GN: the formulas against other ways to compute them, the covariance's upkeep, and that they work."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from robench import catalog
from robench.attacks.fgsm import fgsm
from robench.attacks.pgd import pgd
from robench.checkpoints import load_model
from robench.datasets import open_split
from robench.defenses import LossParts, View, seen
from robench.defenses import _covariance as algebra
from robench.defenses.gn import gn, gradient_of_log_likelihood
from robench.defenses.sgr import StructuredGradientRegularization as Sgr
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import apply_settings, load_recipe, parse_recipe
from robench.threat_model import ThreatModel
from robench.training.data import Pixels
from robench.training.objective import build_objective
from robench.training.validation import Examiner
from robench.workspace import Workspace
from tests.models import numbers, pictures
from tests.unit.training.problems import Watcher, run_training

SHAPE = (2, 4, 5)


class Net(nn.Module):
    """Smooth, float64, of five classes; the channels and the pixels all count differently."""

    def __init__(self, shape=SHAPE, classes=5):
        super().__init__()
        self.hidden = nn.Linear(math.prod(shape), 7, dtype=torch.float64)
        self.last = nn.Linear(7, classes, dtype=torch.float64)
        with torch.no_grad():
            for position, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * numbers(*parameter.shape, seed=position))

    def forward(self, images):
        return self.last(torch.tanh(self.hidden(images.flatten(1))))


def evaluated(model, seed=0, count=6, shape=SHAPE):
    images = pictures(count, shape, seed=seed).requires_grad_()
    labels = torch.arange(count) % 5
    return images, labels, LossParts(torch.zeros(()), views={"clean": View(images, model(images))})


def penalty(regularizer, model, seed=0):
    images, labels, base = evaluated(model, seed)
    random = RandomStream(0, torch.arange(len(images)))
    return regularizer(model, images, labels, random=random, progress=0.0, base=base)


def gradients(model, images, labels):
    """The gradient of log phi_y for one image after another."""
    found = []
    for image, label in zip(images.detach(), labels, strict=True):
        leaf = image[None].clone().requires_grad_()
        likelihood = torch.log(torch.softmax(model(leaf), dim=1)[0, label])
        found.append(torch.autograd.grad(likelihood, leaf)[0][0])
    return torch.stack(found)


def dense(function, channels, height, width):
    """The d x d matrix that a covariance function means, element by element."""
    places = [(c, i, j) for c in range(channels) for i in range(height) for j in range(width)]
    return torch.tensor(
        [[function[c, e, round(math.hypot(i - k, j - m))].item() for e, k, m in places] for c, i, j in places],
        dtype=function.dtype,
    )


def brute_force_function(perturbations):
    """Every pair of pixels, one after another."""
    _, channels, height, width = perturbations.shape
    bins = round(math.hypot(height - 1, width - 1)) + 1
    sums, pairs = torch.zeros(channels, channels, bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
    for i, j in [(i, j) for i in range(height) for j in range(width)]:
        for k, m in [(k, m) for k in range(height) for m in range(width)]:
            place = round(math.hypot(i - k, j - m))
            sums[:, :, place] += torch.einsum("nc,ne->ce", perturbations[:, :, i, j], perturbations[:, :, k, m])
            pairs[place] += 1
    return sums / pairs / len(perturbations)


# Linear algebra


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 5), (3, 5, 3), (3, 1, 4)])
def test_the_covariance_function_is_that_of_all_pairs_of_pixels(shape):
    perturbations = numbers(4, *shape) + 0.5
    assert torch.allclose(algebra.covariance_function(perturbations), brute_force_function(perturbations), atol=1e-14)


def test_the_full_matrix_is_the_mean_of_outer_products():
    perturbations = numbers(3, *SHAPE)
    expected = sum(torch.outer(xi, xi) for xi in perturbations.flatten(1)) / 3
    assert torch.allclose(algebra.full_matrix(perturbations), expected)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 5), (3, 5, 3)])
def test_the_product_by_fourier_transforms_is_the_dense_product(shape):
    channels, height, width = shape
    # Not symmetric in the channels, and as large at the longest displacement as at none: what wraps round is seen.
    function = numbers(channels, channels, round(math.hypot(height - 1, width - 1)) + 1, seed=3)
    vectors = numbers(4, *shape, seed=4)
    product = algebra.convolution_product(algebra.transfer_function(function, height, width), vectors)
    expected = vectors.flatten(1) @ dense(function, *shape).T
    assert torch.allclose(product.flatten(1), expected, rtol=0, atol=1e-13)
    matrix = numbers(math.prod(shape), math.prod(shape), seed=5)
    assert torch.allclose(algebra.matrix_product(matrix, vectors).flatten(1), vectors.flatten(1) @ matrix.T)


def test_clipping_makes_an_indefinite_covariance_semidefinite_and_nothing_else():
    shape = (2, 6, 6)
    decay = torch.exp(-torch.arange(8) / 4.0).double()
    function = torch.stack([torch.stack([decay, 0.5 * decay]), torch.stack([0.5 * decay, decay])])
    assert torch.linalg.eigvalsh(dense(function, *shape)).min() < -0.01, "rounded displacements make it indefinite"
    transfer = algebra.transfer_function(function, 6, 6)
    clipped = algebra.positive_part(transfer)
    columns = algebra.convolution_product(clipped, torch.eye(72, dtype=torch.float64).view(72, *shape)).flatten(1)
    assert torch.allclose(columns, columns.T, atol=1e-12)
    assert torch.linalg.eigvalsh(columns).min() > -1e-12
    assert torch.allclose(algebra.positive_part(clipped), clipped, atol=1e-12)
    # What was taken away is orthogonal to what is left, frequency by frequency.
    left, taken = clipped.permute(2, 3, 0, 1), (clipped - transfer).permute(2, 3, 0, 1)
    assert taken.abs().max() > 0.01
    assert (left @ taken).abs().max() < 1e-12
    unit = torch.zeros_like(function)
    unit[0, 0, 0] = unit[1, 1, 0] = 1.0
    unchanged = algebra.transfer_function(unit, 6, 6)
    assert torch.allclose(algebra.positive_part(unchanged), unchanged)
    # One channel takes a shorter way to the same.
    alone = algebra.transfer_function(function[:1, :1], 6, 6)
    assert torch.equal(algebra.positive_part(alone), alone.clamp_min(0))


# The penalty


def test_the_gradient_is_that_of_the_log_likelihood_and_equation_13_gives_the_same():
    model = Net()
    images, labels, base = evaluated(model)
    found = gradient_of_log_likelihood(seen(base, "clean", model, images), labels)
    assert torch.allclose(found, gradients(model, images, labels))
    for k, (image, label) in enumerate(zip(images.detach(), labels, strict=True)):
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], image[None])[:, 0]
        share = torch.softmax(model(image[None])[0].detach(), dim=0)
        assert torch.allclose(found[k], jacobian[label] - (share[:, None, None, None] * jacobian).sum(0))


def test_a_linear_softmax_model_has_the_papers_closed_form():
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5, bias=False, dtype=torch.float64))
    images, labels, base = evaluated(model)
    weight, share = model[1].weight.detach(), torch.softmax(model(images).detach(), dim=1)
    sigma = dense(algebra.covariance_function(numbers(4, *SHAPE)), *SHAPE)
    difference = weight[labels] - share @ weight
    expected = 0.5 * torch.einsum("ni,ij,nj->n", difference, sigma, difference).mean()
    sgr = Sgr(strength=1.0, psd="none")
    sgr.load_state_dict(state(algebra.covariance_function(numbers(4, *SHAPE))))
    found = sgr(model, images, labels, random=RandomStream(0, torch.arange(6)), progress=0.0, base=base)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)


def state(covariance, step=1, estimates=1):
    return {"step": torch.tensor(step), "estimates": torch.tensor(estimates), "covariance": covariance}


@pytest.mark.parametrize("form", ["full", "function"])
@pytest.mark.parametrize("perturbation", ["grad", "sign"])
def test_the_penalty_is_half_the_quadratic_form_of_an_independent_transcription(form, perturbation):
    model = Net()
    images, labels, _ = evaluated(model)
    g = gradients(model, images, labels)
    xi = g if perturbation == "grad" else g.sign()
    if form == "full":
        sigma = sum(torch.outer(x, x) for x in xi.flatten(1)) / len(xi)
    else:
        sigma = dense(brute_force_function(xi), *SHAPE)
    sigma = sigma / sigma.diagonal().mean()
    quadratic = torch.stack([0.5 * x @ sigma @ x for x in g.flatten(1)])
    parts = penalty(Sgr(strength=0.7, form=form, perturbation=perturbation, psd="none"), model)
    assert parts.total.item() == pytest.approx(0.7 * quadratic.mean().item(), rel=1e-10)
    assert parts.parts["sgr_loss"].item() == parts.total.item()
    assert parts.parts["sgr_negative"].item() == (quadratic < 0).double().mean().item()


def test_the_identity_makes_it_gn():
    model = Net()
    images, labels, base = evaluated(model)
    expected = 0.35 * gradients(model, images, labels).square().flatten(1).sum(1).mean().item()
    random = RandomStream(0, torch.arange(6))
    found = gn(model, images, labels, random=random, progress=0.0, base=base, strength=0.7)
    assert found.total.item() == pytest.approx(expected, rel=1e-12)
    found.total.backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    delta = torch.zeros(2, 2, 6, dtype=torch.float64)
    delta[0, 0, 0] = delta[1, 1, 0] = 1.0
    for form, identity in (("full", torch.eye(40, dtype=torch.float64)), ("function", delta)):
        sgr = Sgr(strength=0.7, form=form)
        sgr.load_state_dict(state(identity))
        model.zero_grad()
        same = penalty(sgr, model)
        assert same.total.item() == pytest.approx(expected, rel=1e-12)
        same.total.backward()
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            assert torch.allclose(parameter.grad, slope, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "full"},
        {"perturbation": "sign", "psd": "none"},
        {"perturbation": "fgsm", "epsilon": 0.1, "cov_scale": "data_diag"},
        {"perturbation": "pgd", "epsilon": 0.1, "form": "full", "cov_scale": "none"},
    ],
    ids=str,
)
def test_second_order_gradients_agree_with_finite_differences(options):
    model, sgr = Net(), Sgr(refresh=1000, **options)
    penalty(sgr, model, seed=1)
    penalty(sgr, model).total.backward()
    assert next(model.parameters()).grad.abs().max() > 0
    step = 1e-6
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for position in range(0, len(flat), max(1, len(flat) // 5)):
            before = flat[position].item()
            values = []
            for moved in (before + step, before - step):
                flat[position] = moved
                values.append(penalty(sgr, model).total.item())
            flat[position] = before
            slope = parameter.grad.view(-1)[position].item()
            assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_a_step_along_the_gradient_makes_the_likelihood_flatter():
    model, sgr = Net(), Sgr(refresh=1000)
    before = penalty(sgr, model).total
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1e-3 * parameter.grad)
    assert 0 < penalty(sgr, model).total.item() < before.item()
    assert penalty(Sgr(strength=0.0), model).total.item() == 0


# The running average


def test_the_average_by_hand():
    model = Net()
    sgr = Sgr(form="full", decay=0.75, refresh=1)
    estimates = []
    for seed in range(6):
        images, labels, _ = evaluated(model, seed)
        g = gradients(model, images, labels).flatten(1)
        matrix = g.T @ g
        estimates.append(matrix / matrix.diagonal().mean())
        penalty(sgr, model, seed)
    expected = sum(estimates[:4]) / 4  # the first 1 / (1 - decay) count equally
    for estimate in estimates[4:]:
        expected = 0.75 * expected + 0.25 * estimate
    assert torch.allclose(sgr.covariance, expected, atol=1e-13)
    # All of the memory, and none of it.
    latest = Sgr(form="full", decay=0.0, refresh=1)
    for seed in range(6):
        penalty(latest, model, seed)
    assert torch.allclose(latest.covariance, estimates[5], atol=1e-13)


def test_estimates_are_made_at_intervals_and_the_batch_enters_its_own_penalty():
    model, sgr = Net(), Sgr(refresh=3)
    seen_covariances = []
    for seed in range(7):
        penalty(sgr, model, seed)
        seen_covariances.append(sgr.covariance.clone())
    changes = [not torch.equal(a, b) for a, b in pairwise(seen_covariances)]
    assert changes == [False, False, True, False, False, True]
    assert (sgr.step, sgr.estimates) == (7, 3)


@pytest.mark.parametrize("form", ["full", "function"])
def test_a_state_that_is_restored_goes_on_with_the_same_bits(form):
    model = Net()
    whole, first = (Sgr(form=form, refresh=2, perturbation="pgd", epsilon=0.1, steps=2) for _ in range(2))
    for seed in range(3):
        penalty(whole, model, seed)
        penalty(first, model, seed)
    again = Sgr(form=form, refresh=2, perturbation="pgd", epsilon=0.1, steps=2)
    again.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for seed in range(3, 6):
        assert torch.equal(penalty(again, model, seed).total, penalty(whole, model, seed).total)
    assert torch.equal(again.covariance, whole.covariance)
    empty = Sgr()
    empty.load_state_dict(Sgr().state_dict())
    assert empty.covariance is None


@pytest.mark.parametrize("form", ["full", "function"])
def test_scales(form):
    model = Net()
    images, labels, _ = evaluated(model)
    g = gradients(model, images, labels)
    found = {}
    for scale in ("unit_diag", "data_diag", "none"):
        sgr = Sgr(form=form, cov_scale=scale, refresh=1000)
        penalty(sgr, model)
        found[scale] = algebra.mean_variance(sgr.covariance).item()
        # What multiplies the gradients has that mean diagonal, too, after clipping.
        columns = sgr._product(torch.eye(40, dtype=torch.float64).view(40, *SHAPE)).flatten(1)
        assert columns.diagonal().mean().item() == pytest.approx(found[scale])
        assert torch.linalg.eigvalsh(columns).min() > -1e-9 * found[scale]
    variance = images.detach().flatten(1).var(0, correction=0).mean().item()
    expected = {"unit_diag": 1.0, "data_diag": variance, "none": g.square().mean().item()}
    assert found == pytest.approx(expected)


def test_attacks_are_the_librarys_on_the_predicted_label():
    model = Net()
    images, _, base = evaluated(model)
    predicted = base.views["clean"].logits.argmax(1)
    labels = (predicted + 1) % 5
    threat, random = ThreatModel.parse("Linf@0.3"), RandomStream(0, torch.arange(6))
    plain = images.detach()
    attacked = {
        "fgsm": fgsm(model, plain, predicted, threat=threat, random=random),
        "pgd": pgd(
            model,
            plain,
            predicted,
            threat=threat,
            random=random.at("perturbation", "pgd"),
            steps=3,
            step_size=0.05,
            stop_when_broken=False,
        ),
    }
    for name, adversarial in attacked.items():
        options = {"steps": 3, "step_size": 0.05} if name == "pgd" else {}
        sgr = Sgr(perturbation=name, epsilon=0.3, form="full", cov_scale="none", **options)
        sgr(model, images, labels, random=random, progress=0.0, base=base)
        assert torch.allclose(sgr.covariance, algebra.full_matrix(adversarial - plain), atol=1e-14)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Shifted(nn.Module):
    """A network behind a standardisation by 4 x - 1."""

    class Scale(nn.Module):
        standardizes = True

        def forward(self, images):
            return 4 * images - 1

    def __init__(self):
        super().__init__()
        self.scale, self.net = self.Scale(), Net()

    def forward(self, images):
        return self.net(self.scale(images))


@pytest.mark.parametrize("form", ["full", "function"])
def test_the_gradient_by_what_the_network_standardises_the_images_to(form):
    """By 4 x - 1 the gradient is a quarter; a covariance with mean diagonal 1 does not mind the scale."""
    model = Shifted()
    options = {"form": form, "strength": 1.0, "decay": 0.0, "refresh": 1}
    plain = penalty(Sgr(**options), model).total
    scaled = penalty(Sgr(**options, gradient_by="standardized"), model).total
    torch.testing.assert_close(scaled, plain / 16)
    images, labels, base = evaluated(model)
    given = {"random": RandomStream(0, torch.arange(len(images))), "progress": 0.0, "base": base}
    by = [gn(model, images, labels, **given, gradient_by=name).total for name in ("pixels", "standardized")]
    torch.testing.assert_close(by[1], by[0] / 16)
    (through,) = torch.autograd.grad(by[1], model.net.hidden.weight)
    assert through.abs().max() > 0


def test_without_a_standardisation_there_is_no_gradient_by_it():
    with pytest.raises(UserError, match="standardises nothing"):
        penalty(Sgr(gradient_by="standardized"), Net())


def test_without_gradients_there_is_no_penalty_and_no_covariance_yet():
    model = Net()
    nn.init.zeros_(model.last.weight)
    sgr = Sgr()
    assert penalty(sgr, model).total.item() == 0
    assert sgr.covariance is None
    with torch.no_grad():
        model.last.weight.copy_(numbers(5, 7))
    penalty(sgr, model)
    assert sgr.covariance is not None, "it does not wait for the next interval"


def test_very_small_gradients_give_a_covariance():
    sgr = Sgr()
    model = Net().float()
    images, labels, _ = evaluated(Net())
    images = images.detach().float().requires_grad_()
    with torch.no_grad():
        model.last.weight.mul_(1e-25)
    base = LossParts(torch.zeros(()), views={"clean": View(images, model(images))})
    sgr(model, images, labels, random=RandomStream(0, torch.arange(6)), progress=0.0, base=base)
    assert algebra.mean_variance(sgr.covariance).item() == pytest.approx(1.0, rel=1e-5)


# Size


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_images_of_224_pixels_need_nothing_of_the_size_of_a_matrix():
    shape = (3, 224, 224)
    model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 14 * 14, 5))
    nn.init.normal_(model[2].weight, std=0.1)
    images = pictures(2, shape).float().requires_grad_()
    labels = torch.tensor([0, 1])
    with Largest() as largest:
        base = LossParts(torch.zeros(()), views={"clean": View(images, model(images))})
        found = Sgr()(model, images, labels, random=RandomStream(0, torch.arange(2)), progress=0.0, base=base)
        found.total.backward()
    assert found.total.item() > 0
    # Real and imaginary parts of two images on a grid of twice the side; d^2 would be 22 billion.
    assert largest.elements <= 2 * 2 * 3 * 448 * 448
    with pytest.raises(
        UserError, match=r"150,528 x 150,528 numbers \(84\.4 GiB\) for images of \(3, 224, 224\).*form="
    ):
        Sgr(form="full")(
            model, images, labels, random=RandomStream(0, torch.arange(2)), progress=0.0, base=again(model)
        )


def again(model):
    images = pictures(2, (3, 224, 224)).float().requires_grad_()
    return LossParts(torch.zeros(()), views={"clean": View(images, model(images))})


# Composition and bad input


def recipe(base, **parameters):
    threat = "Linf@0.05" if base == "pgd_training" else None
    return parse_recipe(
        {
            "summary": "s",
            "source": "p",
            "dataset": "digits",
            "epochs": 1,
            "batch_size": 8,
            "architecture": {"name": "digits_cnn"},
            "defense": {"name": base},
            "regularizers": [{"name": "sgr", "parameters": parameters}, {"name": "gn"}],
            "threat": threat,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "selection": {"metric": "clean_accuracy"},
        },
        origin="test",
    )


@pytest.mark.parametrize(("base", "at", "calls"), [("standard", "clean", 1), ("pgd_training", "adversarial", 1)])
def test_on_any_objective_and_nothing_is_evaluated_twice(base, at, calls):
    model = Net(shape=(1, 4, 4))
    chosen = recipe(base, at=at, strength=0.5)
    chosen = apply_settings(chosen, [f"regularizers.gn.at={at}"])
    objective = build_objective(chosen)
    counted = []

    def count(module, _inputs):
        if module.last.weight.requires_grad:
            counted.append(1)

    model.register_forward_pre_hook(count)
    images, labels = pictures(6), torch.arange(6) % 5
    found = objective(model, images, labels, random=RandomStream(0, torch.arange(6)), progress=0.0)
    assert len(counted) == calls
    assert {"accuracy", "sgr_loss", "sgr_negative", "gn_loss"} == set(found.parts)
    found.total.backward()
    assert set(objective.state()) == {"sgr/step", "sgr/estimates", "sgr/covariance"}


def test_bad_input_is_said_in_a_line():
    for parameters, message in (
        ({"strength": -1}, r"strength = -1: .*greater than or equal to 0"),
        ({"decay": 1.5}, r"decay = 1.5: .*less than or equal to 1"),
        ({"refresh": 0}, r"refresh = 0: .*greater than or equal to 1"),
    ):
        with pytest.raises(UserError, match=message):
            recipe("standard", **parameters)
    for options, message in (
        ({"decay": 1.0}, "would never learn"),
        ({"perturbation": "fgsm"}, "needs epsilon"),
        ({"epsilon": 0.1}, "says nothing about perturbation = grad"),
        ({"perturbation": "fgsm", "epsilon": 0.1, "step_size": 0.1}, "belongs to perturbation=pgd"),
    ):
        with pytest.raises(UserError, match=message):
            Sgr(**options)
    sgr = Sgr()
    with pytest.raises(UserError, match="not finite"):
        sgr.load_state_dict(state(torch.full((1, 1, 3), float("nan"))))
    model = Net()
    model.last.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"not finite.*learning rate"):
        penalty(sgr, model)
    model, sgr = Net(), Sgr(cov_scale="data_diag")
    images, labels = torch.full((2, *SHAPE), 0.5, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1])
    base = LossParts(torch.zeros(()), views={"clean": View(images, model(images))})
    with pytest.raises(UserError, match="all equal; take unit_diag"):
        sgr(model, images, labels, random=RandomStream(0, torch.arange(2)), progress=0.0, base=base)


def test_presets_are_the_papers_four_perturbations():
    found = {
        name: catalog.find("defenses", name).settings()["perturbation"]
        for name in catalog.plugins("defenses")
        if catalog.find("defenses", name).entry == "sgr"
    }
    assert found == {"sgr": "grad", "sgr_grad": "grad", "sgr_sign": "sign", "fgsm_sgr": "fgsm", "pgd_sgr": "pgd"}


# It works


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_become_more_robust(tmp_path, seed):
    """Linf@0.1 under PGD-40 on all test images: at least ten points above standard training, after 8 epochs."""
    workspace = Workspace(root=tmp_path, data_root=tmp_path, user_zoo=tmp_path / "personal")
    pixels = Pixels(open_split("digits", "test", workspace), torch.device("cpu"))
    examiner = Examiner(
        pixels=pixels, ids=torch.arange(len(pixels)), attack="pgd-40", threat=ThreatModel.parse("Linf@0.1"), seed=0
    )
    accuracies = {}
    for name in ("digits-standard", "digits-gn", "digits-sgr"):
        settings = [f"seed={seed}", "epochs=8", "selection.every=8"]
        run_training(workspace, apply_settings(load_recipe(name), settings), name, Watcher())
        model = load_model(name, workspace, input_shape=(1, 8, 8), num_classes=10).model
        accuracies[name] = examiner.measure(model).accuracies
    standard = accuracies.pop("digits-standard")
    for found in accuracies.values():
        assert found["robust_accuracy"] >= standard["robust_accuracy"] + 0.1
        assert found["clean_accuracy"] >= 0.9

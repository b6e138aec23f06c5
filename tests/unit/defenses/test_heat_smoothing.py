"""HeatSmoothing: the estimate of the gradient's norm, the loss, the teacher, and the heat equation that it solves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from robench.defenses.heat_smoothing import HeatSmoothing, squared_gradient_norm
from robench.errors import UserError
from robench.random_streams import RandomStream
from tests.contracts.test_defenses import SmoothNet
from tests.models import Linear, SmallNet, pictures


def stream(count, seed=3):
    return RandomStream(seed, torch.arange(count), ("test",))


def loss_of(objective, model, images, random=None):
    return objective(model, images, None, random=random or stream(len(images)), progress=0.0)


def estimate(model, images, **options):
    points = images.clone().requires_grad_()
    settings = {"random": stream(len(images)), "kappa": 10, "delta": 0.1, **options}
    return squared_gradient_norm(model, points, model(points), **settings)


@pytest.mark.parametrize("kappa", [1, 3, 8])
def test_the_estimate_of_a_linear_map_is_kappa_over_classes_of_its_squared_norm(kappa):
    model, images = Linear(4, 16), pictures(1).expand(20_000, -1, -1, -1)
    found = estimate(model, images, kappa=kappa).detach()
    expected = kappa / 4 * model.weight.detach().square().sum()
    standard_error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - expected) < 4 * standard_error
    assert standard_error < 0.01 * expected


def test_the_unbiased_scale_has_the_squared_norm_itself():
    images, model = pictures(1).expand(30_000, -1, -1, -1), Linear(4, 16)
    options = {"sigma": 0.5, "noise_share": 0.0, "distance_on": "logits", "kappa": 2, "jl_scale": "unbiased"}
    parts = loss_of(HeatSmoothing(teacher=model, num_rounds=1, **options), model, images).parts
    expected = 0.5**2 / 2 * model.weight.detach().square().sum()
    assert parts["penalty"].item() == pytest.approx(expected.item(), rel=0.02)
    assert parts["distance"].item() == 0


def test_the_estimate_converges_to_the_derivative_as_delta_shrinks():
    model, images = SmoothNet(), pictures(5)
    exact = estimate(model, images, delta=1e-6)
    errors = [(estimate(model, images, delta=delta) - exact).abs().max().item() for delta in (0.02, 0.01, 0.005)]
    assert errors[0] == pytest.approx(2 * errors[1], rel=0.1)
    assert errors[1] == pytest.approx(2 * errors[2], rel=0.1)


def test_a_vanishing_gradient_gives_no_direction():
    model = Linear(4, 16)
    model.weight.data.zero_()
    found = estimate(model, pictures(3))
    assert torch.equal(found.detach(), torch.zeros(3, dtype=torch.float64))
    found.sum().backward()
    assert torch.equal(model.weight.grad, torch.zeros_like(model.weight))


def transcribed(model, teacher, images, random, *, options, rounds):
    """Algorithm 1 with equation 10, one image at a time, its derivative through the whole Jacobian."""
    sigma, kappa, delta = options["sigma"], options["kappa"], options["delta"]
    total = 0.0
    for row, image in enumerate(images):
        own = random[torch.tensor([row])]
        lot = own.at("noise", "chosen").uniform(torch.empty(1, 1, dtype=torch.float64)).item()
        eta = own.at("noise", "gaussian").normal(image[None])[0]
        point = image + sigma * eta if lot < options["noise_share"] else image
        student, taught = model(point[None])[0], teacher(image[None])[0]
        if options["distance_on"] == "softmax":
            student, taught = (torch.exp(v) / torch.exp(v).sum() for v in (student, taught))
        distance = 0.5 * ((student - taught) ** 2).sum()
        output = model(point[None])[0]
        jacobian = torch.func.jacrev(lambda p: model(p[None])[0])(point).flatten(1)
        norm = 0.0
        for i in range(kappa):
            w = own.at("directions", i).normal(output[None])[0] / math.sqrt(len(output))
            gradient = w @ jacobian
            unit = (gradient / gradient.norm()).view(image.shape).detach()
            norm = norm + ((w @ model((point + delta * unit)[None])[0] - w @ output) / delta) ** 2
        if options["jl_scale"] == "unbiased":
            norm = norm * len(output) / kappa
        h = 1 / rounds if options["use_h"] else 1.0
        half = {"alg1": 2.0, "heat": 4.0}[options["penalty_coeff"]]
        total = total + (distance + h * sigma**2 / half * norm) / len(images)
    return total


DEFAULTS = {
    "sigma": 0.3,
    "distance_on": "softmax",
    "noise_share": 0.5,
    "kappa": 3,
    "delta": 0.1,
    "jl_scale": "paper",
    "penalty_coeff": "alg1",
    "use_h": False,
}
CHANGES = [
    {},
    {"distance_on": "logits"},
    {"noise_share": 0.0},
    {"noise_share": 1.0, "delta": 0.01},
    {"jl_scale": "unbiased"},
    {"penalty_coeff": "heat"},
    {"use_h": True, "distance_on": "logits", "noise_share": 0.0},
]
each_change = pytest.mark.parametrize("changes", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))


@each_change
def test_the_loss_is_that_of_the_paper(changes):
    options = {**DEFAULTS, **changes}
    model, images, random = SmoothNet(), pictures(8), stream(8)
    teacher = Linear(4, 16, seed=7).requires_grad_(False)
    found = loss_of(HeatSmoothing(teacher=teacher, num_rounds=5, **options), model, images, random)
    expected = transcribed(model, teacher, images, random, options=options, rounds=5)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-10)
    assert found.parts["distance"] + found.parts["penalty"] == pytest.approx(expected.item(), rel=1e-10)
    assert found.parts["penalty"] > 0.01 * found.parts["distance"], "both matter here"


@each_change
def test_its_gradients_are_those_of_the_formula_with_the_directions_held(changes):
    options = {**DEFAULTS, **changes}
    model, images, random = SmoothNet(), pictures(8), stream(8)
    objective = HeatSmoothing(teacher=Linear(4, 16, seed=7).requires_grad_(False), num_rounds=5, **options)
    loss_of(objective, model, images, random).total.backward()

    def replayed():
        model.replay = iter(model.shown)
        return loss_of(objective, model, images, random).total.item()

    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for position in range(0, len(flat), max(1, len(flat) // 6)):
            before, both = flat[position].item(), []
            for step in (1e-6, -1e-6):
                flat[position] = before + step
                both.append(replayed())
            flat[position] = before
            expected = (both[0] - both[1]) / 2e-6
            assert parameter.grad.view(-1)[position].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


class Recording(nn.Module):
    """A linear net that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.linear, self.shown = Linear(4, 16), []

    def forward(self, images):
        self.shown.append(images.detach().clone())
        return self.linear(images)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_teacher_sees_clean_images_and_the_student_noise_on_a_share(share):
    images, model, teacher = pictures(2000), Recording(), Recording()
    objective = HeatSmoothing(teacher=teacher, num_rounds=1, sigma=0.3, noise_share=share, kappa=2)
    loss_of(objective, model, images)
    assert len(teacher.shown) == 1
    assert torch.equal(teacher.shown[0], images)
    noise = (model.shown[0] - images).flatten(1)
    noisy = noise.abs().sum(1) > 0
    assert abs(noisy.double().mean() - share) <= 4 * math.sqrt(share * (1 - share) / 2000)
    if share:
        assert noise[noisy].std().item() == pytest.approx(0.3, rel=0.02)
    displaced = model.shown[1].view(2, *images.shape) - model.shown[0]
    assert torch.allclose(displaced.flatten(2).norm(dim=2), torch.tensor(0.1, dtype=torch.float64))


def test_steps_leave_the_teacher_bitwise_as_it_was():
    teacher = SmallNet().requires_grad_(False).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = SmallNet().train()
    objective = HeatSmoothing(teacher=teacher, num_rounds=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(objective, model, pictures(6).float()).total.backward()
        optimizer.step()
    assert objective.teacher is teacher
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(model.features[1].running_mean, teacher.features[1].running_mean)


def test_after_a_round_the_student_is_the_teacher_and_part_of_the_state():
    objective = HeatSmoothing(teacher=Linear(5, 16), num_rounds=2)
    assert objective.state_dict() == {}
    student = SmallNet().train()
    objective.finish_round(student)
    assert not any(module.training for module in objective.teacher.modules())
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert student.training
    kept = {name: value.clone() for name, value in objective.state_dict().items()}
    for value in student.state_dict().values():
        value.add_(1)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, kept[name]), name
    resumed = HeatSmoothing(teacher=Linear(5, 16), num_rounds=2)
    resumed.finish_round(student)
    resumed.load_state_dict(kept)
    images = pictures(6).float()
    assert loss_of(resumed, student, images).total.item() == loss_of(objective, student, images).total.item()


def test_in_bfloat16_the_difference_is_still_a_difference():
    model, images = SmallNet().eval(), pictures(64).float()
    objective = HeatSmoothing(teacher=copy.deepcopy(model), num_rounds=1, delta=0.001, noise_share=0.0)
    exact = loss_of(objective, model, images).parts["penalty"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss_of(objective, model, images).parts["penalty"].item() == pytest.approx(exact, rel=1e-3)


def test_a_teacher_of_other_classes_is_refused():
    objective = HeatSmoothing(teacher=Linear(3, 16), num_rounds=1)
    with pytest.raises(UserError, match=r"teacher gives \(3,\) outputs for an image, the student \(4,\).*--set start="):
        loss_of(objective, SmoothNet(), pictures(2))


class Cosines(nn.Module):
    """v(x) = sum over k of amplitude_k cos(k x), one output: the heat equation moves each amplitude by itself."""

    def __init__(self, amplitudes):
        super().__init__()
        self.amplitudes = nn.Parameter(torch.tensor(amplitudes, dtype=torch.float64))

    def forward(self, images):
        x, k = images.flatten(1), torch.arange(1, 1 + len(self.amplitudes), dtype=torch.float64)
        return torch.cos(x * k) @ self.amplitudes[:, None]


def minimise(loss, model):
    """Go to the minimum of a quadratic form, as Newton's method does it in one step."""
    weights = model.amplitudes

    def gradient_at(values):
        weights.data.copy_(values)
        return torch.autograd.grad(loss(), weights)[0]

    start = weights.detach().clone()
    here = gradient_at(start)
    unit = torch.eye(len(start), dtype=start.dtype)
    hessian = torch.stack([gradient_at(start + row) - here for row in unit])
    weights.data.copy_(start - torch.linalg.solve(hessian, here))


def smoothed(sigma, rounds, **options):
    """Return the amplitudes after so many rounds, each the exact minimiser over a period of x, as shares."""
    x = torch.linspace(0, 2 * math.pi, 401, dtype=torch.float64)[:-1].view(-1, 1, 1, 1)
    settings = {"distance_on": "logits", "noise_share": 0.0, "kappa": 20, "jl_scale": "unbiased", "delta": 1e-3}
    objective = HeatSmoothing(
        teacher=Cosines([1.0] * 3), num_rounds=rounds, sigma=sigma, use_h=True, **settings, **options
    )
    model = Cosines([1.0] * 3)
    for _ in range(rounds):
        minimise(lambda: loss_of(objective, model, x).total, model)
        objective.finish_round(model)
    return model.amplitudes.detach()


FREQUENCIES = torch.arange(1, 4, dtype=torch.float64)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize(("coefficient", "variance"), [("heat", 1.0), ("alg1", 2.0)])
def test_rounds_are_implicit_steps_of_the_heat_equation(rounds, coefficient, variance):
    sigma = 0.4
    # v - f = h variance sigma^2 / 2 v'': each step divides the amplitude of frequency k by the same number.
    expected = (1 + variance * sigma**2 * FREQUENCIES**2 / (2 * rounds)) ** -rounds
    assert torch.allclose(smoothed(sigma, rounds, penalty_coeff=coefficient), expected, rtol=0.02)


def test_many_rounds_come_near_the_gaussian_average_and_alg1_near_that_of_twice_the_variance():
    sigma, average = 0.4, {}
    for coefficient in ("heat", "alg1"):
        # The Gaussian average of cos(k x) over variance s is exp(-s k^2 / 2) cos(k x).
        average[coefficient] = -2 * smoothed(sigma, 5, penalty_coeff=coefficient)[0].log().item()
    assert average["heat"] == pytest.approx(sigma**2, rel=0.03)
    assert average["alg1"] == pytest.approx(2 * average["heat"], rel=0.03)


def test_numbers_belong_to_the_example_not_to_the_batch():
    images, model = pictures(6), SmoothNet()
    objective = HeatSmoothing(teacher=Linear(4, 16), num_rounds=1)
    whole = loss_of(objective, model, images).total.item()
    rows = torch.tensor([4, 1, 5]), torch.tensor([0, 3, 2])
    parts = [loss_of(objective, model, images[r], stream(6)[r]).total.item() for r in rows]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-12)

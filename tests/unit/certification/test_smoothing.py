"""Randomised smoothing against a transcription of the algorithm and models whose smoothed form is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from robench.certification import NOISE_CHUNK, NoisyModel, noise_key
from robench.certification.cohen import certify
from robench.certification.effective_margin import effective_margin
from robench.certification.l_bound import l_bound
from robench.certification.predict import predict
from robench.certification.sequential import certify_anytime
from robench.errors import UserError
from tests.models import SmallNet, numbers, pictures

SIGMA = 0.25


class Halfspace(torch.nn.Module):
    """Two classes on either side of a plane: smoothing moves no boundary, so the exact radius is the distance to it."""

    def __init__(self, dimension=16):
        super().__init__()
        self.normal = torch.nn.functional.normalize(numbers(dimension), dim=0).float()

    def distance(self, images):
        return (images.flatten(1) - 0.5) @ self.normal

    def forward(self, images):
        value = self.distance(images)
        return torch.stack([value, -value], 1)


def images_at(model, distances):
    """Images whose signed distances from the plane are these."""
    base = 0.5 + 0 * model.normal
    return torch.stack([base + d * model.normal for d in distances]).view(len(distances), 1, 4, 4)


def ask(model, count, *, classes=2, seed=0, batch_size=400):
    return NoisyModel(model, np.arange(count), seed, classes, batch_size)


def noise_of(ids, samples, purpose, shape, *, sigma=SIGMA, seed=0):
    """The noise of each example, drawn here chunk by chunk."""
    drawn = []
    for example in ids:
        chunks = []
        for chunk in range(-(-samples // NOISE_CHUNK)):
            generator = torch.Generator().manual_seed(noise_key(seed, int(example), purpose, chunk))
            size = min(NOISE_CHUNK, samples - chunk * NOISE_CHUNK)
            chunks.append(torch.empty(size, *shape).normal_(0.0, sigma, generator=generator))
        drawn.append(torch.cat(chunks))
    return drawn


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.02, 0.25])
def test_agrees_with_the_algorithm_line_by_line(sigma):
    model, images, labels = SmallNet().eval(), pictures(6).float(), torch.arange(6) % 5
    found = certify(ask(model, 6, classes=5), images, labels, sigma=sigma, n0=100, n=450, alpha=0.01)
    choosing = noise_of(range(6), 100, "selection", images.shape[1:], sigma=sigma)
    judging = noise_of(range(6), 450, "estimation", images.shape[1:], sigma=sigma)
    certain = 0
    for i in range(6):
        guess = model(images[i] + choosing[i]).argmax(1).bincount(minlength=5).argmax()
        hits = int((model(images[i] + judging[i]).argmax(1) == guess).sum())
        lower = proportion_confint(hits, 450, alpha=2 * 0.01, method="beta")[0]
        assert found.hits[i] == hits
        if lower > 0.5:
            certain += 1
            assert found.prediction[i] == guess
            assert found.radius[i] == pytest.approx(sigma * norm.ppf(lower))
        else:
            assert (found.prediction[i], found.radius[i]) == (-1, 0)
        assert found.correct[i] == (lower > 0.5 and guess == labels[i])
    assert certain >= 3 if sigma == 0.02 else certain < 6


@torch.no_grad()
def test_choosing_and_judging_use_different_noise():
    first, second = (noise_of([0], 100, purpose, (1, 4, 4))[0] for purpose in ("selection", "estimation"))
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


@torch.no_grad()
def test_radius_of_a_halfspace_is_approached_from_below():
    model = Halfspace()
    distances = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.6, -0.3])
    images = images_at(model, distances)
    labels = (distances < 0).long()
    rough, fine = (certify(ask(model, 6), images, labels, sigma=SIGMA, n=n) for n in (1000, 20_000))
    assert fine.correct.all()
    assert (fine.radius <= distances.abs().numpy() + 1e-6).all()
    assert (rough.radius <= distances.abs().numpy() + 1e-6).all()
    assert np.allclose(fine.radius[:4], distances[:4].numpy(), atol=0.02)
    assert (fine.radius > rough.radius).all()
    anytime = certify_anytime(ask(model, 6), images, labels, sigma=SIGMA, n=20_000, within=0.0)
    assert (anytime.radius <= distances.abs().numpy() + 1e-6).all()
    assert np.allclose(anytime.radius[:4], distances[:4].numpy(), atol=0.03)


@torch.no_grad()
def test_a_decision_at_a_radius_stops_early_and_is_right():
    model = Halfspace()
    distances = torch.tensor([0.1, 0.2, 0.29, 0.31, 0.5, 0.7])
    asked = ask(model, 6)
    found = certify_anytime(
        asked, images_at(model, distances), torch.zeros(6).long(), sigma=SIGMA, goal="decision", at=0.3, n=50_000
    )
    assert found.radius.tolist() == pytest.approx([0, 0, 0, 0.3, 0.3, 0.3])
    assert found.correct.tolist() == [False, False, False, True, True, True]
    # Far from the question few samples are enough.
    assert (asked.samples[[0, 1, 4, 5]] < 3000).all()
    assert (asked.samples[[2, 3]] > 3000).all()


@torch.no_grad()
def test_what_is_not_decided_when_the_samples_end_is_not_certified():
    model = Halfspace()
    asked = ask(model, 1)
    found = certify_anytime(
        asked, images_at(model, [0.31]), torch.zeros(1).long(), sigma=SIGMA, goal="decision", at=0.3, n=300
    )
    assert (found.prediction[0], found.radius[0], found.correct[0]) == (-1, 0, False)
    assert asked.samples[0] == 400


@torch.no_grad()
def test_a_table_of_radii_is_not_changed_by_stopping_early():
    model, radii = Halfspace(), (0.1, 0.2, 0.4)
    distances = torch.linspace(0.02, 0.6, 40)
    images, labels = images_at(model, distances), torch.zeros(40).long()
    asked = ask(model, 40)
    early = certify_anytime(asked, images, labels, sigma=SIGMA, n=20_000, radii=radii)
    full = certify(ask(model, 40), images, labels, sigma=SIGMA, n=20_000)
    for radius in radii:
        assert (early.correct & (early.radius > radius)).sum() >= (full.correct & (full.radius > radius)).sum() - 1
    assert asked.samples.mean() < 20_000 / 3


@torch.no_grad()
def test_bonferroni_and_the_randomised_bound():
    model, images = Halfspace(), images_at(Halfspace(), torch.tensor([0.2, 0.4]))
    labels = torch.zeros(2).long()
    plain = certify(ask(model, 2), images, labels, sigma=SIGMA, n=1000)
    shared = certify(ask(model, 2), images, labels, sigma=SIGMA, n=1000, alpha_shared_by=100)
    direct = certify(ask(model, 2), images, labels, sigma=SIGMA, n=1000, alpha=0.001 / 100)
    tighter = certify(ask(model, 2), images, labels, sigma=SIGMA, n=1000, bound="randomized")
    assert np.array_equal(shared.radius, direct.radius)
    assert (shared.radius < plain.radius).all()
    assert (tighter.radius > plain.radius).all()
    assert np.array_equal(tighter.hits, plain.hits)


@torch.no_grad()
def test_deterministic_guess_takes_one_pass_and_judges_with_the_same_noise():
    model, images = Halfspace(), images_at(Halfspace(), torch.tensor([0.2, 0.4, -0.2]))
    labels = torch.tensor([0, 0, 1])
    asked = ask(model, 3)
    plain = certify(asked, images, labels, sigma=SIGMA, n=500, guess="plain")
    noisy = certify(ask(model, 3), images, labels, sigma=SIGMA, n=500)
    assert np.array_equal(plain.hits, noisy.hits)
    assert asked.samples.tolist() == [500] * 3
    assert asked.passes == 3 * 501


class Spread(torch.nn.Module):
    """Says 0, 1 and 2 equally often under noise, and never 3."""

    def forward(self, images):
        thirds = (images.flatten(1).sum(1) * 7919).floor().remainder(3).long()
        return torch.nn.functional.one_hot(thirds, 4).float()


@torch.no_grad()
def test_top_k_counts_what_stays_in_the_set_and_abstention_is_never_correct():
    images, labels = pictures(4).float(), torch.tensor([0, 1, 2, 3])
    one = certify(ask(Spread(), 4, classes=4), images, labels, sigma=SIGMA, n=500)
    assert (one.prediction == -1).all()
    assert not one.correct.any()
    three = certify(ask(Spread(), 4, classes=4), images, labels, sigma=SIGMA, n=500, top_k=3)
    assert three.hits.tolist() == [500] * 4
    assert three.correct.tolist() == [True, True, True, False]
    answers = predict(ask(Spread(), 4, classes=4), images, labels, sigma=SIGMA, n=500)
    assert (answers.prediction == -1).all()
    assert not answers.correct.any()


@torch.no_grad()
def test_prediction_answers_where_one_class_leads():
    model, distances = Halfspace(), torch.tensor([0.2, -0.2, 0.0])
    found = predict(ask(model, 3), images_at(model, distances), torch.tensor([0, 1, 0]), sigma=SIGMA, n=500)
    assert found.prediction.tolist() == [0, 1, -1]


class Averaged(torch.nn.Module):
    """Logits whose softmax is exactly what a halfspace's answer averages to."""

    def __init__(self):
        super().__init__()
        self.plane = Halfspace()

    def forward(self, images):
        share = torch.special.ndtr(self.plane.distance(images) / SIGMA).clamp(1e-7, 1 - 1e-7)
        return torch.stack([share, 1 - share], 1).log()


@torch.no_grad()
def test_l_bound_of_an_exact_average_stays_below_the_exact_radius():
    model, distances = Averaged(), torch.tensor([0.05, 0.2, 0.5, -0.3])
    images, labels = images_at(model.plane, distances), torch.tensor([0, 0, 1, 1])
    found = l_bound(ask(model, 4), images, labels, sigma=SIGMA)
    exact = SIGMA * math.sqrt(math.pi / 2) * (2 * norm.cdf(distances.abs() / SIGMA) - 1)
    assert np.allclose(found.radius, exact, atol=1e-5)
    assert (found.radius <= distances.abs().numpy() + 1e-6).all()
    assert (found.radius <= SIGMA * math.sqrt(math.pi / 2)).all()
    table = l_bound(ask(model, 4), images, labels, sigma=SIGMA, form="true-class")
    assert table.radius[2] == 0
    assert np.allclose(table.radius[[0, 1, 3]], found.radius[[0, 1, 3]], atol=1e-6)


@torch.no_grad()
def test_premise_gap_is_small_for_an_average_over_little_noise_and_large_for_a_step():
    averaged, step = Averaged(), Halfspace()
    step_model = torch.nn.Sequential(step)
    images, labels = images_at(step, torch.tensor([0.02, 0.05])), torch.zeros(2).long()
    sharp = lambda x: 1000 * step_model(x)  # noqa: E731
    near = l_bound(ask(averaged, 2), images, labels, sigma=0.01, premise_samples=400)
    far = l_bound(ask(sharp, 2), images, labels, sigma=SIGMA, premise_samples=400)
    # The step's average is Phi(d / sigma) of one class where the step says 1: sqrt(2) (1 - Phi) apart.
    expected = math.sqrt(2) * (1 - norm.cdf(np.array([0.02, 0.05]) / SIGMA))
    assert np.allclose(far.premise_gap, expected, atol=0.08)
    assert (near.premise_gap < 0.01).all()


def test_effective_margin_of_a_linear_model_is_the_distance_to_the_nearest_boundary():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4)).double()
    images, labels = pictures(5), torch.arange(5) % 4
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    found = effective_margin(ask(model, 5, classes=4), images, labels)
    logits = images.flatten(1) @ weight.T + bias
    for i in range(5):
        top = int(logits[i].argmax())
        ways = [(logits[i, top] - logits[i, k]) / (weight[top] - weight[k]).norm() for k in range(4) if k != top]
        assert found.radius[i] == pytest.approx(float(min(ways)))
        assert found.prediction[i] == top


def test_effective_margin_of_a_relu_net_agrees_with_finite_differences():
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)
    ).double()
    with torch.no_grad():
        for position, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * numbers(*parameter.shape, seed=position))
    images = pictures(3)
    found = effective_margin(ask(model, 3, classes=3), images, torch.zeros(3).long())
    with torch.no_grad():
        for i in range(3):
            logits = model(images[i : i + 1])[0]
            top = int(logits.argmax())
            bumps = 1e-6 * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
            slopes = (model(images[i] + bumps) - model(images[i] - bumps)) / 2e-6
            ways = [(logits[top] - logits[k]) / (slopes[:, top] - slopes[:, k]).norm() for k in range(3) if k != top]
            assert found.radius[i] == pytest.approx(float(min(ways)), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, y: certify(m, x, y, sigma=SIGMA, n=9), "certificate cohen: .*smallest that can is 10"),
        (lambda m, x, y: certify(m, x, y, sigma=SIGMA, alpha=1.5), "alpha lies between 0 and 1"),
        (lambda m, x, y: certify(m, x, y, sigma=SIGMA, top_k=2), "certificate cohen: top_k = 2 of 2 classes"),
        (
            lambda m, x, y: certify_anytime(m, x, y, sigma=SIGMA, goal="decision"),
            "certificate anytime: goal=decision needs at=RADIUS",
        ),
        (
            lambda m, x, y: certify_anytime(m, x, y, sigma=SIGMA, at=0.5),
            "certificate anytime: at=0.5 is of another goal; write anytime:goal=decision",
        ),
        (
            lambda m, x, y: certify_anytime(m, x, y, sigma=SIGMA, n=3),
            "certificate anytime: n = 3 samples certify nothing",
        ),
        (
            lambda m, x, y: predict(m, x, y, sigma=SIGMA, n=2),
            "certificate smoothed-prediction: n = 2 samples can tell no class",
        ),
        (lambda m, x, y: l_bound(m, x, y, sigma=SIGMA, top_k=2), "certificate l-bound: top_k = 2 leaves no class of 2"),
    ],
)
def test_questions_without_an_answer_are_refused(call, words):
    model = Halfspace()
    with pytest.raises(UserError, match=words):
        call(ask(model, 1), images_at(model, [0.1]), torch.zeros(1).long())

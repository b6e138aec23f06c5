"""Figures that are computed: their numbers against independent ones."""

from __future__ import annotations

import numpy as np
import pytest

from robench.figures.correlated_noise import covariance
from robench.figures.correlated_noise import draw as draw_noise
from robench.figures.entropy_sampling import draw as draw_sampling
from robench.figures.entropy_sampling import gibbs_density, loss
from robench.figures.logit_scaling import draw as draw_logits
from robench.figures.smoothing_sketch import contour, regularised
from robench.papers.claims import judge
from robench.papers.definitions import load_paper
from robench.papers.smoothing_toy import SmoothingToy, adversarial_distance


def in_cosines(toy: SmoothingToy, step: int, x: np.ndarray, waves: int = 20_000) -> np.ndarray:
    """f_step without a grid: each cosine of f_0 loses the factor 1 + h sigma^2 k^2 in every step."""
    edges = np.array([-1.0, toy.outlier, toy.outlier + toy.width, 0.0, 1.0])
    heights = np.array([1.0, -1.0, 1.0, -1.0])
    k = np.pi / 2 * np.arange(1, waves + 1)
    ends = np.sin(np.outer(k, edges + 1)) / k[:, None]
    amplitude = (np.diff(ends, axis=1) * heights).sum(1) / (1 + toy.time_step * toy.sigma**2 * k**2) ** step
    mean = (np.diff(edges) * heights).sum() / 2
    found: np.ndarray = mean + np.cos(np.outer(x + 1, k)) @ amplitude
    return found


@pytest.mark.parametrize("step", [1, 5, 8])
def test_the_toy_solves_its_equation(step: int) -> None:
    toy = SmoothingToy()
    found = toy.iterates(step)[-1]
    x = toy.grid[::40]
    assert found[::40] == pytest.approx(in_cosines(toy, step, x), abs=2e-4)


@pytest.mark.parametrize("step", [0, 1, 5, 8])
def test_the_distance_does_not_depend_on_the_grid(step: int) -> None:
    coarse, fine = (SmoothingToy(points=n) for n in (4001, 16_001))
    distances = [toy.distance(toy.iterates(step)[-1]) for toy in (coarse, fine)]
    assert distances[0] == pytest.approx(distances[1], abs=2e-5)
    assert distances[0] == adversarial_distance(step)


def test_an_iterate_minimises_the_penalised_distance() -> None:
    """Against any change of it, by the integral itself."""
    toy = SmoothingToy(points=201)
    f = toy.start()
    v = toy.iterate(f)
    step = toy.grid[1] - toy.grid[0]
    weights = np.full(len(f), step)
    weights[[0, -1]] /= 2

    def value(u: np.ndarray) -> float:
        slope = np.diff(u) / step
        return float((weights * (u - f) ** 2).sum() / 2 + toy.time_step * toy.sigma**2 / 2 * (step * slope**2).sum())

    stream = np.random.default_rng(0)
    assert all(value(v) < value(v + 1e-3 * stream.normal(size=len(f))) for _ in range(20))


def test_the_claim_of_figure_4_says_what_comes_out() -> None:
    """The claim is about an f0 that nobody has: what ours gives is said, and decides nothing."""
    (claim,) = [c for c in load_paper("heatsmoothing").claims if c.id == "heat-c11"]
    judged = judge(claim, pytest.fail)  # type: ignore[arg-type]
    assert judged.verdict == "not measured"
    assert "without a formula" in (claim.needs or "")
    assert f"from {adversarial_distance(0):.2f} to {adversarial_distance(5):.2f} by f5" in (claim.note or "")


def test_the_density_is_the_formula_and_has_mass_one() -> None:
    x = np.linspace(0.0, 1.0, 401)
    density = gibbs_density(x, loss(x), 0.4, 60.0)
    assert ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum() == pytest.approx(1)
    ratio = np.log(density[300] / density[160])
    expected = (loss(x[300]) - 30 * (x[300] - 0.4) ** 2) - (loss(x[160]) - 30 * (x[160] - 0.4) ** 2)
    assert ratio == pytest.approx(expected)
    fine = np.linspace(0.0, 1.0, 10 * 400 + 1)
    assert density == pytest.approx(gibbs_density(fine, loss(fine), 0.4, 60.0)[::10], rel=1e-4)


def test_samples_follow_the_density_and_are_always_the_same() -> None:
    (many,) = draw_sampling(None, samples=20_000)  # type: ignore[arg-type, list-item]
    samples = np.array(many.series[2].x)  # type: ignore[union-attr]
    x = np.linspace(0.0, 1.0, 4001)
    density = gibbs_density(x, loss(x), 0.4, 60.0)
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    ranks = np.interp(samples, x, total)
    assert np.abs(ranks - np.linspace(0, 1, len(ranks))).max() < 1.63 / np.sqrt(len(ranks))  # Kolmogorov, 1 %
    assert draw_sampling(None) == draw_sampling(None)  # type: ignore[arg-type]


def test_regularisation_in_two_dimensions_solves_its_equation() -> None:
    f = np.sign(np.random.default_rng(0).normal(size=(7, 9)))
    strength = 0.02
    laplacian = np.zeros((63, 63))
    for i in range(7):
        for j in range(9):
            for (a, b), scale in (((i + 1, j), 6), ((i - 1, j), 6), ((i, j + 1), 8), ((i, j - 1), 8)):
                # Outside stands the mirrored inside.
                p, q = 6 - abs(6 - abs(a)), 8 - abs(8 - abs(b))
                laplacian[9 * i + j, 9 * p + q] += scale**2
                laplacian[9 * i + j, 9 * i + j] -= scale**2
    expected = np.linalg.solve(np.eye(63) - 2 * strength * laplacian, f.ravel()).reshape(f.shape)
    assert regularised(f, strength) == pytest.approx(expected)


def test_a_contour_lies_where_the_function_is_zero() -> None:
    axis = np.linspace(0, 1, 41)
    x, y = contour((axis[:, None] - 0.5) ** 2 + (axis - 0.5) ** 2 - 0.09)
    assert np.hypot(np.array(x) - 0.5, np.array(y) - 0.5) == pytest.approx(0.3, abs=1e-3)
    assert len(x) % 2 == 0
    lengths = np.hypot(np.diff(x)[::2], np.diff(y)[::2])
    assert lengths.sum() == pytest.approx(2 * np.pi * 0.3, rel=1e-2)


def test_scaling_a_logit_takes_its_gradient_away() -> None:
    _, slope = draw_logits(None, scale=3.0, shift=2.0, sample=1.0)  # type: ignore[arg-type]
    at = {s.title: dict(zip(s.x, s.y, strict=True))[1.0] for s in slope.series}  # type: ignore[union-attr]
    assert list(at.values()) == pytest.approx([1 / (1 + np.exp(z)) for z in (1, 3, 3)])


def test_noise_has_the_covariance_of_section_4_3() -> None:
    matrix = covariance(4.0, 3, 5)
    assert matrix.shape == (45, 45)
    assert matrix[0, 7] == pytest.approx(np.exp(-np.hypot(1, 2) / 4))
    assert matrix[0, 15] == 0.5
    assert np.linalg.eigvalsh(matrix).min() > 0
    (samples,) = draw_noise(None, form="samples", decay_lengths=(1.0, 12.0))  # type: ignore[arg-type]
    rough, smooth = (p.astype(float) for p in samples.pictures)  # type: ignore[union-attr]
    assert np.abs(np.diff(smooth)).mean() < np.abs(np.diff(rough)).mean() / 2

"""Bounds by their definitions, by published constants, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest, norm

from robench.certification.sequential import looks
from robench.errors import UserError
from robench.smoothing_bounds import (
    anytime_lower,
    anytime_upper,
    clopper_pearson_lower,
    fewest_samples,
    largest_radius,
    log_evidence,
    radius_of,
    randomized_lower,
    refutes_at_least,
    refutes_at_most,
    share_needed,
    two_sided_p_value,
)

SHARES = [0.5, 0.75, 0.9, 0.99, 0.9999]


def test_published_constants():
    assert radius_of(clopper_pearson_lower(1000, 1000, 0.001), 0.25) == pytest.approx(0.61582, abs=5e-6)
    assert radius_of(clopper_pearson_lower(10_000, 10_000, 0.001), 0.1) == pytest.approx(0.31986, abs=5e-6)
    assert radius_of(clopper_pearson_lower(100_000, 100_000, 0.001), 1.0) == pytest.approx(3.8115, abs=5e-5)
    assert largest_radius(1000, 0.001, 0.25) == pytest.approx(0.61582, abs=5e-6)


def test_clopper_pearson_is_the_beta_quantile():
    hits, samples = np.array([0, 1, 50, 99, 100]), 100
    expected = np.where(hits > 0, beta.ppf(0.01, np.maximum(hits, 1), samples - hits + 1), 0.0)
    assert np.allclose(clopper_pearson_lower(hits, samples, 0.01), expected)


def test_randomised_bound_lies_between_clopper_pearson_of_this_and_of_one_more_hit():
    hits = np.array([3, 50, 99])
    low, high = clopper_pearson_lower(hits, 100, 0.01), clopper_pearson_lower(hits + 1, 100, 0.01)
    for uniform in (0.1, 0.5, 0.9):
        found = randomized_lower(hits, 100, 0.01, uniform)
        assert ((found > low) & (found < high)).all()
    assert np.allclose(randomized_lower(hits, 100, 0.01, 1.0), low)
    assert np.allclose(randomized_lower(hits, 100, 0.01, 0.0), high)


def test_prediction_test_is_the_exact_binomial_one():
    for first, second in [(5, 5), (9, 1), (60, 40), (1000, 3), (0, 0)]:
        expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        assert two_sided_p_value(first, second) == pytest.approx(expected)


def test_evidence_is_the_integral_of_likelihood_ratios():
    hits, samples, supposed = 37, 40, 0.7
    q = np.linspace(supposed, 1, 400_001)[1:-1]
    ratio = (q / supposed) ** hits * ((1 - q) / (1 - supposed)) ** (samples - hits)
    weight = beta.pdf(q, 0.5, 0.5) / beta.sf(supposed, 0.5, 0.5)
    expected = math.log(np.trapezoid(ratio * weight, q))
    assert log_evidence(hits, samples, supposed) == pytest.approx(expected, rel=1e-3)
    assert log_evidence(0, 0, 0.3) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.6])
def test_evidence_of_one_more_sample_never_grows_on_average_under_the_supposition(p):
    supposed = 0.6
    for samples in (0, 3, 40):
        for hits in range(samples + 1):
            now = math.exp(log_evidence(hits, samples, supposed))
            hit, miss = (math.exp(log_evidence(hits + x, samples + 1, supposed)) for x in (1, 0))
            assert p * hit + (1 - p) * miss <= now * (1 + 1e-9)


def test_anytime_bounds_mirror_each_other_and_tighten():
    assert np.allclose(anytime_upper([3], [10], 0.01), 1 - anytime_lower([7], [10], 0.01))
    bounds = [anytime_lower(0.9 * n, n, 0.001) for n in (100, 1000, 10_000)]
    assert bounds == sorted(bounds)
    assert 0.88 < bounds[-1] < 0.9
    fixed = clopper_pearson_lower(np.arange(0, 1001, 50), 1000, 0.001)
    assert (anytime_lower(np.arange(0, 1001, 50), 1000, 0.001) <= fixed + 1e-12).all()


def at_most(wrong, runs, alpha):
    """Say whether so many wrong runs are compatible with a rate of `alpha` at most (one in a thousand is refused)."""
    return binom.sf(wrong - 1, runs, alpha) > 0.001


@pytest.mark.parametrize("p", SHARES)
def test_fixed_bounds_are_wrong_at_most_alpha_of_the_time(p):
    """Exactly: the probability of the counts whose bound exceeds p."""
    samples, alpha = 200, 0.01
    counts = np.arange(samples + 1)
    chance = binom.pmf(counts, samples, p)
    wrong = clopper_pearson_lower(counts, samples, alpha) > p
    assert chance[wrong].sum() <= alpha * (1 + 1e-9)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_the_randomised_bound_is_wrong_exactly_alpha_of_the_time(p):
    samples, alpha = 200, 0.01
    counts = np.arange(samples + 1)
    chance = binom.pmf(counts, samples, p)
    likely = counts[chance > 1e-9]
    uniform = (np.arange(400) + 0.5) / 400
    missed = np.array([randomized_lower(likely, samples, alpha, u) > p for u in uniform]).mean(0)
    assert (chance[likely] * missed).sum() == pytest.approx(alpha, rel=0.05)


@pytest.mark.parametrize("p", SHARES)
def test_anytime_bounds_are_wrong_at_most_alpha_of_the_time_at_the_worst_moment(p):
    """20,000 runs, each looked at after every sample up to 100 and then ever more rarely, stopped where it is worst."""
    runs, alpha, generator = 20_000, 0.05, np.random.default_rng(1)
    hits, samples = np.zeros(runs, np.int64), 0
    too_high, too_low = np.zeros(runs, np.bool_), np.zeros(runs, np.bool_)
    for more in [1] * 100 + [10] * 40 + [100] * 15 + [1000] * 3:
        hits += generator.binomial(more, p, runs)
        samples += more
        counts, place = np.unique(hits, return_inverse=True)
        too_high |= refutes_at_most(counts, samples, p, alpha)[place]
        too_low |= refutes_at_least(counts, samples, p, alpha)[place]
    assert at_most(too_high.sum(), runs, alpha)
    assert at_most(too_low.sum(), runs, alpha)


def test_without_the_correction_the_fixed_bound_is_wrong_far_more_often():
    """What the anytime bounds are for: the fixed bound looked at again and again misses far more than alpha."""
    runs, alpha, generator = 2000, 0.05, np.random.default_rng(2)
    hits, wrong = np.zeros(runs, np.int64), np.zeros(runs, np.bool_)
    for samples in range(10, 1001, 10):
        hits += generator.binomial(10, 0.75, runs)
        counts, place = np.unique(hits, return_inverse=True)
        wrong |= (clopper_pearson_lower(counts, samples, alpha) > 0.75)[place]
    assert wrong.mean() > 3 * alpha


def test_refuting_a_share_is_having_a_bound_above_it():
    hits, samples = np.array([80, 95, 100]), 100
    lower = anytime_lower(hits, samples, 0.01)
    assert refutes_at_most(hits, samples, lower - 1e-6, 0.01).all()
    assert not refutes_at_most(hits, samples, lower + 1e-6, 0.01).any()


def test_radius_and_share_are_inverse_and_nothing_is_certified_below_one_half():
    assert np.allclose(radius_of(share_needed([0.1, 0.5, 1.0], 0.25), 0.25), [0.1, 0.5, 1.0])
    assert radius_of([0.0, 0.3, 0.5], 0.25).tolist() == [0.0, 0.0, 0.0]
    assert share_needed(0.5, 0.5) == pytest.approx(norm.cdf(1))


def test_fewest_samples_is_where_certificates_begin():
    for alpha in (0.5, 0.05, 0.001):
        fewest = fewest_samples(alpha)
        assert clopper_pearson_lower(fewest, fewest, alpha) > 0.5
        assert fewest == 1 or clopper_pearson_lower(fewest - 1, fewest - 1, alpha) <= 0.5


def test_looks_add_up():
    for n in (1, 99, 100, 101, 1000, 12_345):
        steps = list(looks(n))
        assert sum(more for _, more in steps) == n
        assert [first for first, _ in steps] == [sum(m for _, m in steps[:i]) for i in range(len(steps))]
        assert all(first % 100 == 0 for first, _ in steps)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_wrong_levels_are_refused(alpha):
    with pytest.raises(UserError, match="probability of a wrong certificate"):
        clopper_pearson_lower(5, 10, alpha)


def test_impossible_counts_are_refused():
    with pytest.raises(UserError, match="no share"):
        clopper_pearson_lower(11, 10, 0.01)

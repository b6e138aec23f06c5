"""Confidence sequences: they cover however often one looks, and shrink as they should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import betabinom, chi2, norm

from robench.confidence_sequences import RunningBounds, bounds, draws_needed, log_ratio

RUNS = 20_000
LIMIT = np.log(20)


def drawings(total, of, runs=RUNS, seed=0):
    """(of, runs): successes after each draw, of many drawings of the whole list in random order."""
    random = np.random.default_rng(seed)
    hits = np.tile(np.arange(of) < total, (runs, 1))
    return random.permuted(hits, axis=1).cumsum(1).T


def share_missed(total, of, misses):
    """The share of drawings in which `misses(successes, drawn)` is true at any moment."""
    missed = np.zeros(RUNS, bool)
    for drawn, successes in enumerate(drawings(total, of), start=1):
        missed |= misses(successes, drawn)
    return missed.mean()


@pytest.mark.parametrize(("total", "of"), [(0, 200), (3, 200), (40, 200), (100, 200), (190, 200), (75, 150), (13, 40)])
def test_the_true_share_is_covered_at_all_moments_together(total, of):
    missed = share_missed(total, of, lambda k, t: log_ratio(total, successes=k, drawn=t, of=of) >= LIMIT)
    # Ville's inequality bounds it by 5 %; three standard errors of 20,000 runs are allowed for.
    assert missed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / RUNS)


def test_it_is_not_wider_than_it_needs_to_be_by_far():
    """The bound is used up to a good part: an interval of everything would cover, too."""
    missed = [
        share_missed(m, 200, lambda k, t, m=m: log_ratio(m, successes=k, drawn=t, of=200) >= LIMIT) for m in (40, 100)
    ]
    assert min(missed) > 0.01


def test_an_interval_for_one_look_does_not_cover_many_looks():
    """The simulation can tell: the textbook's interval, looked at after every example, misses far too often."""
    total, of = 100, 200

    def misses(k, t):
        p = (k + 2) / (t + 4)
        spread = np.sqrt(p * (1 - p) / (t + 4) * (of - t) / (of - 1))
        return (np.abs(p - total / of) > norm.ppf(0.975) * spread) & (t >= 20) & (t < of)

    assert share_missed(total, of, misses) > 0.2


def test_a_likelihood_ratio_without_the_prior_does_not_cover_many_looks():
    """Nor does the best m's probability in place of the prior's: that is no martingale, and nothing bounds it."""
    total, of = 100, 200
    limit = chi2.ppf(0.95, 1) / 2  # Wilks, for one look

    def misses(k, t):
        best = np.clip(np.round(k / t * of).astype(int), k, of - t + k)
        ratio = log_ratio(total, successes=k, drawn=t, of=of) - log_ratio(best, successes=k, drawn=t, of=of)
        return ratio >= limit

    assert share_missed(total, of, misses) > 0.2


def test_the_ratio_is_prior_over_beta_binomial_posterior():
    """An independent transcription of the paper's section 2.1, with scipy's distributions."""
    of = 30
    m = np.arange(of + 1)
    for drawn, successes in ((0, 0), (1, 1), (7, 0), (12, 5), (29, 20), (30, 11)):
        prior = betabinom.pmf(m, of, 1, 1)
        posterior = betabinom.pmf(m - successes, of - drawn, 1 + successes, 1 + drawn - successes)
        with np.errstate(divide="ignore"):
            expected = np.log(prior) - np.log(posterior)
        found = log_ratio(m, successes=successes, drawn=drawn, of=of)
        assert np.array_equal(np.isinf(found), posterior == 0)
        possible = posterior > 0
        assert found[possible] == pytest.approx(expected[possible], abs=1e-9)


def test_one_after_another_gives_the_intersection_of_all_sets():
    of = 60
    for seed in range(30):
        hits = np.diff(drawings(20 + seed, of, runs=1, seed=seed)[:, 0], prepend=0).astype(bool)
        running, m = RunningBounds(of), np.arange(of + 1)
        allowed = np.ones(of + 1, bool)
        for drawn, hit in enumerate(hits, start=1):
            running.add(hit)
            now = log_ratio(m, successes=int(hits[:drawn].sum()), drawn=drawn, of=of) < LIMIT
            allowed = allowed & now if (allowed & now).any() else now
            assert (running.low, running.high) == (m[allowed][0], m[allowed][-1])
            assert bounds(running.successes, drawn, of) == (m[now][0], m[now][-1])
            assert allowed.sum() == running.high - running.low + 1, "there are no gaps"


def test_it_is_exact_when_everything_was_drawn_even_after_a_miss():
    of = 400
    running = RunningBounds(of)
    # An order that no shuffle gives: all successes first. The true share is excluded for long.
    for hit in [True] * 100 + [False] * 300:
        running.add(hit)
        if running.drawn == 100:
            assert running.low > 100
    assert (running.low, running.high, running.width) == (100, 100, 0.0)
    with pytest.raises(ValueError, match="all 400"):
        running.add(True)


def test_before_the_first_draw_nothing_is_known():
    assert RunningBounds(7).width == 1.0
    assert bounds(0, 0, 7) == (0, 7)
    with pytest.raises(ValueError, match="no share"):
        bounds(3, 2, 7)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93])
def test_more_examples_are_needed_for_less_width(share):
    needed = [draws_needed(share, 2000, width=width) for width in (0.2, 0.1, 0.05, 0.02)]
    assert needed == sorted(needed)
    for width, count in zip((0.2, 0.1, 0.05, 0.02), needed, strict=True):
        low, high = bounds(round(share * count), count, 2000)
        assert (high - low) / 2000 <= width
    assert draws_needed(share, 2000, width=1e-9) == 2000

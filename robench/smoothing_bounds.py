"""Bounds on how often a smoothed classifier gives one answer, and the radii that follow.

A base classifier is asked about n noisy copies of an image and gives one class k times (Cohen et al.,
arXiv:1902.02918). What is wanted is a lower bound on the probability p of that class which is wrong with probability
alpha at most, because

    R = sigma * Phi^-1(lower bound)                                                      (theorem 1)

is then a radius within which the smoothed classifier surely keeps its answer. With n fixed beforehand the bound is
Clopper and Pearson's. Who wants to stop when it is enough needs one that holds at every moment together: here the
likelihood ratio of a mixture over all larger p (Robbins' method of mixtures; for smoothing Voracek, arXiv:2406.17830).
Its ratio against a supposed p0,

    M_t(p0) = integral over q > p0 of w(q) (q / p0)^k ((1 - q) / (1 - p0))^(t - k) dq,

is a supermartingale that begins at 1 whenever p <= p0, because the factor of one draw has the expectation
p q / p0 + (1 - p) (1 - q) / (1 - p0) <= 1. By Ville's inequality it ever reaches 1 / alpha with probability alpha at
most, so p0 can be refuted at any moment. The weight w is Jeffreys' prior, Beta(1/2, 1/2), cut off below p0.

All functions take arrays and treat each entry apart.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robench.errors import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Jeffreys' prior.
_PRIOR = 0.5


def clopper_pearson_lower(hits: ArrayLike, samples: ArrayLike, alpha: float) -> Floats:
    """Return the exact one-sided lower bound of a share: wrong with probability `alpha` at most.

    Raises UserError for alpha outside (0, 1) or hits that are no share.
    """
    k, n = _shares(hits, samples, alpha)
    # Imported here: it brings scipy and pandas, a second that no listing should wait for.
    from statsmodels.stats.proportion import proportion_confint

    low, _ = proportion_confint(k, n, alpha=2 * alpha, method="beta")
    return np.where(k == 0, 0.0, np.asarray(low, np.float64))


def randomized_lower(hits: ArrayLike, samples: ArrayLike, alpha: float, uniform: ArrayLike) -> Floats:
    """Return the randomised Clopper-Pearson bound (Stevens 1950): wrong with probability `alpha`, not less.

    A uniform number in [0, 1) for each entry, drawn beforehand, decides how much of the probability of what was
    observed counts as more extreme: the bound is the p at which P(X > k) + U P(X = k) = alpha. It is never below
    Clopper and Pearson's, which is the case U = 1.
    """
    from scipy.stats import binom

    k, n = _shares(hits, samples, alpha)
    share = np.broadcast_to(np.asarray(uniform, np.float64), k.shape)
    low, high = np.zeros(k.shape), np.ones(k.shape)
    for _ in range(60):
        middle = (low + high) / 2
        extreme = binom.sf(k, n, middle) + share * binom.pmf(k, n, middle)
        low, high = np.where(extreme <= alpha, middle, low), np.where(extreme <= alpha, high, middle)
    return low


def log_evidence(hits: ArrayLike, samples: ArrayLike, supposed: ArrayLike) -> Floats:
    """Return log M_t(p0): the evidence that the true share is above `supposed`, for 0 < supposed < 1.

    Where it reaches log(1 / alpha), at whatever moment one chooses to look, the supposition p <= p0 is refuted at level
    alpha.
    """
    from scipy.special import betaln, log1p

    k, n = np.asarray(hits, np.float64), np.asarray(samples, np.float64)
    p0 = np.asarray(supposed, np.float64)
    after = betaln(_PRIOR + k, _PRIOR + n - k) + _log_upper(_PRIOR + k, _PRIOR + n - k, p0)
    before = betaln(_PRIOR, _PRIOR) + _log_upper(np.full(p0.shape, _PRIOR), np.full(p0.shape, _PRIOR), p0)
    with np.errstate(divide="ignore", invalid="ignore"):
        null = np.where(k > 0, k * np.log(p0), 0.0) + np.where(n > k, (n - k) * log1p(-p0), 0.0)
    return np.asarray(after - before - null, np.float64)


def refutes_at_most(hits: ArrayLike, samples: ArrayLike, supposed: ArrayLike, alpha: float) -> Bools:
    """Tell whether p <= supposed is refuted, at this moment or any other, at level `alpha`."""
    _check_alpha(alpha)
    return np.asarray(log_evidence(hits, samples, supposed) >= -math.log(alpha))


def refutes_at_least(hits: ArrayLike, samples: ArrayLike, supposed: ArrayLike, alpha: float) -> Bools:
    """Tell whether p >= supposed is refuted, at this moment or any other, at level `alpha`."""
    k, n = np.asarray(hits, np.int64), np.asarray(samples, np.int64)
    return refutes_at_most(n - k, n, 1 - np.asarray(supposed, np.float64), alpha)


def anytime_lower(hits: ArrayLike, samples: ArrayLike, alpha: float) -> Floats:
    """Return a lower bound of a share that holds at every moment together with probability 1 - `alpha` at least.

    It is the largest supposition below which all are refuted; 0 where none is.
    """
    k, n = _shares(hits, samples, alpha)
    # Evidence against p0 falls as p0 grows towards the observed share, where there is none.
    low, high = np.zeros(k.shape), np.clip(k / np.maximum(n, 1), 0.0, 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        inside = (middle > 0) & (middle < 1)
        refuted = np.zeros(k.shape, np.bool_)
        refuted[inside] = refutes_at_most(k[inside], n[inside], middle[inside], alpha)
        low, high = np.where(refuted, middle, low), np.where(refuted, high, middle)
    return low


def anytime_upper(hits: ArrayLike, samples: ArrayLike, alpha: float) -> Floats:
    """Return an upper bound of a share that holds at every moment together; see :func:`anytime_lower`."""
    k, n = _shares(hits, samples, alpha)
    return 1 - anytime_lower(n - k, n, alpha)


def radius_of(lower: ArrayLike, sigma: float) -> Floats:
    """Return sigma Phi^-1(lower), 0 where the bound is not above 1/2: there the classifier abstains."""
    from scipy.special import ndtri

    p = np.asarray(lower, np.float64)
    return np.where(p > 0.5, sigma * ndtri(np.maximum(p, 0.5)), 0.0)


def share_needed(radius: ArrayLike, sigma: float) -> Floats:
    """Return the probability that a certificate of `radius` needs: Phi(radius / sigma)."""
    from scipy.special import ndtr

    return np.asarray(ndtr(np.asarray(radius, np.float64) / sigma), np.float64)


def largest_radius(samples: int, alpha: float, sigma: float) -> float:
    """Return the largest radius that so many samples can certify, all of them hits: sigma Phi^-1(alpha^(1/n))."""
    return max(0.0, sigma * NormalDist().inv_cdf(alpha ** (1 / samples)))


def fewest_samples(alpha: float) -> int:
    """Return how many samples it takes to certify anything at all: the smallest n with alpha^(1/n) > 1/2."""
    return math.floor(math.log(alpha) / math.log(0.5)) + 1


def two_sided_p_value(first: ArrayLike, second: ArrayLike) -> Floats:
    """Return the p-value of the hypothesis that two classes are equally frequent (predict of Cohen et al.).

    `first` and `second` are how often the two most frequent classes came, first >= second.
    """
    from scipy.stats import binom

    a, b = np.broadcast_arrays(np.asarray(first, np.int64), np.asarray(second, np.int64))
    # At 1/2 the distribution is symmetric: both tails are alike.
    return np.minimum(1.0, 2 * np.asarray(binom.sf(np.maximum(a, b) - 1, a + b, 0.5), np.float64))


def _log_upper(a: Any, b: Any, x: Floats) -> Floats:
    """Return the logarithm of the share of Beta(a, b) above x; minus infinity where it underflows."""
    from scipy.special import betaincc

    with np.errstate(divide="ignore"):
        return np.asarray(np.log(betaincc(a, b, x)), np.float64)


def _shares(hits: ArrayLike, samples: ArrayLike, alpha: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    _check_alpha(alpha)
    k, n = np.broadcast_arrays(np.asarray(hits, np.int64), np.asarray(samples, np.int64))
    if ((k < 0) | (k > n)).any():
        raise UserError(f"{k.max()} hits of {n.max()} samples is no share")
    return k, n


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise UserError(f"alpha = {alpha:g}: it is the probability of a wrong certificate, such as 0.001")

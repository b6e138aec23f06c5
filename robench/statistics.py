"""Intervals: every accuracy that robench states carries two, every mean and median of distances one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from robench.errors import UserError
from robench.records import Proportion

LEVEL = 0.95


def proportion(successes: int, n: int) -> Proportion:
    """Return the share `successes / n` with its 95 % Clopper-Pearson and Wilson intervals.

    Raises UserError unless 0 <= successes <= n and n >= 1.
    """
    _check(successes, n)
    # Imported here: it brings scipy and pandas, a second that no listing should wait for.
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, n, alpha=1 - LEVEL, method="beta")
    return Proportion(
        successes=successes,
        n=n,
        value=successes / n,
        clopper_pearson=(float(low), float(high)),
        wilson=wilson(successes, n),
    )


def wilson(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval: the shares that a z-test does not reject (E. B. Wilson, JASA 22, 1927).

    Raises UserError unless 0 <= successes <= n and n >= 1.
    """
    _check(successes, n)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (successes * (n - successes) / n + z * z / 4) ** 0.5
    # At 0 and n one end is the observed share itself; rounding must not put it outside [0, 1].
    return (
        0.0 if successes == 0 else max(0.0, centre - half),
        1.0 if successes == n else min(1.0, centre + half),
    )


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean of at least one value and the bounds of its 95 % normal interval."""
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * spread / len(values) ** 0.5
    return mean, mean - half, mean + half


@functools.cache
def median_ranks(n: int) -> tuple[int, int] | None:
    """Return the positions (from 0) of the sorted values between which the median lies with at least 95 %.

    Exact for any distribution: the number of values below the median is binomial (n, 1/2). None below six values, where
    even the smallest and the largest are too near.
    """
    below, term, limit = 0, 1, int(2**n * (1 - Fraction(str(LEVEL))) / 2)
    for position in range(n // 2 + 1):
        below += term
        if below > limit:
            return (position - 1, n - position) if position else None
        term = term * (n - position) // (position + 1)
    return None


def _check(successes: int, n: int) -> None:
    if not 0 <= successes <= n or n < 1:
        raise UserError(f"{successes} of {n} is no share; it needs at least one example, and 0 to n successes")


def exceeds(count: int, n: int, share: float, *, level: float = 0.01) -> bool:
    """Tell whether so many of n can hardly be chance where the true share is at most `share` (0 < share < 1).

    Exact one-sided binomial test: true where `count` or more of `n` come up with at most the probability `level`.
    """
    if count <= n * share:
        return False
    log_tail = [
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(share)
        + (n - k) * math.log1p(-share)
        for k in range(count, n + 1)
    ]
    return math.fsum(map(math.exp, log_tail)) <= level * (1 + 1e-9)

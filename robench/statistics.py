"""Intervals: every accuracy that robench states carries two, every mean and median of distances one.

And whether two models differ at all: exact paired tests, and the groups that they cannot take apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Any

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


def deviation_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Return the bounds of the 95 % normal interval of the standard deviation of at least one value.

    Of any distribution: the variance of n values varies by (m4 - s^4) / n, m4 their fourth central moment, and its root
    by that over 4 s^2 (delta method).
    """
    distance = np.asarray(values, dtype=np.float64) - np.mean(values)
    variance = float(np.mean(distance**2))
    if variance == 0:
        return 0.0, 0.0
    wobble = max(0.0, float(np.mean(distance**4)) - variance**2) / len(distance) / (4 * variance)
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * wobble**0.5
    return max(0.0, variance**0.5 - half), variance**0.5 + half


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
    tail, allowed = 0.0, level * (1 + 1e-9)
    for k in range(count, n + 1):
        log_binomial = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        term = math.exp(log_binomial + k * math.log(share) + (n - k) * math.log1p(-share))
        tail += term
        if tail > allowed or term <= 1e-17 * tail:  # above the mean the terms only fall
            break
    return tail <= allowed


#: Probability of ever calling two equal models different, over all pairs of a table together.
SEPARATION_LEVEL = 0.05


def mcnemar(first_alone: NDArray[np.integer[Any]], second_alone: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the exact two-sided p-values of McNemar's test, one for each pair of models on the same examples.

    Of the examples on which exactly one of the two is right, `first_alone` (any shape) are the first's and
    `second_alone` the second's. Were the models equally good, either count would be binomial with probability 1/2
    (McNemar, Psychometrika 12, 1947).
    """
    fewer, of = np.minimum(first_alone, second_alone), np.asarray(first_alone) + second_alone
    pairs, places = np.unique(np.stack([fewer.ravel(), of.ravel()]), axis=1, return_inverse=True)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of.max(initial=0) + 1)))])

    def tail(most: int, n: int) -> float:
        k = np.arange(most + 1)
        return float(np.exp(log_factorial[n] - log_factorial[k] - log_factorial[n - k] - n * math.log(2)).sum())

    found = np.array([min(1.0, 2 * tail(int(most), int(n))) for most, n in pairs.T])
    return found[places].reshape(fewer.shape) if found.size else np.ones(fewer.shape)


def holm(p_values: NDArray[np.float64], *, level: float = SEPARATION_LEVEL) -> NDArray[np.bool_]:
    """Return which hypotheses `(n,)` Holm's procedure rejects: a true one of all with at most the probability `level`.

    S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    order, n = np.argsort(p_values, kind="stable"), len(p_values)
    passed = p_values[order] * np.arange(n, 0, -1) <= level
    rejected = np.zeros(n, np.bool_)
    rejected[order] = np.logical_and.accumulate(passed)
    return rejected


def separated(right: NDArray[np.bool_], *, level: float = SEPARATION_LEVEL) -> NDArray[np.bool_]:
    """Return which pairs of models `(M, M)` exact McNemar tests tell apart, corrected for the number of pairs.

    `right` is `(M, N)`: which of the same N examples each model gets right.
    """
    # float32 counts exactly up to 2^24 examples, and its product is the fast one.
    ones = right.astype(np.float32)
    alone = np.rint(ones @ (1 - ones).T).astype(np.int64)
    rows, columns = np.triu_indices(len(right), 1)
    found = np.zeros((len(right), len(right)), np.bool_)
    found[rows, columns] = holm(mcnemar(alone[rows, columns], alone[columns, rows]), level=level)
    return found | found.T


def groups_of(apart: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """Return for each of M models the numbers (from 0) of its groups: two models share one if they are not `apart`.

    `apart` is `(M, M)` and symmetric. Being inseparable is not transitive, so a model may be in several groups; every
    group is as large as it can be, and they come in the order of the models (H.-P. Piepho's letters, Journal of
    Computational and Graphical Statistics 13, 2004).
    """
    together = ~apart | np.eye(len(apart), dtype=np.bool_)
    covered = np.eye(len(apart), dtype=np.bool_)
    found: list[tuple[int, ...]] = []
    for one in range(len(apart)):
        if together[one].sum() == 1:
            found.append((one,))
        while (left := together[one, one:] & ~covered[one, one:]).any():
            members = [one, one + int(left.argmax())]
            allowed = together[members[0]] & together[members[1]]
            allowed[members] = False
            while allowed.any():
                # The best placed of those that all members allow.
                members.append(int(allowed.argmax()))
                allowed &= together[members[-1]]
                allowed[members[-1]] = False
            covered[np.ix_(members, members)] = True
            found.append(tuple(sorted(members)))
    found.sort()
    return [tuple(number for number, members in enumerate(found) if model in members) for model in range(len(apart))]


def possible_ranks(right: NDArray[np.bool_], apart: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the best and the worst rank of each model, counting only those models that are `apart` from it."""
    counts = right.sum(1)
    better = (apart & (counts[None, :] > counts[:, None])).sum(1)
    worse = (apart & (counts[None, :] < counts[:, None])).sum(1)
    return [(1 + int(above), len(right) - int(below)) for above, below in zip(better, worse, strict=True)]

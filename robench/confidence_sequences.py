"""Confidence sequences: intervals of a share that hold at every moment of the drawing together.

A usual interval covers with 95 % at one number of examples that was fixed before. Who looks again and again, and stops
when the interval pleases, is wrong far more often. A confidence sequence may be looked at after every example and
stopped at any time, for whatever reason.

Examples are drawn without replacement from a list of N, of which an unknown number m succeed. The method is the
prior-posterior-ratio martingale (Waudby-Smith and Ramdas, Confidence sequences for sampling without replacement,
NeurIPS 2020, arXiv:2006.04347, theorem 2.1 and section 2.1): with any prior on m that is fixed before, and the
beta-binomial posterior after t draws,

    C_t = {m : prior(m) / posterior_t(m) < 1 / alpha}

covers the true m at all t together with probability at least 1 - alpha (Ville's inequality), and so does the
intersection of all C_s, s <= t. The prior here is uniform on 0 ... N, the beta-binomial with a = b = 1. At t = N the
set is the true m alone.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from robench.statistics import LEVEL

Counts = NDArray[np.int64]


def log_ratio(total: Counts | int, *, successes: Counts | int, drawn: int, of: int) -> NDArray[np.float64]:
    """Return log(prior(m) / posterior(m)) of m = `total` successes in the whole list of `of`, broadcast.

    By Bayes' rule it is the probability of what was drawn under the prior over that under m. A sequence of k successes
    in t draws has probability k! (t - k)! / (t + 1)! under the uniform prior, and under m
    m! / (m - k)! * (N - m)! / (N - m - t + k)! * (N - t)! / N!, which is 0 where m < k or N - m < t - k.
    """
    m, k = np.broadcast_arrays(np.asarray(total, np.int64), np.asarray(successes, np.int64))
    possible = (m >= k) & (of - m >= drawn - k)
    rest = np.where(possible, m - k, 0)
    failing_rest = np.where(possible, of - m - drawn + k, 0)
    f = _log_factorials(of + 1)
    under_prior = f[k] + f[drawn - k] - f[drawn + 1]
    under_m = f[m] - f[rest] + f[of - m] - f[failing_rest] + f[of - drawn] - f[of]
    return np.where(possible, under_prior - under_m, np.inf)


def bounds(successes: int, drawn: int, of: int, *, level: float = LEVEL) -> tuple[int, int]:
    """Return the smallest and the largest m in C_t, t = `drawn`: it depends on no order, and holds at any stopping.

    C_t has no gaps, because the posterior has one peak, and is never empty, because it holds the peak.
    Raises ValueError unless 0 <= successes <= drawn <= of.
    """
    if not 0 <= successes <= drawn <= of:
        raise ValueError(f"{successes} of {drawn} drawn of {of} is no share")
    m = np.arange(successes, of - drawn + successes + 1)
    within = m[log_ratio(m, successes=successes, drawn=drawn, of=of) < -math.log1p(-level)]
    return int(within[0]), int(within[-1])


class RunningBounds:
    """The intersection of C_1, ..., C_t, one example after another; all draws together take O(N) steps.

    Should the intersection become empty (then, and only then for sure, some C_s has missed), it begins anew at C_t, so
    that the last one is the true m whatever happened before. This costs no coverage.
    """

    def __init__(self, of: int, *, level: float = LEVEL) -> None:
        """Begin before the first draw from a list of `of` examples."""
        self.of, self.level = of, level
        self.successes = self.drawn = 0
        self.low, self.high = 0, of
        """The smallest and the largest number of successes in the whole list that are not refuted."""
        self._log_limit = -math.log1p(-level)
        self._factorials: list[float] = _log_factorials(of + 1).tolist()

    @property
    def width(self) -> float:
        """Return the length of the interval of the share, from its lower to its upper end."""
        return (self.high - self.low) / self.of

    def add(self, success: bool) -> None:
        """Take the next example into account; raise ValueError after the last one."""
        if self.drawn == self.of:
            raise ValueError(f"all {self.of} examples were drawn")
        self.drawn += 1
        self.successes += bool(success)
        while self.low <= self.high and self._refuted(self.low):
            self.low += 1
        while self.low <= self.high and self._refuted(self.high):
            self.high -= 1
        if self.low > self.high:
            self.low, self.high = bounds(self.successes, self.drawn, self.of, level=self.level)

    def _refuted(self, m: int) -> bool:
        """Tell whether m is outside C_t; :func:`log_ratio` for one number, ten times as fast."""
        f, k, t, n = self._factorials, self.successes, self.drawn, self.of
        if m < k or n - m < t - k:
            return True
        under_prior = f[k] + f[t - k] - f[t + 1]
        under_m = f[m] - f[m - k] + f[n - m] - f[n - m - t + k] + f[n - t] - f[n]
        return under_prior - under_m >= self._log_limit


def draws_needed(share: float, of: int, *, width: float, level: float = LEVEL) -> int:
    """Return after how many draws C_t will be no wider than `width` if `share` of them succeed: a guess."""
    fewest, most = 1, of
    while fewest < most:
        middle = (fewest + most) // 2
        low, high = bounds(round(share * middle), middle, of, level=level)
        fewest, most = (fewest, middle) if (high - low) / of <= width else (middle + 1, most)
    return fewest


@functools.lru_cache(maxsize=4)
def _log_factorials(largest: int) -> NDArray[np.float64]:
    """Return log(0!), ..., log(largest!)."""
    return np.array([math.lgamma(i + 1) for i in range(largest + 1)])

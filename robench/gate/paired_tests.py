"""Whether two columns of answers to the same examples differ by more than chance.

Shares are compared by McNemar's exact test, distances and radii by Wilcoxon's signed ranks, many of them together by
Holm's procedure. :class:`Race` is for who wants to stop as soon as it is clear. Nothing here imports scipy, which takes
longer than a whole check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robench.statistics import LEVEL

#: Share of examples on which another machine, batch or release of torch may answer otherwise by rounding alone. Between
#: batches of 16, 64 and 250 it was 0 of 1,000 (`benchmarks/batch_invariance.py`).
ROUNDING = 0.001

_LARGEST_EXACT = 50


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of `lost` against `gained` examples, if either were as likely.

    Exact: the smaller of them is binomial with p = 1/2 (McNemar, Psychometrika 12, 1947).
    """
    n = lost + gained
    return min(1.0, 2 * _binomial_tail(max(lost, gained), n, 0.5)) if n else 1.0


def beyond_rounding(changed: int, n: int) -> float:
    """Return the probability that rounding changes so many of n answers or more, each with probability ROUNDING."""
    return _binomial_tail(changed, n, ROUNDING) if changed > 0 else 1.0


def _binomial_tail(least: int, n: int, share: float) -> float:
    """Return the probability of `least` or more successes in n."""
    odds = math.log(share), math.log1p(-share)
    terms = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * odds[0] + (n - k) * odds[1]
        for k in range(least, n + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def signed_rank(differences: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of differences `(N,)` being symmetric about 0 (Wilcoxon, Biometrics 1, 1945).

    Zeros are left out, ties share their mean rank, infinite differences are the largest. Exact up to 50 differences,
    by the normal approximation with the correction for ties beyond.
    """
    d = differences[differences != 0]
    n = len(d)
    if n == 0:
        return 1.0
    _, inverse, counts = np.unique(np.abs(d), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = float(ranks[d > 0].sum())
    if n <= _LARGEST_EXACT:
        return _exact_signed_rank(ranks, positive)
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((counts.astype(float) ** 3 - counts).sum()) / 48
    z = (positive - n * (n + 1) / 4) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2))


def _exact_signed_rank(ranks: NDArray[np.float64], positive: float) -> float:
    """Return the p-value from all 2^n signs, added up rank by rank; mean ranks are halves, so they are doubled."""
    doubled = np.rint(2 * ranks).astype(int)
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
    at = round(2 * positive)
    return float(min(1.0, 2 * min(ways[: at + 1].sum(), ways[at:].sum()) / ways.sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: those up to alpha hold together with at most alpha of being wrong (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for position, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - position)))
        adjusted[i] = largest
    return adjusted


def change_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the change of a share: Wald's after half an example is added to each of the four
    cells (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    down, up, total = lost + 0.5, gained + 0.5, n + 2
    change = (up - down) / total
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(down + up - (up - down) ** 2 / total) / total
    return max(-1.0, change - half), min(1.0, change + half)


Decision = Literal["worse", "not worse"]

#: Bets on the share of the lost among the examples that changed.
_LOSING = np.array([0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
_PAID_FOR_LOST, _PAID_FOR_GAINED = np.log(2 * _LOSING), np.log(2 * (1 - _LOSING))
#: Bets against a loss as large as the tolerance, as parts of the largest bet that cannot ruin.
_STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.8])


@dataclass
class Race:
    """Example by example, two bets whose capital may be looked at at any time (Ville's inequality).

    One is against "nothing got worse": of the examples that changed, each is lost with probability 1/2 at most. It
    pays 2q for one that was lost and 2(1 - q) for one that was gained, averaged over several q. The other is against
    "the loss is the tolerance or more": it pays 1 + stake (gained - lost + tolerance) for every example, averaged over
    several stakes. Each reaches 1 / alpha at any time with probability at most alpha where what it is against holds.

    So a model that did not change fails with probability at most alpha, and one that lost the tolerance or more passes
    early with probability at most alpha, at whatever example it is stopped.
    """

    tolerance: float
    """The largest loss that passes, as a share of the examples; above 0."""
    alpha: float
    lost: int = 0
    gained: int = 0
    drawn: int = 0

    def __post_init__(self) -> None:
        stakes = _STAKES / (1 - self.tolerance)
        self._paid = {change: np.log1p(stakes * (change + self.tolerance)) for change in (-1, 0, 1)}
        self._against_no_loss = np.zeros(len(_LOSING))
        self._against_loss = np.zeros(len(_STAKES))

    def add(self, before: bool, now: bool) -> None:
        """Take the next example of the random order into account: right in the baseline, right now."""
        self.drawn += 1
        change = int(now) - int(before)
        self._against_loss += self._paid[change]
        if change < 0:
            self.lost += 1
            self._against_no_loss += _PAID_FOR_LOST
        elif change > 0:
            self.gained += 1
            self._against_no_loss += _PAID_FOR_GAINED

    @property
    def loss(self) -> float:
        """Return the share of the examples so far that were lost, less those that were gained."""
        return (self.lost - self.gained) / self.drawn if self.drawn else 0.0

    @property
    def decision(self) -> Decision | None:
        """Return what is clear by now: worse needs a loss above the tolerance, too."""
        if self._capital(self._against_no_loss) >= 1 / self.alpha and self.loss > self.tolerance:
            return "worse"
        return "not worse" if self._capital(self._against_loss) >= 1 / self.alpha else None

    @staticmethod
    def _capital(logs: NDArray[np.float64]) -> float:
        return float(np.exp(np.minimum(logs, 700)).mean())

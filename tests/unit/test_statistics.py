"""Intervals against statsmodels, and against the definition of coverage itself."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from scipy.stats import binom
from statsmodels.stats.proportion import proportion_confint

from robench.errors import UserError
from robench.statistics import exceeds, mean_interval, median_ranks, proportion, wilson

GRID = [(k, n) for n in (1, 2, 7, 100, 10_000) for k in sorted({0, 1, n // 3, n // 2, n - 1, n})]


@pytest.mark.parametrize(("successes", "n"), GRID)
def test_intervals_are_those_of_statsmodels(successes: int, n: int) -> None:
    found = proportion(successes, n)
    assert (found.successes, found.n, found.value) == (successes, n, successes / n)
    for interval, method in ((found.clopper_pearson, "beta"), (found.wilson, "wilson")):
        expected = proportion_confint(successes, n, alpha=0.05, method=method)
        assert interval == pytest.approx(expected, abs=1e-12)
        assert 0 <= interval[0] <= found.value <= interval[1] <= 1


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_wilson_at_other_levels(level: float) -> None:
    expected = proportion_confint(13, 40, alpha=1 - level, method="wilson")
    assert wilson(13, 40, level) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [5, 30, 60])
def test_clopper_pearson_covers_every_share_at_least_95_percent(n: int) -> None:
    intervals = [proportion(k, n).clopper_pearson for k in range(n + 1)]
    for p in (0.0, 0.003, 0.05, 0.31, 0.5, 0.77, 0.95, 0.999, 1.0):
        chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        covered = sum(c for c, (low, high) in zip(chance, intervals, strict=True) if low <= p <= high)
        assert covered >= 0.95 - 1e-12, p


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -3)])
def test_no_share(successes: int, n: int) -> None:
    for interval in (proportion, wilson):
        with pytest.raises(UserError, match=f"{successes} of {n} is no share"):
            interval(successes, n)


@pytest.mark.parametrize("n", [1, 5, 50, 128, 10_000])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_exceeds_is_the_exact_binomial_test(n: int, share: float) -> None:
    level = 0.01
    # Of every count: the smallest that exceeds is the smallest whose tail is no likelier than the level.
    smallest = next((k for k in range(n + 1) if binom.sf(k - 1, n, share) <= level), n + 1)
    assert [k for k in range(max(0, smallest - 3), min(n, smallest + 3) + 1) if exceeds(k, n, share)] == list(
        range(smallest, min(n, smallest + 3) + 1)
    )
    assert not exceeds(0, n, share)


def test_nothing_of_nothing_exceeds() -> None:
    assert not exceeds(0, 0, 0.01)


def test_wilson_costs_no_heavy_import() -> None:
    code = (
        "import sys; from robench.statistics import wilson; wilson(3, 10);"
        "sys.exit(bool({'torch', 'scipy', 'pandas', 'statsmodels'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("n", [6, 7, 10, 99, 100, 1000])
def test_the_median_lies_between_its_ranks_as_often_as_said(n):
    low, high = median_ranks(n)
    # The median lies above the value at `low` and not above the one at `high` if so many values are below it.
    covered = binom.cdf(high, n, 0.5) - binom.cdf(low, n, 0.5)
    narrower = binom.cdf(high - 1, n, 0.5) - binom.cdf(low + 1, n, 0.5)
    assert narrower < 0.95 <= covered
    assert low + high == n - 1


def test_five_values_bound_no_median():
    assert [median_ranks(n) for n in range(6)] == [None] * 6


def test_a_mean_s_interval():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 6.0])
    assert (mean, high - mean) == pytest.approx((3.0, 1.959964 * (14 / 3) ** 0.5 / 2))
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval([0.5]) == (0.5, 0.5, 0.5)

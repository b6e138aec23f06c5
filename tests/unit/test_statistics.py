"""Intervals against statsmodels, and against the definition of coverage itself."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from robench.errors import UserError
from robench.statistics import (
    deviation_interval,
    exceeds,
    groups_of,
    holm,
    mcnemar,
    mean_interval,
    median_ranks,
    possible_ranks,
    proportion,
    separated,
    wilson,
)

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


def test_mcnemar_is_the_exact_binomial_test() -> None:
    counts = [(0, 0), (0, 1), (1, 1), (3, 9), (9, 3), (0, 30), (120, 200), (4000, 4100), (0, 9000)]
    first, second = np.array(counts).T
    found = mcnemar(first, second)
    for p, (b, c) in zip(found, counts, strict=True):
        expected = binomtest(b, b + c).pvalue if b + c else 1.0
        assert p == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(first.reshape(3, 3), second.reshape(3, 3)).tolist() == found.reshape(3, 3).tolist()
    assert mcnemar(np.empty(0, int), np.empty(0, int)).tolist() == []


def test_holm_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(0)
    for n in (0, 1, 2, 5, 60):
        p = random.random(n) ** 4
        expected = multipletests(p, alpha=0.05, method="holm")[0] if n else np.zeros(0, bool)
        assert holm(p).tolist() == expected.tolist()
    # The second is kept, so the third, which alone would pass its own bound, is kept, too.
    assert holm(np.array([0.01, 0.03, 0.04])).tolist() == [True, False, False]


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_those_of_brute_force(seed: int) -> None:
    """Pair by pair with scipy and statsmodels; then every set of models is tried as a group."""
    random = np.random.default_rng(seed)
    share, n = np.sort(random.random(8))[::-1], 120
    right = random.random((8, n)) < share[:, None]
    right = right[np.argsort(-right.sum(1), kind="stable")]
    right[5] = right[4]  # one model twice: never apart
    pairs = list(combinations(range(8), 2))
    p = [
        binomtest(b, b + c).pvalue if (b := (right[i] & ~right[j]).sum()) + (c := (right[j] & ~right[i]).sum()) else 1.0
        for i, j in pairs
    ]
    rejected = dict(zip(pairs, multipletests(p, alpha=0.05, method="holm")[0], strict=True))
    apart = separated(right)
    assert {pair: bool(apart[pair]) for pair in pairs} == {pair: bool(r) for pair, r in rejected.items()}
    assert (apart == apart.T).all()
    assert not apart.diagonal().any()
    assert 0 < sum(rejected.values()) < len(pairs)

    groups = groups_of(apart)
    members = {g: {m for m in range(8) if g in groups[m]} for g in {g for own in groups for g in own}}
    possible = [
        set(s) for k in range(1, 9) for s in combinations(range(8), k) if not any(apart[i, j] for i in s for j in s)
    ]
    largest = [s for s in possible if not any(s < other for other in possible)]
    assert all(own in largest for own in members.values()), "a group is as large as it can be"
    for i, j in pairs:
        assert bool(set(groups[i]) & set(groups[j])) != apart[i, j], "a shared group means: not apart"
    assert all(groups), "every model has a group"
    assert sorted(members) == list(range(len(members)))

    for model, (best, worst) in enumerate(possible_ranks(right, apart)):
        above = [m for m in range(8) if apart[model, m] and right[m].sum() > right[model].sum()]
        below = [m for m in range(8) if apart[model, m] and right[m].sum() < right[model].sum()]
        assert (best, worst) == (1 + len(above), 8 - len(below))


@pytest.mark.parametrize("seed", range(6))
def test_groups_of_models_in_no_order(seed: int) -> None:
    """Any pairs may be apart, not only those that are far from each other in the table."""
    random = np.random.default_rng(seed)
    apart = np.triu(random.random((7, 7)) < 0.5, 1)
    apart |= apart.T
    groups = groups_of(apart)
    for i, j in combinations(range(7), 2):
        assert bool(set(groups[i]) & set(groups[j])) != apart[i, j], (i, j)


def test_groups_of_few_models() -> None:
    assert groups_of(np.zeros((0, 0), bool)) == []
    assert groups_of(np.zeros((1, 1), bool)) == [(0,)]
    assert groups_of(np.zeros((3, 3), bool)) == [(0,), (0,), (0,)]
    apart = np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
    assert groups_of(apart) == [(0,), (0, 1), (1,)]
    assert groups_of(~np.eye(3, dtype=bool)) == [(0,), (1,), (2,)]


def test_equal_models_are_rarely_told_apart() -> None:
    """Of all tables of equal models, at most the level has a pair that is told apart."""
    random = np.random.default_rng(1)
    wrong = sum(separated(random.random((6, 80)) < 0.7).any() for _ in range(200))
    assert wrong <= 0.05 * 200 + 2 * (0.05 * 0.95 * 200) ** 0.5


def test_the_interval_of_a_standard_deviation_covers_it():
    """Of normal and of skewed values, 95 % of the intervals hold the true deviation, within simulation's error."""
    generator = np.random.default_rng(0)
    for draw, true in ((generator.standard_normal, 1.0), (generator.standard_exponential, 1.0)):
        held = 0
        for _ in range(400):
            low, high = deviation_interval(draw(2000))
            held += low <= true <= high
        assert 0.90 <= held / 400 <= 0.985
    assert deviation_interval([2.0, 2.0, 2.0]) == (0.0, 0.0)
    assert deviation_interval([0.0, 1.0]) == (0.5, 0.5), "two values at the same distance: the fourth moment is s^4"

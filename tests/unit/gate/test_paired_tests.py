"""The tests that a check rests on: against scipy and by enumeration, and their error rates by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from robench.gate.paired_tests import (
    ROUNDING,
    Race,
    beyond_rounding,
    change_interval,
    holm,
    mcnemar,
    signed_rank,
)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (0, 8), (7, 7), (30, 12), (800, 700)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_rounding_explains_few_changes():
    assert beyond_rounding(0, 1000) == 1.0
    for changed, n in ((1, 1000), (5, 1000), (3, 100), (25, 10_000)):
        assert beyond_rounding(changed, n) == pytest.approx(stats.binom.sf(changed - 1, n, ROUNDING), rel=1e-9)


def test_signed_ranks_by_enumeration():
    differences = np.array([0.5, -0.5, 1.0, 2.0, -0.25, 3.0, 0.0, 4.0])
    d = differences[differences != 0]
    ranks = stats.rankdata(np.abs(d))
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([False, True], repeat=len(d))])
    w = ranks[d > 0].sum()
    expected = min(1.0, 2 * min((sums <= w + 1e-9).mean(), (sums >= w - 1e-9).mean()))
    assert signed_rank(differences) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_signed_ranks_of_many_as_scipy_has_them(ties):
    d = np.random.default_rng(0).normal(0.1, 1.0, 400)
    d = np.round(d, 1) if ties else d
    expected = stats.wilcoxon(d, zero_method="wilcox", correction=False, method="approx").pvalue
    assert signed_rank(d) == pytest.approx(expected, rel=1e-9)


def test_signed_ranks_know_what_is_infinitely_far():
    assert signed_rank(np.zeros(10)) == 1.0
    assert signed_rank(np.array([np.inf] * 8)) == pytest.approx(2 / 2**8)
    assert signed_rank(np.array([np.inf, -np.inf] * 30)) == pytest.approx(1.0)


def test_holm_adjusts_in_the_order_of_size():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_interval_of_a_change_covers():
    random = np.random.default_rng(0)
    n, lose, gain = 300, 0.06, 0.03
    draws = random.multinomial(n, [lose, gain, 1 - lose - gain], 4000)
    covered = [low <= gain - lose <= high for low, high in (change_interval(a, b, n) for a, b, _ in draws.tolist())]
    assert 0.93 < np.mean(covered) < 0.975


def answers(random, n, *, lose, gain, right=0.8):
    """Pairs of answers: right before, right now; `lose` and `gain` are shares of all examples."""
    kind = random.choice(4, size=n, p=[lose, gain, right - lose, 1 - right - gain])
    return np.isin(kind, [0, 2]), np.isin(kind, [1, 2])


def run(race, before, now):
    for b, a in zip(before.tolist(), now.tolist(), strict=True):
        race.add(b, a)
        if race.decision is not None:
            break
    return race


def test_a_race_without_a_change_fails_at_most_alpha_of_the_time():
    random = np.random.default_rng(1)
    races = [run(Race(0.03, 0.05), *answers(random, 3000, lose=0.04, gain=0.04)) for _ in range(300)]
    failed = sum(race.decision == "worse" for race in races)
    assert stats.binom.sf(failed - 1, 300, 0.05) > 0.001, failed


def test_a_race_passes_a_loss_of_the_tolerance_at_most_alpha_of_the_time():
    random = np.random.default_rng(2)
    races = [run(Race(0.03, 0.05), *answers(random, 3000, lose=0.05, gain=0.02)) for _ in range(300)]
    passed = sum(race.decision == "not worse" for race in races)
    assert stats.binom.sf(passed - 1, 300, 0.05) > 0.001, passed


def test_a_race_is_short_when_the_answer_is_clear():
    random = np.random.default_rng(3)
    for lose, gain, most in ((0.06, 0.01, 500), (0.22, 0.02, 100)):
        races = [run(Race(0.01, 0.01), *answers(random, 10_000, lose=lose, gain=gain)) for _ in range(60)]
        assert all(race.decision == "worse" for race in races)
        assert np.mean([race.drawn for race in races]) < most
    races = [run(Race(0.01, 0.01), *answers(random, 10_000, lose=0.0, gain=0.0)) for _ in range(3)]
    assert all(race.decision == "not worse" and race.drawn < 1000 for race in races)


def test_a_small_loss_is_no_reason_to_fail_however_sure_it_is():
    race = Race(0.05, 0.01)
    for i in range(4000):
        race.add(True, i % 50 != 0)  # exactly two points
        assert race.decision != "worse" or race.loss > 0.05
    assert race.decision == "not worse"

"""MART does what it is for: on the digits, at Linf 0.1, it is far more robust than standard training."""

from __future__ import annotations

import pytest

from tests.flow import test_emr_and_trades as contest


@pytest.mark.slow
def test_is_ten_points_more_robust_than_standard_training(tmp_path, monkeypatch):
    monkeypatch.setitem(contest.CONTESTANTS, "mart", ("digits-mart", ["threat=Linf@0.1", "defense.steps=2"]))
    plain, ours = (contest.robust_accuracy(name, tmp_path / name, seed=0) for name in ("standard", "mart"))
    assert ours >= plain + 0.10, (plain, ours)

"""The gate that robench guards itself with: what it says and its exit status; what it measures is tested elsewhere."""

from __future__ import annotations

import pytest

from benchmarks import gate
from robench.gate import baseline as baselines
from robench.planning import identify_attack
from robench.records import EvalSpec


@pytest.mark.parametrize(("measured", "status"), [(0.88, 0), (0.6, 0), (0.58, 1), (0.3, 1)])
def test_speed_fails_when_a_third_is_lost(measured, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "make", lambda choice: None)
    monkeypatch.setattr(gate, "efficiency", lambda problem: measured)
    assert gate.speed(tmp_path) == status
    said = capsys.readouterr().out
    assert f"efficiency {measured:.2f}, usually 0.88" in said
    assert ("profile the step loop" in said) == bool(status)


def test_without_data_it_is_skipped_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(gate, "ROOT", tmp_path / "checkout")
    assert gate.main([]) == 0
    assert "gate: skipped: ROBENCH_DATA names no folder with MNIST/raw" in capsys.readouterr().out


def test_a_weak_engine_is_not_timed(monkeypatch, tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(gate, "strength", lambda data_root: 1)
    monkeypatch.setattr(gate, "speed", lambda data_root: pytest.fail("not reached"))
    assert gate.main([]) == 1


def test_its_baseline_is_whole_and_asks_today_s_questions():
    baseline = baselines.read(gate.BASELINE)
    for entry in baseline.entries:
        spec = baselines.load(entry, gate.BASELINE.parent).record.spec
        if isinstance(spec, EvalSpec):
            now = identify_attack(spec.attack.name, spec.threat).version
            assert spec.attack.version == now, f"{spec.attack.name} has a new version: measure it and set the baseline"

"""Noise without a bound never enters the worst case of a ball."""

from __future__ import annotations

from pathlib import Path

from synthetic import first_of, put, spec

from robench.leaderboards.robustness import robustness
from robench.records import AttackIdentity, EvalSpec
from robench.store import Store


def noise(model: str) -> EvalSpec:
    identity = AttackIdentity(name="lrc-noise-8", entry="lrc-noise", version=1, parameters={"decay_length": 8.0})
    return spec(model).model_copy(update={"attack": identity})


def test_noise_has_a_table_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "reports")
    put(store, spec("a", "pgd-20"), first_of(50, 40))
    put(store, noise("a"), first_of(50, 10))
    put(store, noise("b"), first_of(50, 20))
    own, ball = robustness(store.results({}))
    assert (own.name, ball.name) == ("noise-mnist-0.3", "robustness-mnist-linf-0.3")
    assert [cell.value for cell in ball.column("worst_case")] == [0.8]
    assert [cell.value for cell in own.column("worst_case")] == [0.4, 0.2]
    assert "noise of scale 0.3" in own.title
    assert "unbounded" in own.caption
    assert "at most" not in own.caption

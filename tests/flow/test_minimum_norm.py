"""One search, every epsilon: as a user asks."""

from __future__ import annotations

import json

from robench.store import Store

EVAL = ("eval", "--model", "tiny", "--attack", "deepfool", "--examples", "60", "--device", "cpu")


def test_another_epsilon_is_read_off_and_the_leaderboard_draws_the_curve(workspace, robench):
    status, _, err = robench(*EVAL, "--threat", "L2@0.3")
    assert status == 0, err
    (origin,) = [stored.record for stored in Store(workspace / "reports").records()]
    assert origin.distances.found > 30
    (planned,) = json.loads(robench(*EVAL, "--threat", "L2@0.5", "--dry-run", "--json")[1])
    assert planned["status"] == f"follows from {origin.spec.identity}"
    assert (planned["gradient passes at most"], planned["seconds at most"]) == (0, 0.0)
    status, out, err = robench(*EVAL, "--threat", "L2@0.5", "--json")
    assert status == 0, err
    (derived,) = json.loads(out)
    assert origin.spec.identity in derived["notes"][0]
    assert derived["robust"]["successes"] < origin.robust.successes
    assert len(derived["diagnostics"]) == len(origin.diagnostics) == 8
    assert derived["distances"] == origin.distances.model_dump(mode="json")
    assert derived["provenance"]["command"] == "robench " + " ".join([*EVAL, "--threat", "L2@0.5", "--json"])
    # Another norm is another search.
    (planned,) = json.loads(robench(*EVAL, "--threat", "Linf@0.1", "--dry-run", "--json")[1])
    assert planned["status"] == "new"
    status, out, _ = robench("leaderboard")
    assert status == 0
    names = [line.rsplit("/", 1)[-1] for line in out.split()]
    assert "minimum-norm-digits-l2-60.html" in names
    assert "minimum-norm-digits-l2-60-curve.svg" in names
    assert "robustness-digits-l2-0.5-60.csv" in names

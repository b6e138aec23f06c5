"""`robench time` as a user types it."""

from __future__ import annotations

import json

import pytest

from robench.store import Store


def test_a_model_and_an_architecture_are_timed_and_shown(workspace, robench):
    status, out, _ = robench("time", "tiny", "--copies", "4", "--queries", "8", "--device", "cpu")
    assert status == 0
    assert "vote of 4 noisy copies" in out
    assert robench("time", "digits_cnn", "--copies", "4", "--queries", "8", "--device", "cpu", "--json")[0] == 0
    records = [stored.record for stored in Store(workspace / "reports").timings()]
    assert sorted((r.spec.subject, r.spec.copies, r.spec.sigma) for r in records) == [
        ("digits_cnn", 1, 0.0),
        ("digits_cnn", 4, 0.25),
        ("tiny", 1, 0.0),
        ("tiny", 4, 0.25),
    ]
    assert all(r.low <= r.median <= r.high and r.quartiles[0] <= r.median <= r.quartiles[1] for r in records)
    assert records[0].provenance.command.startswith("robench time")
    assert robench("leaderboard")[0] == 0
    (page,) = (workspace / "reports" / "leaderboards").glob("inference-time-cpu-*.html")
    assert "4 noisy copies" in page.read_text("utf-8")


def test_json_is_the_records(workspace, robench):
    _, out, _ = robench("time", "digits_cnn", "--copies", "2", "--queries", "6", "--device", "cpu", "--json")
    assert [record["spec"]["copies"] for record in json.loads(out)] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny", "--copies", "1"), "a vote takes at least 2"),
        (("tiny", "--sigma", "0"), "the copies need noise"),
        (("tiny", "--queries", "5"), "no 95 % interval"),
        (("tinny",), "unknown model or architecture 'tinny'; did you mean 'tiny'?"),
    ],
)
def test_bad_input_is_one_line(workspace, robench, arguments, says):
    status, _, err = robench("time", *arguments)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not list((workspace / "reports").glob("timings/*/*"))

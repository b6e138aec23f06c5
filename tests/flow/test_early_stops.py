"""`robench eval --until` and `--max-seconds`, as a user meets them."""

from __future__ import annotations

import csv
import itertools
import json
import re

import pytest

from robench.cli import evaluating
from robench.evaluation.deadline import Deadline
from robench.store import Store

EVAL = ("eval", "--model", "tiny", "--threat", "Linf@0.1", "--device", "cpu")


def records_of(workspace):
    return {stored.path.name.partition(".")[2]: stored.record for stored in Store(workspace / "reports").records()}


def test_until_stops_when_enough_is_known(workspace, robench):
    asked = (*EVAL, "--attack", "pgd-10", "--all", "--until", "20%")
    (plan,) = json.loads(robench(*asked, "--dry-run", "--json")[1])
    assert (plan["until"], plan["examples"]) == (0.2, 449)
    status, out, err = robench(*asked)
    assert status == 0, err
    assert "1 evaluation to compute, at most 4,490 gradient passes" in err
    (record,) = records_of(workspace).values()
    assert record.status == "complete"
    assert record.robust.n < 449
    assert record.sequence.high - record.sequence.low <= 0.2 + 1e-12
    assert f"{record.robust.n} drawn of 449 of 449" in out
    assert f"[{100 * record.sequence.low:.1f}, {100 * record.sequence.high:.1f}]" in out

    # The same question typed otherwise is known; the full one is another, which the sequence foretold.
    assert robench(*asked[:-1], "0.2")[0] == 0
    assert len(records_of(workspace)) == 1
    assert robench(*EVAL, "--attack", "pgd-10", "--all")[0] == 0
    (full,) = [stored.record for stored in Store(workspace / "reports").records() if stored.record.sequence is None]
    assert record.sequence.low <= full.robust.value <= record.sequence.high

    status, out, err = robench("leaderboard")
    assert status == 0, err
    pages = {line.rsplit("/")[-1]: line for line in out.split() if "/models/" not in line and line.endswith(".csv")}
    assert set(pages) == {"robustness-digits-linf-0.1.csv", "robustness-digits-linf-0.1-until-0.2.csv"}
    for path in pages.values():
        with open(path, encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == 1


def test_max_seconds_leaves_a_partial_record_that_the_same_command_completes(workspace, robench, monkeypatch):
    def by_looks(seconds):
        """A clock that goes by how often it is looked at, ten times a batch and more: the same on every machine."""
        return Deadline(seconds, clock=(look / 100 for look in itertools.count()).__next__)

    monkeypatch.setattr(evaluating, "Deadline", by_looks)
    asked = (*EVAL, "--attack", "pgd-10", "--attack", "fgsm", "--all", "--max-seconds", "0.5")
    status, out, err = robench(*asked)
    assert status == 4
    assert "the 0.5 seconds are over and 2 of 2 evaluations unfinished; the same command goes on" in err
    (partial,) = records_of(workspace).values()
    assert (partial.status, partial.spec.attack.entry) == ("partial", "pgd")
    assert 0 < partial.robust.n < 449
    assert f"{partial.robust.n} answered of 449 of 449" in out

    status, out, err = robench("leaderboard")
    assert status == 0, err
    page = next(line for line in out.split() if line.endswith("linf-0.1.html"))
    with open(page, encoding="utf-8") as file:
        assert f"was stopped after {partial.robust.n} of 449 images and does not count" in file.read()

    # Asked again it goes on: there is more of it, or it is complete.
    (row, _) = json.loads(robench(*asked, "--dry-run", "--json")[1])
    assert row["status"] == f"begun ({partial.robust.n})"
    assert robench(*asked)[0] in {0, 4}
    again = next(r for r in records_of(workspace).values() if r.spec == partial.spec)
    assert again.robust.n > partial.robust.n
    assert again.status in {"partial", "complete"}

    monkeypatch.setattr(evaluating, "Deadline", Deadline)
    status, _, err = robench(*EVAL, "--attack", "fgsm", "--all", "--max-seconds", "3600")
    assert status == 0, err
    assert "complete" in {r.status for r in records_of(workspace).values()}


def test_a_time_too_short_for_one_image_is_said_with_how_long_one_takes(workspace, robench, monkeypatch):
    monkeypatch.setattr(
        evaluating, "Deadline", lambda s: Deadline(s, clock=(look / 100 for look in itertools.count()).__next__)
    )
    asked = (*EVAL, "--attack", "pgd-100:restarts=5,stop_when_broken=false", "--examples", "20", "--max-seconds")
    status, _, err = robench(*asked, "1")
    assert status == 4
    (line,) = [line for line in err.splitlines() if line.startswith("robench:")]
    assert "not one image was answered" in line
    assert "goes on from there" not in line
    seconds, least = re.search(r"about (\S+) s at most by its passes; give --max-seconds (\d+) or more", line).groups()
    assert 4 < float(seconds) < int(least) < 10, "500 passes and more of 0.01 s each"
    assert records_of(workspace) == {}, "nothing is known"
    assert robench(*asked, least)[0] == 4
    (record,) = records_of(workspace).values()
    assert (record.status, record.robust.n) == ("partial", 1), "the advice is good"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--until", "1"], "write 1% or 0.01"),
        (["--until", "0"], "write 1% or 0.01"),
        (["--until", "-1%"], "write 1% or 0.01"),
        (["--until", "100%"], "write 1% or 0.01"),
        (["--until", "narrow"], "'narrow' is no width"),
        (["--max-seconds", "0"], "above 0"),
        (["--max-seconds", "nan"], "above 0"),
        (["--max-seconds", "soon"], "soon"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_values_get_one_line(workspace, robench, arguments, expected):
    status, _, err = robench(*EVAL, "--attack", "fgsm", *arguments)
    assert status == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (workspace / "reports").exists()


def test_a_search_that_cannot_be_compiled_is_one_line(workspace, robench, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    status, _, err = robench(*EVAL, "--attack", "fgsm", "--examples", "20", "--compile")
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("robench: --compile does not work here")
    assert "C++ compiler" in last
    assert records_of(workspace) == {}

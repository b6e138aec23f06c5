"""Models that seem robust for a wrong reason never come through `robench eval` without a word.

| canary                           | what happens                                                                  |
|----------------------------------|-------------------------------------------------------------------------------|
| logits too large for every image | stopped: the loss has no gradient for most of the images                      |
| logits too large for some        | flag zero-gradients                                                           |
| rounded input                    | stopped: no gradient at all                                                   |
| rounded input with a false slope | flags loss-does-not-rise, epsilon-not-fatal, black-box-stronger               |
| noise, or functional dropout on  | stopped; with --votes flag random-outputs, unless the attack averages over it |
| dropout left in train mode       | stopped, always                                                               |
"""

from __future__ import annotations

import csv

import pytest

from robench.store import Store
from tests.flow.conftest import ROOT

FACTORIES = """
import sys
sys.path.insert(0, {root!r})
from torch import nn
from tests import canaries

def saturated(): return canaries.HugeLogits(canaries.robust(), 1e5).eval()
def partly_saturated(): return canaries.HugeLogits(canaries.robust(), 15.0).eval()
def rounded(): return canaries.Quantised(canaries.robust()).eval()
def false_slope(): return canaries.PartlyQuantised(canaries.robust()).eval()
def noisy(): return canaries.Noisy(canaries.robust()).eval()
def dropout_left_on(): return canaries.dropout_left_on().eval()
def train_mode(): return nn.Sequential(canaries.robust(), nn.Dropout(0.1))
def sound(): return canaries.robust().eval()
"""


@pytest.fixture
def evaluate(workspace, robench, tmp_path):
    """Evaluate one of the factories; return the status, standard error and the flags of its record."""
    (tmp_path / "nets.py").write_text(FACTORIES.format(root=str(ROOT)))

    def command(factory, *options):
        model = f"{tmp_path / 'nets.py'}:{factory}"
        arguments = ("--attack", "pgd-20", "--threat", "Linf@0.1", "--examples", "100", "--device", "cpu")
        status, _, err = robench("eval", "--model", model, "--dataset", "digits", *arguments, *options)
        found = [s.record for s in Store(workspace / "reports").records()]
        return status, err, {d.name for d in found[-1].diagnostics if d.verdict == "flag"} if found else None

    return command


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("saturated", (), "loss 'ce' is exactly zero for"),
        ("rounded", (), "the gradient to the images is zero"),
        ("noisy", (), "answers the same images differently"),
        ("dropout_left_on", (), "answers the same images differently"),
        ("train_mode", (), "train mode"),
        ("train_mode", ("--votes", "5"), "train mode"),
    ],
)
def test_what_makes_every_number_meaningless_is_stopped(evaluate, factory, options, message):
    status, err, flags = evaluate(factory, *options)
    assert status == 2
    assert message in err
    assert flags is None, "no record"


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        ("partly_saturated", (), {"zero-gradients"}),
        ("false_slope", (), {"loss-does-not-rise", "epsilon-not-fatal", "black-box-stronger"}),
        ("noisy", ("--votes", "5"), {"random-outputs"}),
        ("dropout_left_on", ("--votes", "5"), {"random-outputs"}),
    ],
)
def test_what_makes_a_number_too_high_is_a_flag_of_its_record(evaluate, factory, options, expected):
    status, err, flags = evaluate(factory, *options)
    assert status == 0, err
    assert flags >= expected


def test_flags_reach_the_leaderboard_and_sound_models_have_none(evaluate, robench, workspace):
    assert evaluate("false_slope")[0] == 0
    status, err, _ = evaluate("sound")
    assert status == 0, err
    assert robench("leaderboard")[0] == 0
    (table,) = (workspace / "reports" / "leaderboards").glob("robustness-*.csv")
    with table.open(encoding="utf-8", newline="") as file:
        found = {row["model"].partition(":")[2]: row["reliability"] for row in csv.DictReader(file)}
    assert found["sound"] == "no flags"
    assert "black-box-stronger" in found["false_slope"]
    assert "What the flags say" in table.with_suffix(".html").read_text(encoding="utf-8")

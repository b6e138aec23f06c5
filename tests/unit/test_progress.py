"""What is said while an evaluation runs: how far it is and how long it still takes."""

from __future__ import annotations

import pytest

from robench.cli.progress import Bars, EvaluationBar, Outlook
from robench.confidence_sequences import draws_needed
from robench.findings import probe_work
from tests.synthetic import spec


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_the_time_left_goes_by_the_passes_of_all_questions():
    one, two = spec("a", count=100), spec("b", count=100)
    clock = Clock()
    outlook = Outlook([(one, 10.0), (two, 30.0)], clock=clock)
    assert outlook.seconds_left is None
    clock.now += 500  # before the first question begins nothing is measured
    outlook.expect(one, 80)  # 20 are known from an interrupted run
    clock.now += 4
    outlook.answered(one, 40)
    outlook.expect(one, 40)
    # 400 passes took 4 s; 400 of this question and 3,000 of the other are left.
    assert outlook.seconds_left == pytest.approx(34)
    clock.now += 4
    outlook.answered(one, 40)
    outlook.expect(one, 0)
    assert outlook.seconds_left == pytest.approx(30)
    clock.now += 30
    outlook.answered(two, 100)
    outlook.expect(two, 0)
    assert outlook.seconds_left == 0


def test_the_diagnostics_are_part_of_the_time_left():
    one, two = spec("a", count=100), spec("a", "fgsm", count=100)
    key, gradients, queries = probe_work(one)
    assert key == probe_work(two)[0], "they share their probes"
    assert key != probe_work(spec("b", count=100))[0]
    # Of 50 images: 20 + 100 + 20 steps, 10 on 4 copies each, 2 * (20 + 40) in the box, 2 at the image; 200 queries.
    assert 50 * (140 + 40 + 120 + 2) <= gradients <= 1.1 * 50 * 302
    assert 50 * 200 <= queries <= 1.1 * 50 * 200
    clock = Clock()
    outlook = Outlook([(one, 10.0)], clock=clock, probes={key: 3000.0})
    outlook.expect(one, 100)
    clock.now += 1
    outlook.answered(one, 100)
    outlook.expect(one, 0)
    assert outlook.seconds_left == pytest.approx(3)
    outlook.examined(one, now=True)
    assert outlook.seconds_left == 0


def test_the_line_says_how_far_and_how_long(monkeypatch, capsys):
    monkeypatch.setattr("robench.cli.progress._INTERVAL", 0.0)
    clock = Clock()
    question = spec("a", count=1000)
    with Bars() as bars:
        bar = EvaluationBar(bars, Outlook([(question, 5.0)], "1 evaluation to compute", clock=clock))
        bar.begin(question, done=0)
        clock.now += 10
        bar.advance(question, examples=100, robust=25)
    err = capsys.readouterr().err
    assert "1 evaluation to compute" in err
    assert "100/1,000 robust 25.0 %, 1 min 30 s left" in err


def test_a_sequential_question_reckons_with_what_it_will_draw(monkeypatch, capsys):
    monkeypatch.setattr("robench.cli.progress._INTERVAL", 0.0)
    clock = Clock()
    question = spec("a", count=10_000).model_copy(update={"until": 0.1})
    with Bars() as bars:
        bar = EvaluationBar(bars, Outlook([(question, 5.0)], clock=clock))
        bar.begin(question, done=0)
        clock.now += 1
        bar.advance(question, examples=200, robust=100)
    needed = draws_needed(0.5, 10_000, width=0.1)
    assert 1000 < needed < 1300
    err = capsys.readouterr().err
    assert f"200/{needed:,} robust 50.0 %, {(needed - 200) / 200:.1f} s left" in err

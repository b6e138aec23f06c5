"""The attacks' benchmarks at a toy size: what they count, how they judge, what they say. Nothing is timed."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import attacks, parity, standings
from benchmarks.ideal import gradient_passes
from benchmarks.problems import Problem, plain_pgd
from benchmarks.rivals import NotOffered
from benchmarks.standings import Elapsed, Goal, Report, Standing
from robench.attacks import _compaction
from robench.classifier import Classifier
from robench.datasets import ArrayImages
from robench.evaluation.worker import Worker
from robench.threat_model import ThreatModel
from tests.models import SmallNet, numbers

CPU = torch.device("cpu")
PGD = "pgd-10:start=image,step_size=0.0125"


@pytest.fixture(scope="module")
def problem():
    """80 images of which PGD-10 breaks some at once, some on the way, and some never."""
    model = Classifier(SmallNet().eval().float(), input_shape=(1, 4, 4), num_classes=5)
    pixels = (numbers(80, 1, 4, 4) * 60 + 128).clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        labels = model(pixels.float() / 255).argmax(1)
    images = ArrayImages(images=pixels.numpy(), labels=labels.numpy(), classes=tuple("abcde"), origin="test")
    return Problem("a tiny one", model, images, ThreatModel.parse("Linf@0.05"), steps=10, step_size=0.0125)


@pytest.fixture
def others(monkeypatch):
    """Rivals whose answers are what the test says, from images to images."""
    answers = {}

    def rival(library, attack, target):
        if library not in answers:
            raise NotOffered(f"{library} is not there")
        return "9.9", lambda: answers[library](target.images)

    monkeypatch.setattr(attacks, "rival", rival)
    monkeypatch.setattr(attacks, "LIBRARIES", ("foolbox", "art"))
    monkeypatch.setattr(standings, "LIBRARIES", ("foolbox", "art"))
    return answers


def compare(problem, attack=PGD):
    return attacks.compare(attack, "tiny", problem, device=CPU, repeats=1)


def test_needed_gradients_are_those_of_the_plain_walk(problem):
    """Counted by the engine's book, they agree with a walk that is written down apart from it."""
    walk = plain_pgd(problem.model, problem.images, problem.labels, threat=problem.threat, steps=10, step_size=0.0125)
    assert attacks.passes_needed(problem, PGD, CPU) == gradient_passes(walk, 10)
    assert attacks.passes_needed(problem, "fgsm", CPU) is None
    assert attacks.passes_needed(problem, "pgd-10:restarts=2", CPU) is None


@pytest.mark.parametrize("attack", [PGD, "apgd-ce:steps=12"])
def test_needed_gradients_do_not_depend_on_how_often_an_attack_looks(problem, attack, monkeypatch):
    expected = attacks.passes_needed(problem, attack, CPU)
    often = lambda device: 7  # noqa: E731
    monkeypatch.setattr(_compaction, "steps_between_looks", often)
    assert attacks.passes_needed(problem, attack, CPU) == expected
    assert _compaction.steps_between_looks is often


def test_everybody_is_judged_by_the_plain_model(problem, others):
    model, images, labels = problem.model, problem.images, problem.labels
    long = plain_pgd(model, images, labels, threat=problem.threat, steps=60, step_size=0.01)
    others["foolbox"] = lambda images: long.last
    others["art"] = lambda images: 1 - images
    report = compare(problem)
    own, foolbox, art = report.results["robench, again"], report.results["foolbox"], report.results["art"]
    assert 0 < own.broken < 80
    assert own.broken == report.results["robench"].broken
    broken = problem.model(long.last).argmax(1) != problem.labels
    assert foolbox.broken == int(broken.sum()) >= own.broken
    assert len(foolbox.stronger_here) - len(foolbox.stronger_robench) == foolbox.broken - own.broken
    assert all(broken[i] for i in foolbox.stronger_here)
    assert (art.broken, art.invalid) == (0, 80)
    assert len(art.stronger_robench) == own.broken
    assert report.ideal is not None
    assert report.ideal.processor > 0


def test_norms_of_what_is_not_broken_are_infinite(problem, others):
    half = torch.arange(80) % 2 == 0
    far = problem.images + 0.3 * (0.5 - problem.images).sign()
    others["foolbox"] = lambda images: torch.where(half.view(-1, 1, 1, 1), far, images)
    report = compare(problem, "fab:steps=5")
    assert report.minimum_norm
    own, other = report.results["robench, again"], report.results["foolbox"]
    assert own.median < 0.3
    assert other.broken == int((problem.model(far).argmax(1) != problem.labels)[half].sum())
    assert other.median is None, "fewer than half are broken"
    assert len(other.stronger_robench) >= 80 - other.broken
    assert report.passes is None


def standing(seconds, broken=50, median=None):
    return Standing("1", [Elapsed(seconds, 2 * seconds)], broken=broken, median=median)


def report(own, others, *, minimum_norm=False, ideal=None):
    return Report(
        attack="some",
        others="some",
        model="lenet5",
        threat="L2@1",
        images=100,
        minimum_norm=minimum_norm,
        passes=None,
        ideal=ideal,
        results={"robench": own, "robench, again": own, **others},
        not_offered={},
    )


@pytest.mark.parametrize(
    ("goal", "found", "verdict"),
    [
        (Goal(times_faster={"cpu": 2.0}), report(standing(1), {"art": standing(2.5)}), "2.50 x art | reached"),
        (Goal(times_faster={"cpu": 3.0}), report(standing(1), {"art": standing(2.5)}), "2.50 x art | missed"),
        (Goal(times_faster={"lenet5": 2.0}), report(standing(1), {"art": standing(2.5)}), "reached"),
        (
            Goal(times_faster={"cpu": 2.0}),
            report(standing(1), {"art": standing(2.5), "foolbox": standing(1.5)}),
            "1.50 x foolbox | missed",
        ),
        (
            Goal(times_faster={"cpu": 2.0}),
            report(standing(1), {"art": standing(2.5, broken=51)}),
            "2.50 x art, but weaker than art | missed",
        ),
        (
            Goal(times_faster={"cpu": 2.0}, among_equals=True),
            report(
                standing(1, median=1.0),
                {"art": standing(2.5, median=1.005), "foolbox": standing(0.1, median=1.1)},
                minimum_norm=True,
            ),
            "2.50 x art | reached",
        ),
        (
            Goal(times_faster={"cpu": 2.0}),
            report(standing(1, median=1.0), {"art": standing(2.5, median=0.98)}, minimum_norm=True),
            "but weaker than art | missed",
        ),
        (
            Goal(times_faster={"cpu": 2.0}),
            report(standing(1, median=None), {"art": standing(2.5, median=None)}, minimum_norm=True),
            "2.50 x art | reached",
        ),
        (Goal(times_faster={"cpu": 2.0}), report(standing(1), {}), "none is there | -"),
        (Goal(of_ideal=0.9), report(standing(1), {}, ideal=Elapsed(0.95, 1.0)), "0.95 | reached"),
        (Goal(of_ideal=0.9), report(standing(1), {}, ideal=Elapsed(0.85, 3.0)), "0.85 | missed"),
    ],
)
def test_goals_are_reached_only_with_strength(goal, found, verdict, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    *_, line = standings.verdicts([(goal, found)], CPU).splitlines()
    assert verdict in line


def test_with_several_threads_the_wall_clock_counts(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = report(standing(1), {"art": Standing("1", [Elapsed(9, 5)], broken=50)})
    assert "2.50 x art | reached" in standings.verdicts([(Goal(times_faster={"cpu": 2.0}), found)], CPU)


def test_command_line_runs_skips_loudly_and_writes(problem, others, tmp_path, monkeypatch, capsys):
    others["foolbox"] = lambda images: images
    cases = (
        attacks.Case(PGD, "Linf", ("lenet5",), Goal(of_ideal=0.9, times_faster={"cpu": 1.5})),
        attacks.Case("witchcraft", "Linf", ("lenet5",), Goal()),
        attacks.Case("fgsm", "L2", ("lenet5",), Goal()),
    )
    pixels = dataclasses.replace(problem.pixels, images=problem.pixels.images[:12], labels=problem.pixels.labels[:12])
    small = dataclasses.replace(problem, pixels=pixels)
    monkeypatch.setattr(attacks, "CASES", cases)
    monkeypatch.setattr(attacks, "make", lambda choice: small)
    attacks.main(["--quick", "--json", str(tmp_path / "out" / "report.json")])
    out = capsys.readouterr().out
    assert "skipped: witchcraft on lenet5: the catalog has no such attack" in out
    assert "| pgd-10:start=image,step_size=0.0125, Linf@0.3 | lenet5 (12) |" in out
    assert "| fgsm, L2@2 | lenet5 (12) | - |" in out
    assert "0.9 of ideal" in out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert {"processor", "threads", "commit"} <= set(found["machine"])
    first, second = found["reports"]
    assert first["not_offered"] == {"art": "art is not there"}
    assert first["results"]["foolbox"]["version"] == "9.9"
    assert len(first["results"]["robench"]["seconds"]) == 1
    assert second["ideal"] is None


def test_the_cases_are_what_has_to_be_reached():
    named = {(case.name, case.norm) for case in attacks.CASES}
    assert {("pgd-20", "L2"), ("pgd-40", "Linf"), ("deepfool", "Linf"), ("cw-l2", "L2"), ("ddn", "L2")} <= named
    (autoattack,) = (case for case in attacks.CASES if case.name == "autoattack")
    assert autoattack.goal.factor("lenet5", "cpu") == 1.7
    assert autoattack.goal.factor("lenet5", "cuda") == 4.0
    (usual, *_) = attacks.CASES
    assert (usual.goal.factor("lenet5", "cpu"), usual.goal.factor("resnet18", "cpu")) == (1.25, 1.05)


@pytest.fixture
def worker(problem):
    return Worker(problem.model, problem.pixels, device=CPU, precision="fp32")


def stands_for(monkeypatch, attack):
    """Let robench with other parameters be the other library."""
    parameters = parity.planning.attack_settings(attack)[1]
    monkeypatch.setattr(parity.backends, "offered", lambda *question: None)
    monkeypatch.setattr(parity.backends, "identify", lambda *question: {"parameters": parameters, "backend": "native"})


def test_parity_counts_example_by_example(problem, worker, monkeypatch):
    """Where another implementation is robench's own with more steps, all that differs is on its side."""
    spec, ids = parity.plan("tiny", problem.pixels, ThreatModel.parse("Linf@0.05"), "pgd:steps=1,step_size=0.001", 80)
    stands_for(monkeypatch, "pgd-100:restarts=3")
    question, rows = parity.ask(worker, [spec], ids, ["strong"])
    other = question.others["strong"]
    assert other.stronger > 0
    assert other.weaker == 0
    assert question.native.standing - other.standing == other.stronger == len(rows)
    assert question.verdict == "missed"
    assert {(row["native"], row["other"], row["backend"]) for row in rows} == {("robust", "broken", "strong")}
    again, _ = parity.ask(worker, [spec], ids, [])
    assert again.verdict == "-"


def test_parity_asks_with_every_seed(problem, worker, monkeypatch):
    spec, ids = parity.plan("tiny", problem.pixels, ThreatModel.parse("L2@0.3"), "random-noise:samples=3", 80)
    seeds = [spec.model_copy(update={"seed": seed}) for seed in range(3)]
    stands_for(monkeypatch, "random-noise:samples=3")
    question, rows = parity.ask(worker, seeds, ids, ["same"])
    assert question.native.robust == question.others["same"].robust
    assert [parity.ask(worker, [one], ids, [])[0].native.robust[0] for one in seeds] == question.native.robust
    assert question.verdict == "kept"
    assert rows == []


def test_parity_adds_to_what_is_known(problem, worker, monkeypatch, tmp_path):
    """More examples and seeds ask for those alone; an interrupted run goes on; other weights are another question."""
    asked = []

    def counting(shard):
        asked.append((shard.spec.seed, len(shard.ids)))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return worker(shard)

    counting.device, stop = worker.device, None
    monkeypatch.setattr(parity, "PIECE", 30)
    pieces, threat = parity.Pieces(tmp_path), ThreatModel.parse("Linf@0.05")

    def ask(count, seeds, **changes):
        asked.clear()
        spec, ids = parity.plan("tiny", problem.pixels, threat, "pgd:steps=2", count, **changes)
        specs = [spec.model_copy(update={"seed": seed}) for seed in range(seeds)]
        return parity.ask(counting, specs, ids, [], pieces)[0].native.robust, list(asked)

    stop = 2
    with pytest.raises(KeyboardInterrupt):
        ask(60, 1)
    stop = None
    first, calls = ask(60, 1)
    assert calls == [(0, 30)]
    more, calls = ask(80, 2)
    assert calls == [(0, 20), (1, 30), (1, 30), (1, 20)]
    assert ask(80, 2) == (more, [])
    assert ask(60, 1) == (first, [])
    spec, ids = parity.plan("tiny", problem.pixels, threat, "pgd:steps=2", 80)
    whole = worker(parity.Shard(spec, np.sort(ids)))
    assert more[0] == whole.rows["robust"].sum(), "robench's answer is that to all examples at once"
    assert len(ask(60, 1, weights="1" * 64)[1]) == 2


def test_parity_of_norms_is_by_the_median(problem, worker, monkeypatch):
    spec, ids = parity.plan("tiny", problem.pixels, ThreatModel.parse("L2@0.5"), "fab:steps=20", 80)
    stands_for(monkeypatch, "fab:steps=1,final_search=0")
    question, rows = parity.ask(worker, [spec], ids, ["weak"])
    assert question.minimum_norm
    assert question.verdict == "kept"
    other = question.others["weak"]
    assert other.weaker > other.stronger
    assert other.length > question.native.length
    assert len(rows) == other.weaker + other.stronger
    for row in rows:
        assert np.isinf(float(row["other"])) or abs(float(row["native"]) / float(row["other"]) - 1) > 0.009


def answered(model="m", robust=50, others=(52,), **changes):
    answer = parity.Answer("1", robust if isinstance(robust, list) else [robust], [])
    many = {f"library{i}": parity.Answer("1", n if isinstance(n, list) else [n], []) for i, n in enumerate(others)}
    return parity.Question(model, "Linf@0.1", "pgd", 1000, False, answer, many, {}, {}, **changes)


def test_parity_allows_two_tenths_of_a_point():
    assert answered(robust=52, others=(50, 60)).verdict == "kept"
    assert answered(robust=53, others=(50, 60)).verdict == "missed"


def test_parity_calls_luck_what_seeds_cannot_tell_apart():
    """Means 54 and 50: two points of tolerance, and standard errors of 1 and 1."""
    spread, sure = [52, 54, 56], [54, 54, 54]
    assert answered(robust=spread, others=([48, 50, 52],)).verdict == "luck"
    assert answered(robust=sure, others=([50, 50, 50],)).verdict == "missed"
    assert answered(robust=[72, 74, 76], others=([48, 50, 52],)).verdict == "missed"


def test_parity_of_norms_without_an_end_is_missed():
    """Who breaks fewer than half of the images has an infinite median."""

    def verdict(own, other):
        own, other = (parity.Answer("1", [0], [median]) for median in (own, other))
        return parity.Question("m", "L2@1", "cw-l2", 9, True, own, {"x": other}, {}, {}).verdict

    assert [verdict(*pair) for pair in ((None, 2.0), (2.0, None), (2.03, 2.0), (2.01, 2.0), (None, None))] == [
        *("missed", "kept", "missed", "kept", "kept")
    ]


def test_parity_is_measured_in_pieces(tmp_path):
    def row(model, example):
        names = ("m", "Linf@0.1", "pgd", "art", str(example), "robust", "broken")
        return {**dict(zip(parity.NAMES, names, strict=True)), "model": model}

    parity.write(answered("b"), [row("b", 5)], tmp_path)
    parity.write(answered("a"), [row("a", 10), row("a", 9)], tmp_path)
    parity.write(answered("b", robust=1), [row("b", 7)], tmp_path)
    assert [(q.model, q.native.robust) for q in parity.read(tmp_path / "parity.json")] == [("a", [50]), ("b", [1])]
    with (tmp_path / "parity.csv").open() as file:
        assert [(r["model"], r["example_id"]) for r in csv.DictReader(file)] == [("a", "9"), ("a", "10"), ("b", "7")]
    assert "| a | Linf@0.1 | pgd | 1000 x 1 | 5.0 % | library0 5.2 % (0 / 0) | kept |" in parity.table(
        parity.read(tmp_path / "parity.json")
    )


def test_the_readme_shows_what_was_measured():
    root = Path(__file__).parents[2]
    files = sorted((root / "benchmarks" / "results").glob("attacks-*.json"))
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    reports = [standings.report_of(values) for content in contents for values in content["reports"]]
    assert reports
    assert standings.short_table(reports) in (root / "README.md").read_text(encoding="utf-8")

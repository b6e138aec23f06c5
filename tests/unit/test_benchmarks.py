"""The benchmarks at a tiny size: what they count, and that robench is not weaker than plain PGD. Nothing is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import contestants, memory, pgd_speed
from benchmarks.ideal import gradient_passes
from benchmarks.problems import Problem, Walk, plain_pgd
from robench.classifier import Classifier
from robench.datasets import ArrayImages
from robench.threat_model import ThreatModel
from tests.models import SmallNet, numbers


@pytest.fixture(scope="module")
def problem():
    """120 images of which PGD-10 breaks some at once, some on the way, and some never."""
    model = Classifier(SmallNet().eval().float(), input_shape=(1, 4, 4), num_classes=5)
    pixels = (numbers(120, 1, 4, 4) * 60 + 128).clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        labels = model(pixels.float() / 255).argmax(1)
    images = ArrayImages(images=pixels.numpy(), labels=labels.numpy(), classes=tuple("abcde"), origin="test")
    return Problem("a tiny one", model, images, ThreatModel.parse("Linf@0.05"), steps=10, step_size=0.0125)


def broken_by_plain_pgd(problem):
    """Return who is broken by the last iterate, written down here independently of both."""
    images, labels, epsilon = problem.images, problem.labels, problem.threat.radius
    current = images
    for _ in range(problem.steps):
        current = current.detach().requires_grad_()
        F.cross_entropy(problem.model(current), labels).backward()
        current = current + problem.step_size * current.grad.sign()
        current = torch.clamp(torch.clamp(current, images - epsilon, images + epsilon), 0, 1)
    return problem.model(current).argmax(1) != labels


@pytest.mark.parametrize("own", sorted(contestants.OWN))
def test_robench_breaks_whatever_plain_pgd_breaks(problem, own):
    plain = broken_by_plain_pgd(problem)
    assert 0.1 < plain.float().mean() < 0.9, "the problem is neither trivial nor hopeless"
    found = contestants.OWN[own](problem)()
    broken = problem.model(found).argmax(1) != problem.labels
    assert not (plain & ~broken).any()


def test_ideal_counts_the_images_that_stand_at_each_step():
    # Of five images one never breaks, the others after 0, 1, 3 and (seen by the last look) 4 of 4 steps: 4, 3, 3 and 2
    # of them stand when the four steps are taken.
    walk = Walk(last=torch.empty(5), first_broken=torch.tensor([5, 0, 1, 3, 4]))
    assert gradient_passes(walk, 4) == 4 + 3 + 3 + 2


def test_plain_walk_notes_when_an_image_first_breaks(problem):
    walks = [
        plain_pgd(
            problem.model,
            problem.images,
            problem.labels,
            threat=problem.threat,
            steps=k,
            step_size=problem.step_size,
        )
        for k in range(problem.steps + 1)
    ]
    wrong = torch.stack([problem.model(walk.last).argmax(1) != problem.labels for walk in walks])
    expected = torch.where(wrong.any(0), wrong.int().argmax(0), problem.steps + 1)
    assert walks[-1].first_broken.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 3


def test_engine_takes_one_more_step_than_ideal_per_broken_image(problem):
    """It sees that an image is broken in the forward pass of the step it would take next."""
    shard = contestants.shard_of(problem)
    worker = contestants.Worker(problem.model, problem.pixels, device=torch.device("cpu"), precision="fp32")
    cost = worker(shard).cost
    walk = plain_pgd(
        problem.model,
        problem.images,
        problem.labels,
        threat=problem.threat,
        steps=10,
        step_size=problem.step_size,
    )
    seen_on_the_way = int((walk.first_broken < 10).sum())
    assert cost.backward_passes == gradient_passes(walk, 10) + seen_on_the_way


def test_report_compares_with_what_is_there(problem, monkeypatch):
    def weak(problem):
        return lambda: problem.images

    monkeypatch.setitem(contestants.OTHERS, "weak", weak)
    monkeypatch.setattr(contestants, "version", {"weak": "1.0"}.get)
    report = pgd_speed.compare(problem, repeats=1, others=["weak", "absent"])
    assert report.not_installed == ["absent"]
    assert report.images == 120
    own = report.results["robench"]
    assert own.broken > 0
    assert own.only_here == own.only_robench == 0
    weak_result = report.results["weak"]
    assert (weak_result.broken, weak_result.only_here, weak_result.only_robench) == (0, 0, own.broken)
    text = pgd_speed.text_of(report)
    assert "absent          not installed" in text
    assert "x as fast as weak" in text


def test_float64_tells_who_is_weaker_from_who_is_unlucky(problem, monkeypatch):
    """Where robench misses images that others break, plain PGD in float64 says how many of them are to be broken."""
    monkeypatch.setitem(contestants.OWN, "robench", lambda problem: lambda: problem.images)
    monkeypatch.setitem(contestants.OTHERS, "far", lambda problem: lambda: further)
    monkeypatch.setattr(contestants, "version", {"far": "1.0"}.get)
    further = plain_pgd(
        problem.model, problem.images, problem.labels, threat=problem.threat, steps=60, step_size=0.0125
    ).last
    standing = problem.model(further).argmax(1) == problem.labels
    result = pgd_speed.compare(problem, repeats=1, others=["far"]).results["far"]
    walk = plain_pgd(problem.model, problem.images, problem.labels, threat=problem.threat, steps=10, step_size=0.0125)
    assert result.only_here == int((~standing).sum()) > 0
    assert result.only_here_exactly == int((~standing & (walk.first_broken <= 10)).sum())


def test_an_invalid_adversarial_image_counts_for_nobody(problem, monkeypatch):
    monkeypatch.setitem(contestants.OTHERS, "cheat", lambda problem: lambda: 1 - problem.images)
    monkeypatch.setattr(contestants, "version", {"cheat": "1.0"}.get)
    with pytest.raises(AssertionError, match="cheat"):
        pgd_speed.compare(problem, repeats=1, others=["cheat"])


@pytest.mark.data
def test_command_line_measures_memory(data_root, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    memory.main(["--images", "20", "--architecture", "small_cnn", "--data-root", str(data_root)])
    line = capfd.readouterr().out
    assert "small_cnn, 20 images" in line
    gibibytes = float(line.split()[-4])
    assert 0.05 < gibibytes < 1.5


@pytest.mark.data
def test_command_line_makes_its_model_once(data_root, tmp_path, monkeypatch, capsys):
    from benchmarks import problems

    made = []

    def untrained(model, train, threat):
        """Nothing."""
        made.append(threat)

    monkeypatch.setitem(problems._MAKERS, "lenet5", untrained)
    monkeypatch.setattr(contestants, "OTHERS", {})
    options = [
        "--images",
        "8",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--cache",
        str(tmp_path),
        "--data-root",
        str(data_root),
    ]
    for _ in range(2):
        pgd_speed.main([*options, "--json", str(tmp_path / "report.json")])
    assert len(made) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 8
    assert report["steps"] == 2
    assert np.isfinite(report["ideal_seconds"])
    assert "ideal" in capsys.readouterr().out


def test_the_site_is_rebuilt_without_torch() -> None:
    root = Path(__file__).parents[2]
    sizes = ["--models", "3", "--attacks", "2", "--examples", "50"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.site", *sizes],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("6 records of 50 examples"), done.stderr
    assert "without torch" in done.stdout
    assert "peak memory" in done.stdout

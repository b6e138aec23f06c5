"""`robench check` and `robench baseline` as they are typed, on a model of the digits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from robench.evaluation import worker
from robench.store import Store
from tests import synthetic
from tests.flow.conftest import ROOT

PGD = "pgd:steps=20,step_size=0.01"
ASK = ("--attack", PGD, "--attack", "fgsm", "--threat", "Linf@0.1", "--device", "cpu")


@pytest.fixture
def measured(workspace, robench):
    """The workspace with 200 answers of `tiny` to two attacks as the baseline."""
    assert robench("eval", "--model", "tiny", "--examples", 200, *ASK)[0] == 0
    assert robench("baseline", "set")[0] == 0
    return workspace


def engine(robench):
    return robench("check", "--engine", "--measure", "--device", "cpu")


def test_nothing_changed(measured, robench):
    status, out, _ = robench("check")
    assert status == 0
    assert out.splitlines()[-1] == "robench check passed: robustness did not get worse (4 same, 0 better)"
    status, out, _ = engine(robench)
    assert status == 0, out
    assert "the engine did not get worse" in out
    # A folder with answers of its own is a reports folder, whatever else lies in it.
    (measured / "reports" / "reports").mkdir()
    assert robench("check", "--candidate", measured / "reports")[0] == 0


def sign_noise(images, threat, random):
    return (images + threat.radius * (2 * random.at("noise").uniform(images) - 1).sign()).clamp(0, 1)


def test_half_the_steps_are_caught(measured, robench, monkeypatch):
    real = worker.attack_of

    def weakened(identity, norm):
        attack = real(identity, norm)
        return lambda *arguments, steps=None, **rest: attack(
            *arguments, **({"steps": steps // 2} if steps else {}), **rest
        )

    monkeypatch.setattr(worker, "attack_of", weakened)
    status, out, _ = engine(robench)
    assert status == 1
    assert "the attack got weaker on frozen weights" in out


def test_noise_instead_of_gradients_is_caught(measured, robench, monkeypatch):
    def weakened(identity, norm):
        def attack(model, images, labels, *, threat, random, **rest):
            model(images)
            return sign_noise(images, threat, random)

        return attack

    monkeypatch.setattr(worker, "attack_of", weakened)
    status, out, _ = engine(robench)
    assert status == 1
    assert "the attack got weaker on frozen weights" in out


def test_changed_preprocessing_is_caught(measured, robench, monkeypatch):
    real = worker.Worker.load

    def darker(self, ids):
        images, labels = real(self, ids)
        return images * 0.4, labels

    monkeypatch.setattr(worker.Worker, "load", darker)
    status, out, _ = engine(robench)
    assert status == 1
    assert "the model's answers moved on frozen weights; look for a change of preprocessing" in out


def test_changed_logits_are_caught(measured, robench, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight) * 1.01)
    status, out, _ = engine(robench)
    assert status == 1
    assert "damaged: tiny" in out
    assert "logits" in out


def test_other_weights_are_no_frozen_reference(measured, robench):
    folder = measured / "model_zoo" / "tiny"
    real = folder.resolve()
    folder.unlink()
    folder.mkdir()
    for path in real.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    card = json.loads((folder / "card.json").read_text())
    card["weights"]["sha256"] = "0" * 64
    (folder / "card.json").write_text(json.dumps(card))
    status, out, _ = robench("check", "--engine", "--candidate", measured / "reports")
    assert status == 1
    assert "is a frozen reference, and is not what the baseline measured (weights 00000000" in out


def test_a_weaker_model_is_caught_in_every_form(measured, robench, tmp_path):
    assert robench("train", "digits-standard", "--set", "epochs=1", "--out", "weak", "--device", "cpu")[0] == 0
    status, out, _ = robench("check", "--model", "weak=tiny")
    assert status == 1
    assert "missing: weak" in out
    files = [tmp_path / f"report{suffix}" for suffix in (".md", ".xml", ".json", ".html")]
    writes = [part for path in files for part in ("--write", path)]
    status, out, _ = robench("check", "--model", "weak=tiny", "--measure", "--device", "cpu", *writes)
    assert status == 1
    assert out.splitlines()[-1].startswith("robench check failed: ")
    markdown, junit, made, page = (path.read_text(encoding="utf-8") for path in files)
    assert markdown.startswith("### ❌ robench check failed")
    suite = ET.fromstring(junit)
    assert int(suite.get("failures")) == len(suite.findall(".//failure")) >= 1
    verdicts = json.loads(made)["verdicts"]
    worst = next(v for v in verdicts if v["verdict"] == "worse")
    assert worst["lost"]
    assert f"<figcaption>{worst['lost'][0]}: " in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "")
    status, out, _ = robench("check", "--model", "weak=tiny", "--format", "github")
    assert status == 1
    assert "::error title=robench%3A" in out
    assert all(line.startswith("::") for line in out.splitlines())


def test_fast_stops_early_and_keeps_what_it_computed(measured, robench):
    assert robench("train", "digits-standard", "--set", "epochs=1", "--out", "weak", "--device", "cpu")[0] == 0
    status, out, _ = robench("check", "--fast", "--model", "weak=tiny", "--device", "cpu")
    assert status == 1
    assert "worse: weak" in out
    assert "of 200 examples" in out
    assert any((measured / "reports" / ".work").glob("*.parquet"))
    status, out, _ = robench("check", "--fast", "--device", "cpu", "--tolerance", 20)
    assert status == 0, out
    assert "a loss of 20 points is refuted after" in out
    status, out, _ = robench("check", "--fast", "--examples", 10, "--device", "cpu")
    assert status == 0
    assert "undecided after 10 of 10 examples" in out


def test_the_page_says_why_it_has_no_pictures(measured, robench, tmp_path):
    store = Store(measured / "reports")
    spec = synthetic.spec("elsewhere:factory", count=100, weights="old", dataset="folder:photos")
    synthetic.put(store, spec, synthetic.first_of(100, 90))
    assert robench("baseline", "set", "--model", "elsewhere:factory")[0] == 0
    new = synthetic.spec("elsewhere:factory", count=100, weights="new", dataset="folder:photos")
    outcomes = synthetic.rows(synthetic.first_of(100, 30))
    answer = synthetic.record(new, outcomes)
    later = answer.provenance.model_copy(update={"finished": "2027-01-01T00:00:00Z"})
    store.write(answer.model_copy(update={"provenance": later}), outcomes)
    page = tmp_path / "page.html"
    assert robench("check", "--write", page)[0] == 1
    assert "no pictures: records do not say in which folder folder:photos lies" in page.read_text()


def test_the_baseline_is_shown_and_compared(measured, robench):
    status, out, _ = robench("baseline", "show")
    assert status == 0
    assert f"{PGD} under Linf@0.1, 200 of 449 test images of digits" in out
    assert robench("baseline", "diff")[1] == "no difference\n"
    path = measured / "reports" / "baseline.toml"
    other = measured / "other.toml"
    other.write_text(path.read_text().replace('"clean" = ', '"clean" = 0.0 # ', 1))
    status, out, _ = robench("baseline", "diff", other)
    assert status == 0
    assert out.count("clean") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--baseline", "nowhere.toml"], "there is no baseline nowhere.toml; make one: robench baseline set"),
        (["--model", "other"], "baseline.toml; known: tiny"),
        (["--model", "tinny"], "baseline.toml; did you mean 'tiny'?"),
        (["--model", "tinny=tiny"], "unknown model 'tinny'; did you mean 'tiny'?"),
        (["--model", "digits-mart=tiny", "--fast"], "is not trained yet; run: robench train digits-mart"),
        (["--model", "tinny=tiny", "--measure"], "unknown model 'tinny'; did you mean 'tiny'?"),
        (["--format", "pdf"], "--format 'pdf' is unknown; write text, markdown"),
        (["--write", "a.pdf"], "--write a.pdf: the ending says what is written"),
        (["--alpha", "1"], "--alpha 1 is no probability"),
        (["--engine"], "--engine compares new answers of frozen models; add --measure"),
        (["--examples", "5"], "--examples 5 is the budget of --fast"),
        (["--fast", "--tolerance", "0"], "--fast cannot decide --tolerance 0"),
        (
            ["--measure", "--fast"],
            "--measure asks all of the baseline's questions, --fast only until it is clear; give",
        ),
        (
            ["--candidate", "nowhere"],
            "--candidate nowhere: there is no such folder; give the reports folder of the new",
        ),
        (["--candidate", "../workspace"], "is a workspace; give its reports folder: --candidate ../workspace/reports"),
        (["--candidate", "../workspace", "--measure"], "is a workspace; give its reports folder"),
        (["--candidate", __file__], "test_check.py is a file; give the reports folder of the new answers"),
    ],
)
def test_bad_input_is_one_line(measured, robench, options, said):
    status, out, err = robench("check", *options)
    assert status == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_baseline_may_stand_anywhere(measured, robench):
    """Beside a reports folder's answers it is made of them, elsewhere of the workspace's; both lead back to them."""
    status, _, err = robench("check", "--baseline", "own/b2.toml")
    assert (status, "make one: robench baseline set --baseline own/b2.toml" in err) == (2, True)
    status, out, _ = robench("baseline", "set", "--baseline", "own/b2.toml")
    assert status == 0
    assert out == f"own/b2.toml: 2 answers of tiny, from {measured / 'reports'}\n"
    assert 'record = "../../workspace/reports/records/tiny/' in Path("own/b2.toml").read_text()
    status, out, _ = robench("check", "--baseline", "own/b2.toml")
    assert status == 0, out
    assert "(4 same, 0 better)" in out
    assert robench("baseline", "diff", "--baseline", "own/b2.toml")[1] == "no difference\n"
    assert robench("check", "--engine", "--measure", "--device", "cpu", "--baseline", "own/b2.toml")[0] == 0

    frozen = measured / "reports" / "engine"
    for kind in ("records", "outcomes"):
        shutil.copytree(measured / "reports" / kind, frozen / kind)
    next((frozen / "records" / "tiny").glob("*.json")).unlink()
    path = frozen / "baseline.toml"
    assert robench("baseline", "set", "--baseline", path)[1] == f"{path}: 1 answers of tiny, from {frozen}\n"
    assert 'record = "records/tiny/' in path.read_text()


def test_a_misspelt_model_is_unknown(measured, robench):
    status, out, err = robench("baseline", "set", "--model", "tinny")
    assert (status, out) == (2, "")
    assert err == "robench: unknown model 'tinny'; did you mean 'tiny'?\n"
    status, _, err = robench("baseline", "set", "--model", "elsewhere:factory")
    assert (status, "elsewhere:factory has no complete answer of its current weights" in err) == (2, True)
    assert "run robench eval --model elsewhere:factory first" in err


def test_a_file_that_cannot_be_written_is_named_elsewhere(measured, robench, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for command, option in ((["check"], "--write"), (["baseline", "set"], "--baseline")):
        target = tmp_path / "file" / "q.md"
        status, _, err = robench(*command, option, target)
        assert status == 2
        assert (
            f"{option} {target}: cannot write to {target.parent}: a file is in the way; name a file in another" in err
        )
        assert "--workspace" not in err


def test_questions_that_differ_in_one_thing_have_rows_that_do(workspace, robench):
    """Each number of a check can be told from the others by the model, the question and the metric that are printed."""
    for options in (["--threat", "Linf@0.1"], ["--threat", "L2@1"], ["--top-k", 2], ["--votes", 2, "--sigma", 0.1]):
        threat = [] if "--threat" in options else ["--threat", "Linf@0.1"]
        question = ("eval", "--model", "tiny", "--examples", 40, "--attack", "fgsm", "--device", "cpu")
        assert robench(*question, *options, *threat)[0] == 0
    assert robench("baseline", "set")[0] == 0
    for options in ([], ["--fast", "--device", "cpu"]):
        status, out, _ = robench("check", *options, "--format", "json")
        assert status == 0, out
        rows = [(v["question"], v["metric"]) for v in json.loads(out)["verdicts"]]
        of = "40 of 449 test images of digits"
        assert {row for row in rows if row[1] == "clean"} == {
            (of, "clean"),
            (f"{of}, top_k 2", "clean"),
            (f"{of}, votes 2, sigma 0.1", "clean"),
        }
        assert len(rows) == len(set(rows)) == 7, rows
        assert (f"fgsm under L2@1, {of}", "fgsm") in rows
        assert (f"fgsm under Linf@0.1, {of}, top_k 2", "fgsm") in rows


def test_a_hundred_models_take_two_seconds_and_no_torch(tmp_path):
    store = Store(tmp_path / "reports")
    answers = [
        synthetic.put(store, synthetic.spec(f"m{i}:factory", attack, count=1000), synthetic.first_of(1000, 500 + i))
        for i in range(100)
        for attack in ("pgd-20", "fgsm")
    ]
    assert len(answers) == 200
    code = (
        "import sys, time; started = time.process_time(); from robench.cli import run;"
        "status = run(sys.argv[1:]); seconds = time.process_time() - started;"
        "print('torch' in sys.modules, 'scipy' in sys.modules, status, seconds, file=sys.stderr)"
    )

    def robench(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--workspace", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stderr.split()

    robench("baseline", "set")
    torch_there, scipy_there, status, seconds = robench("check")
    assert (torch_there, scipy_there, status) == ("False", "False", "0")
    assert float(seconds) < 6, "two seconds on an idle machine"


def test_infinite_medians_are_compared(workspace, robench):
    store = Store(workspace / "reports")
    reach = np.where(np.arange(100) < 60, np.inf, 0.1)
    synthetic.put_minimum_norm(store, synthetic.spec("m:factory", "ddn-100", count=100), reach)
    assert robench("baseline", "set")[0] == 0
    status, out, _ = robench("check")
    assert status == 0
    assert "∞" in out

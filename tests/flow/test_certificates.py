"""`robench eval` certifies: from the command line to records and pages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch import nn

from robench.cli import certifying as cli_certifying
from robench.evaluation import certifying
from robench.store import Store

EVAL = ("eval", "--model", "tiny", "--device", "cpu", "--examples", "12", "--sigma", "0.1")


def certificates_of(workspace):
    return [stored.record for stored in Store(workspace / "reports").certificates()]


def test_certificates_are_computed_once_and_stand_on_the_leaderboard(workspace, robench):
    asked = ("--certificate", "cohen:n=200", "--certificate", "effective-margin", "--certificate", "anytime:n=400")
    status, out, _ = robench(*EVAL, *asked, "--dry-run")
    assert status == 0
    assert "nothing was computed" in out
    assert certificates_of(workspace) == []

    status, out, _ = robench(*EVAL, *asked)
    assert status == 0
    assert "keeps its answer" in out
    assert "No guarantee" in out
    records = certificates_of(workspace)
    assert {r.spec.certificate.entry for r in records} == {"cohen", "effective-margin", "anytime"}

    status, out, _ = robench(*EVAL, *asked, "--json")
    assert status == 0
    assert {r["identity"] for r in json.loads(out)} == {r.spec.identity for r in records}
    assert [r.provenance.finished for r in certificates_of(workspace)] == [r.provenance.finished for r in records]

    status, out, _ = robench("leaderboard", "certification")
    assert status == 0
    assert "cohen" in out


def test_an_interrupted_certification_goes_on_to_the_same_radii(workspace, robench, monkeypatch):
    from robench.evaluation.certifying import Certifier

    question = (*EVAL, "--certificate", "cohen:n=200", "--shard-size", "5")
    original, calls = Certifier._shard, []

    def once(self, spec, ids):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, spec, ids)

    monkeypatch.setattr(Certifier, "_shard", once)
    assert robench(*question)[0] == 130
    assert certificates_of(workspace) == []
    assert robench(*question)[0] == 0
    assert calls == [5, 5, 5, 2]
    (record,) = certificates_of(workspace)
    store = Store(workspace / "reports")
    interrupted = store.outcomes(record)
    store.certificate_path(record.spec).unlink()
    monkeypatch.setattr(Certifier, "_shard", original)
    assert robench(*question[:-2], "--batch-size", "77")[0] == 0
    (again,) = certificates_of(workspace)
    assert np.array_equal(store.outcomes(again)["hits"], interrupted["hits"])


def test_suites_of_certificates(workspace, robench):
    status, _, err = robench("eval", "--model", "tiny", "--suite", "cohen")
    assert (status, "add --sigma 0.25" in err) == (2, True)
    status, out, _ = robench("eval", "--model", "tiny", "--suite", "margins", "--examples", "20")
    assert status == 0
    assert "effective-margin" in out
    status, out, _ = robench("eval", "--model", "tiny", "--suite", "margins", "--examples", "20", "--split", "train")
    assert status == 0
    assert "train examples" in out
    assert {r.spec.examples.split for r in certificates_of(workspace)} == {"test", "train"}
    status, _, err = robench("eval", "--model", "tiny", "--suite", "margins", "--split", "tset")
    assert (status, "--split 'tset' is unknown" in err) == (2, True)
    status, _, err = robench(*EVAL, "--certificate", "cohen:n=5")
    assert (status, "smallest that can is 10" in err) == (2, True)
    status, _, err = robench(*EVAL, "--certificate", "effective-margin", "--compile")
    assert (status, "--compile changes nothing about effective-margin" in err) == (2, True)
    status, _, err = robench(*EVAL, "--certificate", "chen")
    assert (status, "did you mean 'cohen'" in err) == (2, True)
    status, _, err = robench(*EVAL, "--certificate", "cohen:sigma=-1")
    assert (status, "sigma" in err) == (2, True)


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        ("anytime:goal=decision", "goal=decision needs at=RADIUS; write anytime:goal=decision,at=0.5"),
        ("anytime:at=0.5", "at=0.5 is of another goal; write anytime:goal=decision,at=0.5"),
        ("anytime-deterministic:n=3", "n = 3 samples certify nothing at alpha = 0.001"),
        ("cohen:n=9", "n = 9 samples certify nothing at alpha = 0.001; the smallest that can is 10"),
        ("cohen:alpha=2", "n = 10000 samples certify nothing at alpha = 2; alpha lies between 0 and 1"),
        ("cohen:top_k=10", "top_k = 10 of 10 classes certifies nothing; take fewer"),
        ("l-bound:top_k=10", "top_k = 10 leaves no class of 10 to compare with"),
        ("smoothed-prediction:n=2", "n = 2 samples can tell no class from another"),
    ],
)
def test_a_question_without_an_answer_is_refused_before_any_work(
    workspace, robench, monkeypatch, certificate, said, dry_run
):
    """The dry run says what the run would say, and the run says it before the model is loaded."""
    monkeypatch.setattr(cli_certifying, "checked_model", lambda *_: pytest.fail("the model was loaded"))
    before = sorted(workspace.rglob("*"))
    status, out, err = robench(
        *("eval", "--model", "tiny", "--device", "cpu", "--examples", "5", "--sigma", "0.5"),
        *("--certificate", certificate, *dry_run),
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("robench: certificate ")
    assert said in err
    assert sorted(workspace.rglob("*")) == before


def test_what_can_be_answered_is_planned(workspace, robench):
    question = ("eval", "--model", "tiny", "--sigma", "0.5", "--examples", "5", "--dry-run", "--json")
    texts = ("anytime:goal=decision,at=0.5", "cohen:n=100000,top_k=9", "l-bound:samples=100000")
    for text in texts:
        status, out, err = robench(*question, "--certificate", text)
        assert (status, err) == (0, "")
        assert json.loads(out)[0]["status"] == "new"


def test_a_compiled_model_is_the_one_that_is_certified(workspace, robench, monkeypatch):
    """What is sampled is what the compiler made, here something of another opinion, and the record says so."""

    class Contrary(nn.Module):
        def __init__(self, search):
            super().__init__()
            self.search = search

        def forward(self, images):
            return -self.search(images)

    question = ("eval", "--model", "tiny", "--device", "cpu", "--examples", "12", "--sigma", "0.5")
    asked = ("--certificate", "cohen:n=200", "--certificate", "effective-margin")
    monkeypatch.setattr(certifying, "compiled", lambda search, **_: Contrary(search))
    assert robench(*question, *asked, "--compile")[0] == 0
    by_name = {record.spec.certificate.entry: record for record in certificates_of(workspace)}
    assert by_name["cohen"].provenance.compiled
    rows = {name: Store(workspace / "reports").outcomes(record) for name, record in by_name.items()}
    assert (rows["cohen"]["plain_prediction"] != rows["effective-margin"]["plain_prediction"]).mean() > 0.9


def test_another_seed_draws_other_noise(workspace, robench):
    question = ("eval", "--model", "tiny", "--device", "cpu", "--examples", "12", "--sigma", "0.5")
    for seed in ("0", "1"):
        assert robench(*question, "--certificate", "cohen:n=200", "--seed", seed)[0] == 0
    store = Store(workspace / "reports")
    first, second = (store.outcomes(record)["hits"] for record in certificates_of(workspace))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--certificate", "cohen:n=200,sigma=0.5", "--sigma", "0.25"],
            "certificate cohen:n=200,sigma=0.5 has the noise sigma 0.5, but --sigma is 0.25; leave one of the two out",
        ),
        (
            ["--certificate", "anytime", "--certificate", "cohen:sigma=0.5", "--attack", "fgsm", "--sigma", "0.25"],
            "certificate cohen:sigma=0.5 has the noise sigma 0.5, but --sigma is 0.25",
        ),
        (
            ["--certificate", "cohen:n=200", "--sigma", "0.25", "--threat", "Linf@0.3"],
            "--threat changes nothing about cohen:n=200; leave it out, or add --attack NAME",
        ),
        (["--suite", "margins", "--threat", "L2@1"], "--threat changes nothing about effective-margin"),
        (
            ["--certificate", "effective-margin", "--sigma", "0.25"],
            "--sigma changes nothing about effective-margin; leave it out, or add --attack NAME",
        ),
        (["--certificate", "anytime:goal=decision", "--sigma", "0.25"], "certificate anytime: goal=decision needs at="),
    ],
)
def test_options_that_contradict_or_change_nothing_are_refused(workspace, robench, options, said):
    status, out, err = robench("eval", "--model", "tiny", "--device", "cpu", "--examples", "12", *options)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert certificates_of(workspace) == []


def test_the_noise_is_said_wherever_it_was_typed(workspace, robench):
    question = (
        "eval",
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--examples",
        "12",
        "--certificate",
        "cohen:n=200,sigma=0.5",
    )
    for options in ([], ["--sigma", "0.5"], ["--dry-run"]):
        status, out, _ = robench(*question, *options)
        assert status == 0
        assert "cohen:n=200, sigma 0.5" in out
    (row,) = json.loads(robench(*question, "--dry-run", "--json")[1])
    assert row["parameters"]["sigma"] == 0.5
    asked = ("--certificate", "effective-margin", "--attack", "fgsm", "--threat", "Linf@0.1", "--sigma", "0.1")
    status, _, err = robench(*question[:-2], *asked, "--dry-run")
    assert status == 0, err

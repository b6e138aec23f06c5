"""Transfer matrices and second looks as a user asks for them."""

from __future__ import annotations

import csv
import json

import pytest
from safetensors.numpy import load_file, save_file

from robench.cli import run
from robench.store import Store

COMMON = ("--threat", "Linf@0.1", "--examples", "60", "--device", "cpu")
MATRIX = ("transfer", "--model", "tiny", "--model", "other", *COMMON)


@pytest.fixture(scope="session")
def retrained(trained):
    """The same recipe with another seed, as `other` beside `tiny`."""
    arguments = [
        "train",
        "digits-standard",
        "--set",
        "epochs=2",
        "--set",
        "seed=1",
        "--out",
        "other",
        "--device",
        "cpu",
    ]
    assert run([*arguments, "--workspace", str(trained)]) == 0
    return trained


@pytest.fixture
def workspace(workspace, retrained):
    (workspace / "model_zoo" / "other").symlink_to(retrained / "model_zoo" / "other")
    return workspace


def test_one_command_makes_a_matrix_and_adds_a_threat_model(workspace, robench):
    status, out, err = robench(*MATRIX)
    assert status == 0, err
    assert "on images of tiny" in out
    page = workspace / "reports" / "leaderboards" / "transfer-digits-linf-0.1-pgd-60.html"
    assert str(page) in out
    assert "retrained: the same recipe, another seed" in page.read_text()
    with page.with_suffix(".csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    for target, other in (("tiny", "other"), ("other", "tiny")):
        white_box, transferred = float(rows[target][f"on {target}"]), float(rows[target][f"on {other}"])
        assert white_box < transferred < float(rows[target]["clean"])
    before = {p: p.stat().st_mtime_ns for p in (workspace / "reports").rglob("*") if "leaderboards" not in p.parts}
    status, out, _ = robench(*MATRIX, "--json")
    assert status == 0
    assert len(json.loads(out)) == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before, "the second time nothing is computed"
    saved = workspace / "reports" / "adversarials"
    saved.rename(saved.with_name("elsewhere"))
    assert robench(*MATRIX)[0] == 0
    assert not saved.exists(), "images that nobody needs are not made again"
    status, out, _ = robench(*MATRIX, "--threat", "Linf@0.2")
    assert status == 0
    assert "transfer-digits-linf-average-0.2-pgd-60.html" in out
    assert len(list(Store(workspace / "reports").transfers())) == 8


def test_a_source_classifies_nothing_and_early_stops_are_named(workspace, robench):
    status, out, err = robench("transfer", "--model", "tiny", "--source", "other", "--attack", "pgd-10", *COMMON)
    assert status == 0, err
    assert {t.record.spec.target.id for t in Store(workspace / "reports").transfers()} == {"tiny"}
    assert "pgd-10 stops at the first image that fools its source" in out


def test_models_of_other_data_do_not_meet(workspace, robench, tmp_path):
    status, _, err = robench("transfer", "--model", "tiny", "--model", "torchvision:resnet18", *COMMON)
    assert status == 2
    assert "torchvision:resnet18 classifies imagenet, tiny digits" in err
    status, _, err = robench(*MATRIX, "--all")
    assert (status, "exclude each other" in err) == (2, True)


def test_saved_images_are_verified_by_identity(workspace, robench):
    attack = ("eval", "--model", "tiny", "--attack", "pgd-10", *COMMON)
    status, _, err = robench("verify")
    assert (status, "has saved images" in err) == (2, True)
    robench(*attack)
    (stored,) = Store(workspace / "reports").records()
    identity = stored.record.spec.identity
    status, _, err = robench("verify", identity)
    assert (status, "evaluate it again with --save-adversarials" in err) == (2, True)
    robench(*attack, "--save-adversarials")
    for arguments in ((), (identity,), (identity[:6],)):
        status, out, err = robench("verify", *arguments)
        assert status == 0, err
        assert "agrees on 60 of 60" in out
    (found,) = json.loads(robench("verify", identity, "--json")[1])
    assert found == {"identity": identity, "examples": 60, "agreeing": 60, "borderline": 0}
    status, _, err = robench("verify", "ffff")
    assert (status, "unknown record 'ffff'" in err) == (2, True)


def test_tampered_images_end_with_one_line(workspace, robench):
    robench("eval", "--model", "tiny", "--attack", "pgd-10", *COMMON, "--save-adversarials")
    (path,) = (workspace / "reports" / "adversarials").iterdir()
    tensors = load_file(path)
    tensors["adversarial_images"][:] = 0.5
    (stored,) = Store(workspace / "reports").records()
    spec = stored.record.spec
    facts = {"identity": spec.identity, "weights_sha256": spec.model.weights_sha256, "misclassified": "left"}
    save_file(tensors, path, metadata=facts)
    status, out, err = robench("verify")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "break the rules: Linf distance 0.5 exceeds Linf@0.1" in err

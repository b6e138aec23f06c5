"""Another library's attacks, as a user asks for them."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from robench import backends
from robench.errors import UserError
from robench.store import Store
from tests.flow.conftest import ROOT

EVAL = ("eval", "--model", "tiny", "--attack", "pgd-10", "--threat", "Linf@0.1", "--device", "cpu", "--examples", "60")


@pytest.fixture
def foolbox():
    """Foolbox's version."""
    try:
        return backends.installed("foolbox")
    except UserError as error:
        pytest.skip(str(error))


def test_a_librarys_answer_is_a_record_and_a_column_of_its_own(workspace, robench, foolbox):
    assert robench(*EVAL)[0] == 0
    status, out, _ = robench(*EVAL, "--backend", "foolbox")
    assert status == 0
    assert "pgd-10 (foolbox)" in out
    records = {stored.record.spec.attack.backend: stored.record for stored in Store(workspace / "reports").records()}
    assert set(records) == {"native", f"foolbox {foolbox}"}
    other = records[f"foolbox {foolbox}"]
    assert other.status == "complete"
    assert "foolbox has no stop_when_broken of pgd, and goes without" in other.notes
    assert any("belong to the batch" in note for note in other.notes)
    assert other.cost.backward_passes == 10 * other.clean.successes
    _, out, _ = robench("leaderboard")
    table = next(line for line in out.split() if line.endswith(".csv"))
    with open(table, encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    assert any(column.startswith("pgd-10 (foolbox)") for column in header)
    (row,) = json.loads(robench(*EVAL, "--backend", "foolbox", "--dry-run", "--json")[1])
    assert (row["status"], row["attack"], row["backend"]) == ("known", "pgd-10 (foolbox)", f"foolbox {foolbox}")


def test_an_absent_library_is_one_line_before_any_work(workspace, robench, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    status, _, err = robench(*EVAL, "--backend", "foolbox")
    assert status == 2
    assert err == "robench: backend foolbox is not installed; pip install foolbox\n"
    assert not (workspace / "reports").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--backend", "fullbox", "--attack", "pgd-10"), "unknown backend 'fullbox'; did you mean 'foolbox'?"),
        (("--backend", "art", "--attack", "pgd:loss=dlr"), "backend art has pgd with loss=ce only, not with dlr"),
        (
            ("--backend", "autoattack", "--attack", "pgd-10"),
            "backend autoattack has no attack pgd; it has apgd, autoattack, fab, square",
        ),
    ],
)
def test_what_a_library_cannot_do_is_said_without_torch_and_without_the_library(workspace, options, problem):
    code = (
        "import sys; from robench.cli import run; status = run(sys.argv[1:]);"
        "heavy = {'torch', 'foolbox', 'art', 'pyautoattack'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(*EVAL[:3], *options, *EVAL[5:])],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"robench: {problem}\n"


def test_show_says_which_backends_offer_an_attack(robench):
    (pgd,) = json.loads(robench("show", "pgd-20", "--json")[1])
    assert pgd["backends"]["native"] == ["Linf", "L2"]
    assert pgd["backends"]["foolbox"] == ["Linf", "L2"]
    assert "autoattack" not in pgd["backends"]
    found = json.loads(robench("show", "apgd-t", "--json")[1])
    assert set(found[0]["backends"]) == {"native", "autoattack"}
    out = robench("show", "pgd")[1]
    assert "foolbox (Linf, L2)" in out

"""`robench reproduce` and `robench train --table`: a table from nothing to its page, and not twice."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest

from robench import catalog
from robench.cli import costing
from robench.papers import definitions
from robench.papers.work import Passes
from robench.reporting.inventory import add_files
from robench.training import loop, stopwatch
from tests.flow.conftest import ROOT

PAPER = """
title = "Digits"
authors = "Nobody"
summary = "two networks"
source = "made here"
tables = ["digits-1"]
"""
TABLE = """
paper = "digits"
summary = "Digits under Linf 0.15"
source = "Table 1"
kind = "results"

[cells]
threat = "Linf@0.15"

[scales.smoke]
changes = ["epochs=2", "train_examples=200", "selection.metric=last", "selection.attack=none"]
examples = 30
says = "no selection"

[[columns]]
id = "clean"
title = "Clean"
measure = "clean"

[[columns]]
id = "pgd"
title = "PGD-10"
measure = "robust"
attack = "pgd-10"

[[columns]]
id = "moved"
title = "From standard"
measure = "transfer"
attack = "pgd-10:stop_when_broken=false"
source = "digits-standard"

[[columns]]
id = "margin"
title = "Margin"
measure = "certificate"
certificate = "effective-margin"
statistic = "mean"
over = "correct"
split = "train"

[[rows]]
id = "standard"
title = "Standard"
recipe = "digits-standard"
printed = ["97.0", "10.0", "10.0", "0.50"]

[[rows]]
id = "pgd"
title = "PGD"
recipe = "digits-pgd"
printed = ["96.0", "80.0", "-", "0.70"]

[[rows]]
id = "unknown"
title = "Unknown"
recipe = "digits-of-tomorrow"
printed = ["1.0", "2.0", "3.0", "4.0"]
"""


@pytest.fixture
def digits_table(tmp_path, monkeypatch):
    """A paper with one table of two small networks and a row that nobody has built."""
    for kind, name, text in (("papers", "digits", PAPER), ("tables", "digits-1", TABLE)):
        path = tmp_path / f"{name}.toml"
        plugin = catalog.Plugin(kind, name, name, path, tomllib.loads(text))
        monkeypatch.setitem(catalog.plugins(kind), name, plugin)
    cached = [definitions.load_paper, definitions.load_table, definitions.changes_at, definitions.scaled_recipe]
    for function in cached:
        function.cache_clear()
    yield "digits-1"
    for function in cached:
        function.cache_clear()


def stamps(workspace):
    """When every model and record was written."""
    kept = [*workspace.glob("model_zoo/*/card.json"), *workspace.glob("reports/[rtc]*/*/*.json")]
    return {path: path.stat().st_mtime_ns for path in kept}


def test_from_nothing_to_the_page_and_not_twice(workspace, robench, digits_table):
    status, out, err = robench("reproduce", digits_table, "--scale", "smoke", "--device", "cpu")
    assert status == 0, err
    assert "digits-of-tomorrow-smoke: no recipe digits-of-tomorrow; skipped" in out
    page = (workspace / "reports/leaderboards/paper-digits.html").read_text()
    lines = (workspace / "reports/leaderboards/digits-1.csv").read_text().splitlines()
    measured = [line for line in lines[1:] if ",smoke," in line]
    assert len(measured) == 7
    # After seven steps a network is nearly constant: a linear margin beyond the box of images is no number.
    assert sum("no two images are farther apart" in line for line in lines) == 1
    assert sum("no recipe digits-of-tomorrow" in line for line in lines) == 4
    assert "digits-pgd-smoke" in page
    card = json.loads((workspace / "model_zoo/digits-pgd-smoke/card.json").read_text())
    assert card["scale"] == "2 of 30 epochs, 200 training images; no selection"
    assert card["recipe"]["train_examples"] == 200
    assert card["provenance"]["command"].startswith("robench train digits-pgd --set epochs=2")

    before = stamps(workspace)
    gone = workspace / "reports/leaderboards/gone.html"
    add_files(gone.parent, [gone])
    gone.write_text("the page of a table that is gone")
    status, out, err = robench("reproduce", digits_table, "--scale", "smoke", "--device", "cpu")
    assert status == 0
    assert err.splitlines()[-1] == f"robench: removed {gone} (of an earlier site)"
    assert not gone.exists()
    assert out.count("there already") == 2
    assert stamps(workspace) == before


def test_the_command_of_a_card_makes_the_same_weights(workspace, robench, digits_table):
    assert robench("train", "--table", digits_table, "--scale", "smoke", "--device", "cpu")[0] == 0
    card = json.loads((workspace / "model_zoo/digits-pgd-smoke/card.json").read_text())
    words = shlex.split(card["provenance"]["command"])[1:]
    words[words.index("--out") + 1] = "again"
    assert robench(*words, "--device", "cpu")[0] == 0
    again = json.loads((workspace / "model_zoo/again/card.json").read_text())
    assert again["weights"]["sha256"] == card["weights"]["sha256"]
    assert (again["recipe"], again["scale"]) == (card["recipe"], card["scale"])


def test_interrupted_it_goes_on_where_it_was(workspace, robench, digits_table, monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    save, taken = loop.Training._save, []

    def stop_at_sixth(self, *arguments):
        save(self, *arguments)
        taken.append(self.folder.name)
        if len(taken) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "_save", stop_at_sixth)
    status, _, err = robench("train", "--table", digits_table, "--scale", "smoke", "--device", "cpu")
    assert status == 130
    assert "the same command goes on from there" in err
    assert taken[-1] == "digits-standard-smoke"
    assert not (workspace / "model_zoo/digits-standard-smoke/card.json").exists()
    status, out, err = robench("train", "--table", digits_table, "--scale", "smoke", "--device", "cpu")
    assert status == 0, err
    steps = sum(name == "digits-standard-smoke" for name in taken)
    # Four steps an epoch, two epochs, and a snapshot after each epoch: none is taken twice.
    assert steps == 2 * (4 + 1)
    assert (workspace / "model_zoo/digits-pgd-smoke/card.json").exists()
    assert "there already" not in out


def test_a_dry_run_says_the_cost_and_writes_nothing(workspace, robench, digits_table):
    before = sorted(workspace.rglob("*"))
    status, out, err = robench("reproduce", digits_table, "--scale", "smoke", "--dry-run", "--device", "cpu")
    assert status == 0, err
    assert "digits-pgd-smoke" in out
    assert "no recipe digits-of-tomorrow" in out
    assert "in all about" in out
    assert sorted(workspace.rglob("*")) == before


def test_a_dry_run_times_a_student_before_there_is_its_teacher(workspace, robench, digits_table, monkeypatch):
    """By a pass of the network that it will start from, and by as many as its recipe takes."""
    monkeypatch.setattr(costing, "training_passes", lambda recipe: Passes(7000, 0))
    monkeypatch.setattr(stopwatch, "seconds_of_a_pass", lambda model, batch, **_: batch / 1024)
    table = catalog.plugins("tables")[digits_table]
    text = TABLE.replace('recipe = "digits-pgd"', 'recipe = "digits-heat"')
    monkeypatch.setitem(catalog.plugins("tables"), digits_table, replace(table, facts=tomllib.loads(text)))
    status, out, err = robench("reproduce", digits_table, "--scale", "smoke", "--dry-run", "--device", "cpu", "--json")
    assert status == 0, err
    rows = {row["model"]: row for row in json.loads(out)}
    teacher, student = rows["digits-standard-smoke"], rows["digits-heat-smoke"]
    assert (teacher["status"], student["status"]) == ("to train", "to train after digits-standard-smoke")
    # Standard training takes a pass of 200 images in each of two epochs; batches are rounded up to whole images.
    assert student["training seconds"] == pytest.approx(7000 * teacher["training seconds"] / 400, rel=0.05)


def forecast(robench, table):
    """What `--dry-run` says of each model, and nothing else on either output."""
    status, out, err = robench("reproduce", table, "--scale", "smoke", "--dry-run", "--device", "cpu", "--json")
    assert (status, err) == (0, "")
    return {row["model"]: row for row in json.loads(out)}


def left(rows):
    """The models of which something is still asked, and how much."""
    return {name: rest for name, row in rows.items() if (rest := row["questions"] - row["answered"])}


def answers(workspace):
    return set(workspace.glob("reports/[rtc]*/*/*.json"))


def test_a_dry_run_counts_what_the_run_then_answers(workspace, robench, digits_table, monkeypatch):
    """From nothing, after the training, after the evaluation, and where single answers are lost."""
    asked = ("reproduce", digits_table, "--scale", "smoke", "--device", "cpu")
    untrained = forecast(robench, digits_table)
    assert robench("train", "--table", digits_table, "--scale", "smoke", "--device", "cpu")[0] == 0
    rows = forecast(robench, digits_table)
    # An attack, a margin and a look at the images of one of the two for each; and these images, which have a record.
    assert left(rows) == left(untrained) == {"digits-standard-smoke": 4, "digits-pgd-smoke": 3}
    passes = {name: row["evaluation passes at most"] for name, row in rows.items()}
    assert passes == {name: row["evaluation passes at most"] for name, row in untrained.items()}
    assert rows["digits-pgd-smoke"]["training seconds"] == 0 < rows["digits-pgd-smoke"]["evaluation seconds at most"]
    assert robench(*asked)[0] == 0
    made = answers(workspace)
    assert len(made) == sum(left(rows).values())
    gradients = sum(json.loads(path.read_text())["cost"]["backward_passes"] for path in made)
    assert gradients <= sum(passes.values())

    def fail(*_, **__):
        raise AssertionError("nothing is timed where nothing is to be computed")

    with monkeypatch.context() as patched:
        patched.setattr(stopwatch, "seconds_of_a_pass", fail)
        assert left(forecast(robench, digits_table)) == {}
    (images,) = workspace.glob("reports/adversarials/*")
    (moved,) = workspace.glob("reports/transfers/digits-pgd-smoke/*.json")
    (margin,) = workspace.glob("reports/certificates/digits-pgd-smoke/*.json")
    (attacked,) = workspace.glob("reports/records/digits-pgd-smoke/*.json")
    for lost, expected in (
        (margin, {"digits-pgd-smoke": 1}),
        (attacked, {"digits-pgd-smoke": 1}),
        (images, {}),  # everybody has looked at them
        (moved, {"digits-standard-smoke": 1, "digits-pgd-smoke": 1}),
        (moved, {"digits-pgd-smoke": 1}),  # the images are there again
    ):
        lost.unlink()
        before = stamps(workspace)
        assert left(forecast(robench, digits_table)) == expected
        assert robench(*asked)[0] == 0
        assert {path for path, stamp in stamps(workspace).items() if before.get(path) != stamp} == {lost} - {images}
    assert images.exists()


def test_a_dry_run_says_that_a_table_is_answered(workspace, robench, digits_table, monkeypatch):
    table = catalog.plugins("tables")[digits_table]
    rows = TABLE.split("[[rows]]")
    monkeypatch.setitem(
        catalog.plugins("tables"), digits_table, replace(table, facts=tomllib.loads("[[rows]]".join(rows[:-1])))
    )
    asked = ("reproduce", digits_table, "--scale", "smoke", "--device", "cpu")
    assert robench(*asked)[0] == 0
    status, out, err = robench(*asked, "--dry-run")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "in all 0: every model is trained and every question answered already"
    assert "4 of 4" in out
    for path in workspace.glob("reports/outcomes/*.parquet"):
        path.write_bytes(b"damaged")
    _, out, _ = robench(*asked, "--dry-run")
    assert "does not match its record's outcomes_sha256" in out
    assert out.splitlines()[-1] == "how long it takes is not known of any of the models"


def test_a_dry_run_times_a_network_once_and_says_so(workspace, robench, digits_table, monkeypatch):
    timed = []
    monkeypatch.setattr(stopwatch, "seconds_of_a_pass", lambda *arguments, **_: timed.append(arguments) or 1.0)
    asked = ("reproduce", digits_table, "--scale", "smoke", "--device", "cpu", "--dry-run")
    status, out, err = robench(*asked)
    assert status == 0
    assert out.count("to train") == 2
    assert len(timed) == 1
    (line,) = err.splitlines()
    assert re.fullmatch(r"timing \w+ in batches of \d+ for digits-standard-smoke", line)
    # One that is there has the time of the other's training.
    standard = ("train", "digits-standard", "--set", "epochs=1", "--set", "train_examples=50", "--device", "cpu")
    assert robench(*standard, "--out", "digits-pgd-smoke")[0] == 0
    rows = forecast(robench, digits_table)
    assert {row["status"] for row in rows.values()} >= {"trained", "to train"}
    assert len(timed) == 2


def test_a_dry_run_says_what_it_cannot_know(robench):
    status, out, err = robench("reproduce", "heat-5", "--scale", "smoke", "--dry-run", "--data-root", "nowhere")
    assert status == 0, err
    assert "how long it takes is not known of any of the models" in out
    assert "in all" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "atent-99"], "unknown paper table 'atent-99'"),
        (["reproduce", "atent-2", "--scale", "tiny"], "--scale 'tiny' is unknown; write paper, reduced, smoke"),
        (["reproduce", "sgr-1"], "no row that robench computes"),
        (["reproduce", "emr-6"], "holds settings"),
        (["reproduce", "heat-3", "--scale", "smoke"], "has no smoke scale; it has paper"),
        (["reproduce", "atent-2", "--device", "gpu"], "--device 'gpu' is unknown"),
        (["reproduce", "atent-2", "--precision", "fp8"], "--precision 'fp8' is unknown; write fp32, tf32 or bf16"),
        (["reproduce", "atent-2", "--scale", "smoke", "--data-root", "nowhere"], "mnist is not in nowhere"),
        (["train", "--table", "atent-2", "--precision", "fp8", "--dry-run"], "--precision 'fp8' is unknown"),
        (["train", "--table", "atent-2", "--data-root", "nowhere"], "mnist is not in nowhere"),
        (["list", "models", "--workspace", __file__], "test_reproduce.py is a file; name a folder by --workspace or"),
        (["train"], "needs the name of a recipe"),
        (["train", "mnist-pgd", "--table", "atent-2"], "leave a recipe out"),
        (["train", "--table", "atent-2", "--set", "epochs=1"], "leave --set out"),
        (["train", "mnist-pgd", "--scale", "smoke"], "--scale smoke is of a table"),
        (["train", "digits-standard", "--set", "train_examples=99999"], "train_examples = 99999 is more than"),
        (["leaderboard", "--format", "pdf"], "unknown format 'pdf'"),
        (["leaderboard", "atent-22"], "did you mean 'atent-2'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(workspace, robench, arguments, said):
    status, out, err = robench(*arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (workspace / "reports").exists()


def test_papers_pages_are_for_whoever_has_models_of_theirs():
    """A name alone counts, at any scale; a reader's own models and nothing else do not."""
    assert definitions.in_papers(["mine", "trades-mnist-reduced"])
    assert definitions.in_papers(["atent-linf-mnist"])
    assert not definitions.in_papers(["mine", "other", "trades-mnist-huge"])
    assert not definitions.in_papers([])


def test_tables_need_no_torch_to_be_shown(workspace):
    """Neither pages nor LaTeX."""
    program = (
        "import sys; from robench.cli import run; "
        "status = run(['leaderboard', 'atent-2', 'emr-1']); "
        "status = status or run(['leaderboard', *sys.argv[1:], '--format', 'latex']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *catalog.plugins("tables")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 32

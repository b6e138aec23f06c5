"""The whole path as a user walks it."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robench import cli
from robench.registry import read_cards
from robench.store import Store
from tests.flow.conftest import ROOT

EVAL = ("eval", "--model", "tiny", "--attack", "pgd-10", "--threat", "Linf@0.1", "--device", "cpu")


def records_of(workspace):
    return [stored.record for stored in Store(workspace / "reports").records()]


def test_the_versions_are_one_line(robench):
    status, out, _ = robench("--version")
    assert status == 0
    assert re.fullmatch(r"robench \d+\.\d+\.\d+, torch \d\S+, Python 3\.\d+\.\d+\n", out)


def test_train_registers_what_eval_attacks_and_leaderboard_shows(workspace, robench):
    card = read_cards([workspace / "model_zoo"])["tiny"].card
    assert card.scale.startswith("2 of ")
    assert card.clean_accuracy_split == "validation"
    assert card.provenance.command.startswith("robench train digits-standard --set epochs=2")

    status, out, _ = robench(*EVAL, "--examples", "100")
    assert status == 0
    assert "100 of 449" in out
    assert "add --all" in out
    (record,) = records_of(workspace)
    assert (record.status, record.robust.n, str(record.spec.threat)) == ("complete", 100, "Linf@0.1")
    assert record.spec.model.weights_sha256 == card.weights.sha256

    status, out, _ = robench("leaderboard")
    assert status == 0
    table = next(line for line in out.split() if line.endswith(".csv"))
    with open(table, encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert "tiny" in row.values()
    shares = [float(v) for v in row.values() if v.replace(".", "", 1).isdigit()]
    assert any(abs(v - 100 * record.robust.value) < 0.06 or abs(v - record.robust.value) < 6e-4 for v in shares)


def test_the_same_question_costs_nothing_the_second_time(workspace, robench):
    robench(*EVAL, "--examples", "60")
    before = {p: p.stat().st_mtime_ns for p in (workspace / "reports").rglob("*") if p.is_file()}
    started = time.perf_counter()
    status, _out, _ = robench(*EVAL, "--examples", "60")
    assert status == 0
    assert time.perf_counter() - started < 5
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(records_of(workspace)) == 1
    # Another seed is another question.
    robench(*EVAL, "--examples", "60", "--seed", "1")
    assert len(records_of(workspace)) == 2


def test_an_answer_whose_rows_are_gone_or_changed_is_not_known(workspace, robench):
    asked = (*EVAL, "--examples", "50")
    assert robench(*asked)[0] == 0
    (record,) = records_of(workspace)
    store = Store(workspace / "reports")
    path, own = store.outcomes_path(record), store.path_of(record)
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:100]), path.unlink):
        damage()
        status, _, err = robench(*asked)
        assert status == 2
        assert str(path) in err
        assert len(err.strip().splitlines()) == 1
    path.write_bytes(whole)
    said = json.loads(own.read_text())
    said["robust"] = said["clean"]
    own.write_text(json.dumps(said))
    status, _, err = robench(*asked)
    assert (status, "by the rows" in err) == (2, True)


def test_a_plan_says_widths_and_missing_images(workspace, robench):
    _, out, _ = robench(*EVAL, "--examples", "50", "--until", "15%", "--dry-run")
    assert " 15 % " in out
    _, out, _ = robench(*EVAL, "--examples", "50", "--top-k", "5", "--dry-run")
    assert "pgd-10, top 5" in out
    asked = (*EVAL, "--examples", "50", "--save-adversarials")
    assert robench(*asked)[0] == 0
    assert json.loads(robench(*asked, "--dry-run", "--json")[1])[0]["status"] == "known"
    (saved,) = (workspace / "reports" / "adversarials").glob("*.safetensors")
    saved.write_bytes(saved.read_bytes()[:50])
    assert json.loads(robench(*asked, "--dry-run", "--json")[1])[0]["status"] == "new"


def test_dry_run_computes_nothing(workspace, robench):
    status, out, _ = robench(*EVAL, "--all", "--dry-run", "--json")
    assert status == 0
    (row,) = json.loads(out)
    assert (row["status"], row["examples"], row["gradient passes at most"]) == ("new", 449, 4490)
    assert not (workspace / "reports").exists()
    robench(*EVAL, "--all")
    (row,) = json.loads(robench(*EVAL, "--all", "--dry-run", "--json")[1])
    assert (row["status"], row["gradient passes at most"]) == ("known", 0)
    (other,) = json.loads(robench(*EVAL, "--all", "--seed", "5", "--dry-run", "--json")[1])
    assert other["seconds at most"] > 0


def test_adversarials_can_be_kept(workspace, robench):
    status, _, _ = robench(*EVAL, "--examples", "50", "--save-adversarials")
    assert status == 0
    (record,) = records_of(workspace)
    saved = load_file(workspace / "reports" / "adversarials" / f"{record.spec.identity}.safetensors")
    assert saved["adversarial_images"].shape == (50, 1, 8, 8)
    assert float(saved["adversarial_images"].min()) >= 0
    left = {path.suffix for path in (workspace / "reports" / ".work").iterdir()}
    assert left <= {".json"}, "findings of the diagnostics wait for the next question; nothing else is left"


def test_a_users_own_model_and_data(workspace, robench, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 6, 6, 3), dtype=np.uint8)
    images[np.arange(120), :, :, labels] += 150  # the class is the brightest channel
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images[:60], y_test=labels[:60])
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Brightest(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return 10 * images.mean((2, 3))\n"
        "def build():\n"
        "    return Brightest().eval()\n"
    )
    arguments = ("eval", "--model", f"{tmp_path / 'net.py'}:build", "--dataset", f"npz:{tmp_path / 'mine.npz'}")
    status, _out, err = robench(
        *arguments, "--attack", "pgd-10", "--threat", "Linf@0.2", "--threat", "Linf@0.4", "--all"
    )
    assert status == 0, err
    near, far = sorted(records_of(workspace), key=lambda r: r.spec.threat.epsilon)
    assert near.clean.value == 1.0
    # The gap between the channels' means is about 150/255 = 0.59, so 0.2 cannot break and 0.4 (twice that) must.
    assert (near.robust.value, far.robust.value) == (1.0, 0.0)
    assert str(tmp_path) not in near.to_json()


def test_import_brings_a_checkpoint_in(workspace, robench, trained, tmp_path):
    state = load_file(trained / "model_zoo" / "tiny" / "model.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "theirs.pth")
    arguments = ("import", tmp_path / "theirs.pth", "--architecture", "digits_cnn", "--dataset", "digits")
    status, out, err = robench(*arguments, "--name", "theirs")
    assert status == 0, err
    assert "clean accuracy" in out
    card = read_cards([workspace / "model_zoo"])["theirs"].card
    assert card.clean_accuracy_split == "test"
    status, _, err = robench(*arguments, "--name", "theirs")
    assert status == 2
    assert "--replace" in err
    torch.save({k.replace("weight", "wieght"): v for k, v in state.items()}, tmp_path / "wrong.pth")
    status, _, err = robench("import", tmp_path / "wrong.pth", *arguments[2:], "--name", "wrong")
    assert status == 2
    assert "wieght" in err
    assert "weight" in err
    assert not (workspace / "model_zoo" / "wrong").exists()


LISTED = ["models", "recipes", "datasets", "architectures", "attacks", "certificates", "defenses", "suites"]


@pytest.mark.parametrize("kind", LISTED)
def test_everything_listed_can_be_shown(workspace, robench, kind):
    status, out, _ = robench("list", kind, "--json")
    assert status == 0
    names = [entry["name"] for entry in json.loads(out)]
    assert names
    for name in names:
        status, out, _ = robench("show", name, "--json")
        assert status == 0
        assert json.loads(out)


def test_show_says_what_parameters_mean(robench):
    for name, parameter, meaning in [
        ("smoothed-ddn-20", "init_norm", "the norm at the start, on the [0, 1] scale."),
        ("cohen", "n0", "noisy copies that choose the class."),
        ("gaussian_noise", "share", "of the images that get noise, on average; the others stay as they are."),
    ]:
        found = json.loads(robench("show", name, "--json")[1])
        said = {p["name"]: p["description"] for entry in found for p in entry.get("parameters", ())}
        assert said[parameter] == meaning
        (line,) = (text for text in robench("show", name)[1].splitlines() if text.startswith(f"{parameter} "))
        assert line.rstrip().endswith(meaning)
    assert "what it is" not in robench("show", "resnet18")[1]


WRONG = [
    (["eval", "--model", "tniy"], "did you mean 'tiny'"),
    (["eval", "--model", "mnist-pgd-l2"], "robench train mnist-pgd-l2"),
    ([*EVAL, "--attack", "pdg-20"], "did you mean 'pgd-20'"),
    ([*EVAL, "--attack", "pgd-20:step=3"], "did you mean 'steps'"),
    ([*EVAL, "--attack", "pgd-20:steps=three"], "'three'"),
    ([*EVAL, "--attack", "pgd-20:steps"], "key=value"),
    ([*EVAL, "--threat", "Linf@0"], "epsilon must be positive"),
    ([*EVAL, "--threat", "Linf@-1/255"], "epsilon must be positive"),
    ([*EVAL, "--threat", "Linf@eight"], "'eight'"),
    ([*EVAL, "--threat", "Linf@8"], "8/255"),
    ([*EVAL, "--threat", "L7@8/255"], "NORM@EPSILON"),
    ([*EVAL, "--suite", "baselin"], "did you mean 'baseline'"),
    ([*EVAL, "--examples", "450"], "449"),
    ([*EVAL, "--examples", "0"], "0 examples"),
    ([*EVAL, "--examples", "9", "--all"], "exclude each other"),
    ([*EVAL, "--dataset", "mnist", "--data-root", "/nowhere"], "robench data mnist"),
    ([*EVAL, "--dataset", "npz:/nowhere.npz"], "/nowhere.npz"),
    ([*EVAL, "--precision", "fp16"], "fp16"),
    ([*EVAL, "--top-k", "10"], "--top-k 10: of the 10 classes of digits none would be wrong; write 9 at most"),
    ([*EVAL, "--device", "gpu"], "'gpu'"),
    (["eval", "--model", "nowhere.py:build", "--dataset", "digits"], "nowhere.py"),
    (["eval", "--model", "no_such_package:build", "--dataset", "digits"], "no_such_package"),
    (["train", "digits-pdg"], "did you mean 'digits-pgd'"),
    (["train", "digits-pdg.toml"], "No such file or directory; did you mean 'digits-pgd' or"),
    (["train", "no/q.toml"], "No such file or directory; name another file, or a recipe (robench list recipes)"),
    (
        ["train", "digits-pgd", "--dry-run", "--set", "normalization={mean=[0.5,0.4],std=[0.2,0.2]}"],
        "normalization.mean 0.5,0.4 has 2 values, the images have 1 channels",
    ),
    (["train", "digits-pgd", "--set", "normalization={mean=[128],std=[64]}"], "images are in [0, 1] here; divide it"),
    (["train", "digits-pgd", "--set", "epoch=3"], "did you mean 'epochs'"),
    (["train", "digits-pgd", "--set", "epochs=many"], "'many'"),
    (["train", "digits-pgd", "--set", "defense.step=3"], "did you mean 'steps'"),
    (["train", "digits-pgd", "--set", "architecture.name=resnet19"], "resnet18"),
    (["train", "digits-pgd", "--out", "Bad Name"], "'Bad Name'"),
    (["train", "digits-standard", "--out", "tiny"], "--replace"),
    (["train", "digits-pgd", "--resume", "--restart"], "exclude each other"),
    (["train", "digits-pgd", "--resume", "--out", "x"], "model_zoo/.training has no 'x' (there is none)"),
    (["import", "/nowhere.pt", "--architecture", "lenet5", "--dataset", "digits", "--name", "x"], "/nowhere.pt"),
    (["leaderboard", "robustnes"], "did you mean 'robustness'"),
    (["show", "pgd-21"], "did you mean 'pgd-20'"),
    (["show", "ATENT-2"], "did you mean 'atent-2'"),
    (["eval", "--modle", "tiny"], "--modle"),
    (["evaluate"], "evaluate"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), WRONG, ids=lambda v: " ".join(v[-2:]) if isinstance(v, list) else ""
)
def test_wrong_input_gets_one_line_and_leaves_nothing(workspace, robench, arguments, expected):
    before = sorted(workspace.rglob("*"))
    status, _out, err = robench(*arguments)
    assert status == 2
    assert expected in err
    assert err.startswith("robench: ")
    assert len(err.strip().splitlines()) == 1
    assert sorted(workspace.rglob("*")) == before


def test_damaged_weights_are_refused(trained, workspace, robench):
    import shutil

    (workspace / "model_zoo" / "tiny").unlink()
    shutil.copytree(trained / "model_zoo" / "tiny", workspace / "model_zoo" / "tiny")
    path = workspace / "model_zoo" / "tiny" / "model.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-100], data[:-1] + bytes([data[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        status, _, err = robench(*EVAL)
        assert status == 2
        assert "model.safetensors has SHA-256" in err
    assert records_of(workspace) == []


def test_an_unwritable_place_is_said_before_anything_is_computed(workspace, robench):
    (workspace / "reports").write_text("a file in the way")
    status, _, err = robench(*EVAL)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert "reports" in err


def test_interrupted_evaluation_goes_on(workspace, robench, start):
    attack = ("--attack", "pgd-100:restarts=20,stop_when_broken=false")
    arguments = ("eval", "--model", "tiny", "--threat", "Linf@0.1", "--device", "cpu", "--all", *attack)
    process = start(*arguments, "--shard-size", "20", "--batch-size", "20")
    work = workspace / "reports" / ".work"
    deadline = time.monotonic() + 120
    while len(list(work.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    (row,) = json.loads(robench(*arguments, "--dry-run", "--json")[1])
    assert row["status"] in {"begun (40)", "begun (60)"}
    assert records_of(workspace) == []


def test_two_runs_of_one_question_at_once(workspace, start):
    both = [start(*EVAL, "--all") for _ in range(2)]
    results = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], results
    (record,) = records_of(workspace)
    rows = Store(workspace / "reports").outcomes(record)
    assert len(rows["example_id"]) == 449
    assert len(list((workspace / "reports" / "outcomes").iterdir())) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list", "attacks"], ["list", "models"], ["show", "pgd-20"], ["leaderboard"], [*EVAL, "--dry-run"]],
)
def test_the_reading_half_never_imports_torch(workspace, arguments):
    code = (
        "import sys; from robench.cli import run; run(sys.argv[1:]);"
        "heavy = {'torch', 'torchvision', 'pandas', 'scipy', 'statsmodels', 'sklearn'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_a_changed_forward_is_another_question(workspace, robench, tmp_path):
    source = (
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        rows = SIGN * images.flatten(1)\n"
        "        return torch.stack([rows[:, i::10].sum(1) for i in range(10)], 1)\n"
        "def build():\n"
        "    return Net().eval()\n"
    )
    for sign in ("1", "-1"):
        (tmp_path / "net.py").write_text(source.replace("SIGN", sign))
        arguments = ("--model", f"{tmp_path / 'net.py'}:build", "--dataset", "digits", "--attack", "fgsm")
        assert robench("eval", *arguments, "--examples", "40")[0] == 0
    assert len(records_of(workspace)) == 2


COMMAND = [sys.executable, "-m", "robench"]


@pytest.mark.parametrize("arguments", [["list", "models"], ["list", "models", "--json"], []])
def test_a_reader_that_leaves_is_no_failed_check(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [["list", "models"], ["list", "models", "--json"]])
def test_an_output_without_room_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"robench: the output cannot be written: No space left on device; .*\n", done.stderr)


def test_an_interruption_of_the_first_imports_is_one_line(monkeypatch, capsys) -> None:
    from robench.__main__ import main

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", interrupted)
    with pytest.raises(SystemExit) as left:
        main()
    monkeypatch.undo()
    assert left.value.code == 130
    assert capsys.readouterr().err == "robench: interrupted; nothing was begun\n"


def test_without_arguments_it_explains_itself(capsys) -> None:
    assert cli.run([]) == 0
    assert "Robustness benchmarking" in capsys.readouterr().out


def test_presets_are_shown_with_what_they_are_presets_of(capsys) -> None:
    for name, told in (("atent", "atent-linf-mnist-official"), ("pgd-20", "pgd-20 is one of pgd's")):
        assert cli.run(["show", name, "--json"]) == 0
        assert told in json.dumps([entry.get("presets") for entry in json.loads(capsys.readouterr().out)])

"""A training that is killed goes on from its snapshot and ends with the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from robench.training import loop
from tests.unit.training.problems import (
    Watcher,
    log_without_seconds,
    make_workspace,
    run_training,
    small_recipe,
)

ROOT = Path(__file__).parents[2]

#: Runs in a process of its own, which dies at a step in the middle of the second epoch.
KILLED = """
import os, signal, sys
from pathlib import Path
from robench.training import loop
from tests.unit.training.problems import Watcher, make_workspace, run_training, small_recipe

class Killer(Watcher):
    def on_step(self, *, step, **rest):
        if step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

loop.SNAPSHOT_SECONDS, loop.LOOK_EVERY = 0.0, 2
workspace = make_workspace(Path(sys.argv[1]))
run_training(workspace, small_recipe(workspace), "killed", Killer())
"""


def result(workspace, name):
    """Everything that must be equal: weights of the best and the last epoch, the log, the scalars."""
    folder = workspace.model_zoo / name
    files = ["model.safetensors", "last.safetensors", "scalars.jsonl", "golden.json"]
    found = {file: (folder / file).read_bytes() for file in files if (folder / file).exists()}
    return found, log_without_seconds(workspace, name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A workspace with an uninterrupted training in it."""
    workspace = make_workspace(tmp_path_factory.mktemp("straight"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOOK_EVERY", 2)
        run_training(workspace, small_recipe(workspace), "straight")
    return workspace


def test_killed_in_the_middle_of_an_epoch(straight, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(straight.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setattr(loop, "LOOK_EVERY", 2)
    watcher = Watcher()
    run_training(straight, small_recipe(straight), "killed", watcher, resume=True)
    assert watcher.steps[0] == 12, "it went on; it did not begin again"
    assert result(straight, "killed") == result(straight, "straight")


#: Dropout and Adam's two moments; batch norm's statistics and SGD's momentum.
KINDS = {
    "dropout": {"architecture": {"name": "small_cnn"}},
    "batch norm": {
        "architecture": {"name": "resnet20"},
        "optimizer": {"name": "sgd", "lr": 0.05, "nesterov": True, "weight_decay": 1e-3},
        "defense": {"name": "pgd_training", "parameters": {"steps": 1, "attack_mode": "eval"}},
        "selection": {"metric": "clean_accuracy"},
        "averaging": None,
        "batch_size": 16,
        "epochs": 2,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_again_and_again(straight, monkeypatch, kind):
    monkeypatch.setattr(loop, "LOOK_EVERY", 2)
    recipe = small_recipe(straight, **KINDS[kind])
    steps = recipe.epochs * -(-54 // recipe.batch_size)
    whole = Watcher()
    run_training(straight, recipe, f"{kind[:5]}-straight", whole)
    assert whole.steps[-1] == steps
    # A snapshot at every step, then at the ends of epochs alone; stops at the first and the last step, and between.
    for seconds, stops in ((0.0, [1, steps // 2 - 1, steps // 2]), (1e9, [steps - 1, steps])):
        monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", seconds)
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                run_training(straight, recipe, f"{kind[:5]}-stopped", Watcher(stop_after=stop), resume=True)
    run_training(straight, recipe, f"{kind[:5]}-stopped", resume=True)
    assert result(straight, f"{kind[:5]}-stopped") == result(straight, f"{kind[:5]}-straight")

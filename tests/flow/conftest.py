"""A workspace with a model in it, made as a user makes one: by the command line, on the bundled digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robench.cli import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workspace whose registry has `tiny`, a digits network after two epochs."""
    place = tmp_path_factory.mktemp("trained")
    (place / "model_zoo").mkdir()
    arguments = ["train", "digits-standard", "--set", "epochs=2", "--out", "tiny", "--device", "cpu"]
    assert run([*arguments, "--workspace", str(place)]) == 0
    return place


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """A workspace of a test's own, with `tiny` in its registry; the current folder is another one."""
    place = tmp_path / "workspace"
    place.mkdir()
    (place / "model_zoo").mkdir()
    (place / "model_zoo" / "tiny").symlink_to(trained / "model_zoo" / "tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("ROBENCH_WORKSPACE", str(place))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "personal"))
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    return place


@pytest.fixture
def robench(capsys):
    """Run a command in this process; return its status, standard output and standard error."""

    def command(*arguments):
        capsys.readouterr()
        status = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def start():
    """Start a command as a process of its own."""
    processes = []

    def command(*arguments, **options):
        code = "from robench.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            **options,
        )
        processes.append(process)
        return process

    yield command
    for process in processes:
        process.kill()
        process.communicate()

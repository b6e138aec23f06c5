"""Where a number comes from: the commit of this checkout, not of whatever surrounds an installation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import robench
from robench.provenance import code_version, device_name, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "robench"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("a = 1\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_a_clean_checkout_is_its_commit_and_changes_of_the_package_show(package: Path) -> None:
    commit = git(package, "rev-parse", "HEAD")
    assert code_version(package) == commit
    (package.parent / "reports").mkdir()
    (package.parent / "reports" / "new.json").write_text("{}")
    assert code_version(package) == commit
    (package / "plugin.py").write_text("b = 2\n")
    assert code_version(package) == f"{commit}+changes"


def test_an_installed_package_is_its_release_even_inside_a_checkout(package: Path, tmp_path: Path) -> None:
    release = f"release {robench.__version__}"
    assert code_version(tmp_path) == release
    installed = package.parent / "venv" / "robench"
    installed.mkdir(parents=True)
    assert code_version(installed) == release


def test_without_git_it_is_the_release(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version(package) == f"release {robench.__version__}"


def test_no_path_of_the_machine_is_in_it() -> None:
    found = provenance("cpu", "robench eval --model a")
    assert found.command == "robench eval --model a"
    assert found.torch == torch.__version__
    assert found.device == device_name(torch.device("cpu"))
    assert found.device.startswith("cpu (")
    assert str(Path(__file__).parents[2]) not in found.to_json()

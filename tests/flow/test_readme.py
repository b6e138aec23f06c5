"""What README promises a newcomer: one file, found by itself, tested by itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.flow.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"`robench/(\w+/\w+\.py)`:\n\n```python\n(.*?)```", README, flags=re.DOTALL))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with README's five files added and nothing else changed."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("robench", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, text in EXAMPLES.items():
        (copy / "robench" / name).write_text(text, encoding="utf-8")
    return copy


def python(checkout, *arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, capture_output=True, text=True, check=False, env=environment
    )


def test_there_is_one_example_of_each_kind_in_under_twenty_lines():
    assert [name.split("/")[0] for name in EXAMPLES] == [
        "attacks",
        "defenses",
        "architectures",
        "datasets",
        "leaderboards",
    ]
    assert all(len([line for line in text.splitlines() if line]) < 20 for text in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_file_alone_makes_it_known(checkout, name):
    kind, stem = name.removesuffix(".py").split("/")
    code = "import sys; from robench.cli import run; sys.exit(run(sys.argv[1:]))"
    listed = python(checkout, "-c", code, "list", kind, "--json")
    assert stem in [entry["name"] for entry in json.loads(listed.stdout)]
    assert python(checkout, "-c", code, "show", stem).returncode == 0


@pytest.mark.slow
@pytest.mark.data
def test_contract_tests_pick_the_files_up(checkout, data_root):
    chosen = " or ".join(name.removesuffix(".py").split("/")[1] for name in EXAMPLES)
    done = python(
        checkout,
        "-m",
        "pytest",
        "tests/contracts",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        "-rA",
        ROBENCH_DATA=str(data_root),
    )
    lines = done.stdout.splitlines()
    for name in EXAMPLES:
        stem = name.removesuffix(".py").split("/")[1]
        assert any(line.startswith("PASSED") and stem in line for line in lines), (stem, done.stdout[-3000:])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    # Uniform noise is no attack, and the contract says so; everything else holds.
    assert failed
    assert all("noise" in line and "linear" in line for line in failed), failed

"""The repositories of examples/, used as their READMEs say: pull requests turn red, hooks refuse, tests fail."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.flow.conftest import ROOT

EXAMPLES = ROOT / "examples"
INSTALLED = any(point.value == "robench.pytest_plugin" for point in importlib.metadata.entry_points(group="pytest11"))


@pytest.fixture
def user(tmp_path):
    """Run commands as a user does: `robench` and `python` are on the path, and the current folder is the repository."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    for name, text in (
        ("robench", f"#!{sys.executable}\nfrom robench.cli import main\nmain()\n"),
        ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),  # a link would leave the virtual environment
    ):
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_DATA_HOME": str(tmp_path / "personal"),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("ROBENCH_WORKSPACE", "PYTEST_ADDOPTS", "COV_CORE_SOURCE"):
        environment.pop(name, None)

    def run(repository, command, **more):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=repository,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def copied(name, tmp_path):
    return shutil.copytree(EXAMPLES / name, tmp_path / name)


def action_step(name):
    """The shell script of a step of action.yml, and the inputs that its variables are."""
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    (step,) = re.findall(rf"    - name: {name}\n(.*?)(?=\n    - name:|\Z)", text, flags=re.DOTALL)
    variables = dict(re.findall(r"        (\w+): \$\{\{ inputs\.([\w-]+) \}\}", step))
    return textwrap.dedent(step.partition("run: |\n")[2]), variables


def action_inputs():
    text = (ROOT / "action.yml").read_text(encoding="utf-8").partition("\nruns:")[0]
    return {
        name: default.strip('"')
        for name, default in re.findall(
            r"^  ([\w-]+):\n    description: .*\n    default: (.*)$", text, flags=re.MULTILINE
        )
    }


def readme_commands(name, *, block):
    """The commands of a README's code block without those that install or commit."""
    blocks = re.findall(r"```\n(.*?)```", (EXAMPLES / name / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.partition("  #")[0].strip() for line in blocks[block].splitlines()]
    return [line for line in lines if not line.startswith(("pip ", "git "))]


@pytest.mark.slow
def test_a_pull_request_is_green_until_robustness_is_lost(tmp_path, user):
    repository = copied("github", tmp_path)
    for command in readme_commands("github", block=1):
        done = user(repository, command)
        assert done.returncode == 0, (command, done.stderr)
    script, variables = action_step("Check")
    inputs = action_inputs()
    workflow = (repository / ".github" / "workflows" / "robustness.yml").read_text(encoding="utf-8")
    given = dict(re.findall(r"^          ([\w-]+): \"?([^\"\n]*)\"?$", workflow, flags=re.MULTILINE))
    assert given
    assert given.keys() <= inputs.keys()
    environment = {name: given.get(key, inputs[key]) for name, key in variables.items()}
    environment["GITHUB_STEP_SUMMARY"] = str(tmp_path / "summary.md")

    green = user(repository, script, **environment)
    assert green.returncode == 0, green.stdout + green.stderr
    assert "::notice title=robench check::passed" in green.stdout

    retrain, check = readme_commands("github", block=2)
    assert user(repository, retrain).returncode == 0
    red = user(repository, script, **environment)
    assert red.returncode == 1, red.stdout + red.stderr
    assert "::error title=robench%3A pgd-20 of model.py%3Abuild worse::" in red.stdout
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").count("### ") == 2
    assert {path.suffix for path in repository.glob("robench-check.*")} == {".md", ".xml", ".json", ".html"}
    assert user(repository, check).returncode == 1
    assert user(repository, script, **environment | {"MEASURE": "fast"}).returncode == 1

    difference, adopt = readme_commands("github", block=3)
    assert "pgd-20" in user(repository, difference).stdout
    assert user(repository, adopt).returncode == 0
    assert user(repository, script, **environment).returncode == 0


@pytest.mark.slow
def test_the_hook_refuses_a_model_without_answers(tmp_path, user):
    hook = (ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8")
    (identity,) = re.findall(r"^- id: (.*)$", hook, flags=re.MULTILINE)
    (entry,) = re.findall(r"^  entry: (.*)$", hook, flags=re.MULTILINE)
    (files,) = re.findall(r"^  files: (.*)$", hook, flags=re.MULTILINE)
    repository = copied("pre-commit", tmp_path)
    assert f"- id: {identity}\n" in (repository / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.match(files, "reports/baseline.toml")
    train = "robench train digits-standard --set epochs=1 --out mine --device cpu"
    ask = "robench eval --model mine --attack pgd-20 --threat Linf@0.05 --examples 100 --device cpu"
    done = user(repository, f"{train} && {ask} && robench baseline set && {entry}")
    assert done.returncode == 0, done.stdout + done.stderr
    done = user(repository, f"{train} --set seed=5 --replace")
    assert done.returncode == 0, done.stderr
    refused = user(repository, entry)
    assert refused.returncode == 1
    assert "missing: mine" in refused.stdout
    assert user(repository, ask).returncode == 0
    assert "missing" not in user(repository, entry).stdout


@pytest.fixture
def pytest_run(user, tmp_path):
    """Run pytest with robench's plugin as it is once robench is installed."""

    def run(repository, *arguments):
        plugin = [] if INSTALLED else ["-p", "robench.pytest_plugin"]
        words = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *arguments]
        return user(repository, " ".join(words))

    return run


def test_robustness_as_a_test(tmp_path, pytest_run):
    repository = copied("pytest", tmp_path)
    done = pytest_run(repository, "--strict-markers")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    path = repository / "tests" / "test_model.py"
    path.write_text(path.read_text().replace("at_least=0.6", "at_least=0.99"))
    done = pytest_run(repository)
    assert done.returncode == 1
    assert done.stdout.count("under pgd-20 in Linf@0.05 is below 99 %") >= 1
    assert "2 failed" in done.stdout


CASES = """
import numpy as np
import pytest
import torch

class Net(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))

@pytest.fixture
def model():
    torch.default_generator.manual_seed(0)
    return Net(16, 3).eval()

@pytest.fixture
def data(model):
    images = np.random.default_rng(0).random((40, 1, 4, 4), dtype=np.float32)
    return images, model(torch.from_numpy((images * 255).round() / 255)).argmax(1).numpy()

@pytest.mark.robustness(threat="Linf@0.001", attack="fgsm", at_least=0.5)
def test_data_of_a_fixture(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.5", at_least=0.9)
def test_too_weak(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.1", at_least=0.9)
def test_without_a_model():
    pass

@pytest.mark.robustness(threat="Linf@0.1", at_least=0.9, attak="fgsm")
def test_misspelt(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.1", atleast=0.9)
def test_misspelt_and_so_missing(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.1")
def test_missing(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.1", at_least=0.5, data=(np.array([[[[-1.0, 1.0]]]]), np.array([0])))
def test_other_scale(model):
    pass

@pytest.mark.robustness(threat="Linf@8", at_least=0.9)
def test_wrong_threat(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.1", at_least=90)
def test_percent(model, data):
    pass

@pytest.mark.robustness(threat="Linf@0.1", at_least=0.9)
def test_no_data(model):
    pass

@pytest.mark.robustness(threat="Linf@0.1", at_least=0.0)
def test_in_train_mode(model, data):
    model.train()

@pytest.mark.robustness(threat="Linf@0.1", at_least=0.0)
def test_fails_itself(model, data):
    raise ValueError("of its own")
"""


def test_every_mistake_is_told_in_one_line(tmp_path, pytest_run):
    (tmp_path / "test_cases.py").write_text(CASES)
    done = pytest_run(tmp_path, "test_cases.py", "-rA", "--tb=short")
    lines = done.stdout.splitlines()
    assert "1 passed" in lines[-1], done.stdout
    assert "11 failed" in lines[-1]
    assert "During handling" not in done.stdout
    assert any(line.startswith("PASSED") and "test_data_of_a_fixture" in line for line in lines)
    for said in (
        "under pgd-20 in Linf@0.5 is below 90 %",
        "attacks what the fixture `model` returns; write one",
        "has no argument 'attak'; did you mean 'attack'",
        "has no argument 'atleast'; did you mean 'at_least'",
        "missing a required argument: 'at_least'",
        "data: its images go from -1 to 1; float images are in [0, 1], take (x + 1) / 2",
        "threat model 'Linf@8'",
        "at_least=90 is no share",
        "say what to attack: either dataset='mnist', or data=(images, labels)",
        "train mode",
        "ValueError: of its own",
    ):
        assert said in done.stdout, said


def test_the_plugin_costs_other_people_nothing(tmp_path, user):
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_nothing():\n"
        "    heavy = {'torch', 'numpy', 'pydantic', 'typer', 'rich', 'pandas', 'scipy', 'pyarrow'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
        "    assert {n for n in sys.modules if n.startswith('robench')} == {'robench', 'robench.pytest_plugin'}\n"
    )
    done = user(tmp_path, "python -m pytest -q -p no:cacheprovider -p robench.pytest_plugin test_other.py",
                PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # fmt: skip
    assert done.returncode == 0, done.stdout

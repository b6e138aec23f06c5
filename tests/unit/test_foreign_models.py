"""Models from elsewhere: users' factories, torchvision and timm, without a network connection."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn

from robench.checkpoints import load_model, state_sha256
from robench.classifier import Classifier, random_images
from robench.errors import MissingData, UnknownName, UserError
from robench.foreign_models import load_foreign
from robench.workspace import Workspace

FACTORY = """
import sibling
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, sibling.CLASSES)).eval()

def late():
    import later
    return make()

def broken():
    raise RuntimeError("no weights here\\nsecond line")

def text():
    return "a model"

number = 3
"""


def load(reference: str) -> Classifier:
    return load_foreign(reference, input_shape=(1, 4, 4), num_classes=5)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sibling.py").write_text("CLASSES = 5\n")
    (tmp_path / "later.py").write_text("")
    (tmp_path / "nets.py").write_text(FACTORY)
    for name in ("sibling", "later", "nets", "_robench_user_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path / "nets.py"
    for name in ("sibling", "later", "nets", "_robench_user_nets"):
        sys.modules.pop(name, None)


def test_a_factory_in_a_file_is_called_and_finds_its_siblings(file: Path) -> None:
    before = list(sys.path)
    for factory in ("make", "late"):
        assert load(f"{file}:{factory}")(random_images((1, 4, 4), count=2)).shape == (2, 5)
    assert sys.path == before


def test_a_factory_in_a_module_of_the_current_folder_is_called(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load("nets:make")(random_images((1, 4, 4), count=2)).shape == (2, 5)


def test_the_identity_of_a_users_model_is_its_name_its_tensors_and_its_source(file: Path, tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, data_root=tmp_path, user_zoo=tmp_path)
    loaded = load_model(f"{file}:make", place, input_shape=(1, 4, 4), num_classes=5)
    assert loaded.card is None
    assert loaded.identity.id == loaded.identity.architecture.name == "nets.py:make", "no machine's path in records"
    assert loaded.identity.weights_sha256 == state_sha256(loaded.model.network)
    file.write_text(file.read_text() + "\n# changed\n")
    changed = load_model(f"{file}:make", place, input_shape=(1, 4, 4), num_classes=5)
    assert changed.identity.architecture != loaded.identity.architecture


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("broken", r"nets\.py:broken: broken\(\) failed with RuntimeError: no weights here$"),
        ("text", r"text\(\) returned str, not a torch\.nn\.Module"),
        ("maek", r"unknown function in .*nets\.py 'maek'; did you mean 'make'"),
        ("number", "unknown function in .* 'number'"),
    ],
)
def test_a_users_mistake_is_one_line(file: Path, factory: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(f"{file}:{factory}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "absent/nets.py:make",
            "importing it failed with FileNotFoundError: there is no file absent/nets.py",
        ),
        ("absent_package.nets:make", "importing it failed with ModuleNotFoundError"),
        (":make", "is incomplete"),
        ("nets.py:", "is incomplete"),
    ],
)
def test_what_cannot_be_found_is_named(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(reference)


def test_a_file_that_does_not_import_is_named(file: Path) -> None:
    file.write_text("import torch\n1 / 0\n")
    with pytest.raises(UserError, match=r"nets\.py:make: importing it failed with ZeroDivisionError"):
        load(f"{file}:make")


def test_torchvision_models_come_with_weights_and_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    with torch.random.fork_rng():
        state = models.squeezenet1_1().state_dict()
    asked: list[dict[str, Any]] = []

    def from_cache(_: str, **options: Any) -> dict[str, torch.Tensor]:
        asked.append(options)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", from_cache)
    with torch.random.fork_rng():
        model = load("torchvision:squeezenet1_1")
    assert asked[0]["weights_only"] is True
    assert (model.input_shape, model.num_classes) == ((3, 224, 224), 1000)
    assert model.normalization is not None
    assert model.normalization.mean == (0.485, 0.456, 0.406)
    assert not model.training
    assert state_sha256(model.network) == state_sha256(_with(state))


def _with(state: dict[str, torch.Tensor]) -> nn.Module:
    return SimpleNamespace(state_dict=lambda: state)  # type: ignore[return-value]


def test_no_connection_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(MissingData, match=r"torchvision:resnet50 could not be downloaded .*name resolution"):
        load("torchvision:resnet50")


def test_an_unknown_torchvision_model_suggests_near_ones() -> None:
    with pytest.raises(UnknownName, match=r"unknown torchvision model 'resnet5O'; did you mean 'resnet50'"):
        load("torchvision:resnet5O")


def test_absent_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm:resnet18 needs timm; run: pip install 'robench\[timm\]'"):
        load("timm:resnet18")


def test_timm_models_come_with_their_own_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 7))
    network.num_classes = 7  # type: ignore[assignment]
    facts = {"input_size": (3, 4, 4), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    fake = ModuleType("timm")
    fake.is_model = lambda name: name == "tiny"  # type: ignore[attr-defined]
    fake.list_models = lambda pretrained: ["tiny"]  # type: ignore[attr-defined]
    fake.create_model = lambda name, pretrained: network  # type: ignore[attr-defined]
    fake.data = SimpleNamespace(resolve_model_data_config=lambda model: facts)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    model = load("timm:tiny")
    assert (model.input_shape, model.num_classes) == ((3, 4, 4), 7)
    assert model.normalization is not None
    assert model.normalization.std == (0.25, 0.25, 0.25)
    with pytest.raises(UnknownName, match="unknown timm model 'tony'"):
        load("timm:tony")

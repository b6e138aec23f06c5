"""Somebody else's checkpoint is read as data, unwrapped, fitted, measured; no code in it runs."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from robench.checkpoints import build_classifier, load_card_model
from robench.datasets import open_split
from robench.errors import PreflightFailed, UnknownName, UnsafeFile, UserError
from robench.importing import ImportRequest, clean_accuracy, import_weights, read_weights
from robench.records import Configured, ModelCard, Normalization
from robench.registry import find_card
from robench.workspace import Workspace

NORMALIZATION = Normalization(mean=(0.3,), std=(0.6,))
State = dict[str, Tensor]


def network() -> nn.Module:
    with torch.random.fork_rng():
        return build_classifier(Configured(name="digits_cnn"), num_classes=10, input_shape=(1, 8, 8)).network


STATE: State = network().state_dict()


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    (tmp_path / "model_zoo").mkdir()
    return Workspace(root=tmp_path, data_root=tmp_path / "data", user_zoo=tmp_path / "user")


def bring(path: Path, place: Workspace, **changes: Any) -> ModelCard:
    arguments = {"path": path, "architecture": "digits_cnn", "dataset": "digits", "name": "theirs", **changes}
    return import_weights(ImportRequest(**arguments), place, command="robench import theirs.pt")


def saved(content: Any, place: Workspace) -> Path:
    path = place.root / "theirs.pt"
    torch.save(content, path)
    return path


def test_an_imported_model_is_registered_with_its_accuracy_and_loads(place: Workspace) -> None:
    path = place.root / "theirs.safetensors"
    safetensors.torch.save_file(STATE, path)
    card = bring(path, place, normalization=NORMALIZATION)
    folder, found = find_card("theirs", place)
    assert found == card
    assert card.clean_accuracy is not None
    assert card.clean_accuracy.n == len(open_split("digits", "test", place))
    assert card.clean_accuracy_split == "test"
    assert card.clean_accuracy_data == open_split("digits", "test", place).sha256
    assert (card.recipe, card.threat, card.normalization) == (None, None, NORMALIZATION)
    assert "theirs.safetensors" in card.summary
    assert str(place.root) not in card.to_json()
    model = load_card_model(card, folder)
    assert all(torch.equal(v, STATE[k]) for k, v in model.network.state_dict().items())
    assert clean_accuracy(model, open_split("digits", "test", place), device="cpu") == card.clean_accuracy


def prefixed(prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: STATE,
        lambda: {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}},
        lambda: {"model_state_dict": STATE},
        lambda: {"net": prefixed("module."), "acc": 93.1},
        lambda: {"model": {"state_dict": prefixed("_orig_mod.module.")}},
        lambda: {"state_dict_ema": prefixed("model.")},
        lambda: prefixed("1."),
        lambda: {name: tensor.half() for name, tensor in STATE.items()},
    ],
)
def test_common_wrappers_are_taken_off(wrap: Callable[[], Any], place: Workspace) -> None:
    card = bring(saved(wrap(), place), place)
    model = load_card_model(card, place.model_zoo / "theirs")
    for name, tensor in model.network.state_dict().items():
        torch.testing.assert_close(tensor, STATE[name], rtol=1e-3, atol=1e-4)


def own_layer(prefix: str, mean: str, std: str, shape: tuple[int, ...]) -> State:
    layer = {mean: torch.full(shape, 0.3), std: torch.full(shape, 0.6)}
    return {**{f"{prefix}{n}": t for n, t in layer.items()}, **prefixed("model.")}


@pytest.mark.parametrize(
    ("prefix", "mean", "std", "shape"),
    [
        ("normalize.", "mean", "std", (1, 1, 1, 1)),
        ("", "mu", "sigma", (1,)),
        ("0.", "mean", "std", (1, 1, 1)),
    ],
)
def test_the_files_own_normalisation_is_recognised(
    prefix: str, mean: str, std: str, shape: tuple[int, ...], place: Workspace
) -> None:
    path = saved(own_layer(prefix, mean, std, shape), place)
    assert bring(path, place).normalization == NORMALIZATION
    assert bring(path, place, normalization=NORMALIZATION, replace=True).normalization == NORMALIZATION
    other = Normalization(mean=(0.5,), std=(0.5,))
    with pytest.raises(UserError, match="has a normalisation layer of its own"):
        bring(path, place, normalization=other, replace=True)


def test_the_files_own_normalisation_of_other_pixels_is_refused(place: Workspace) -> None:
    state = own_layer("normalize.", "mean", "std", (1,))
    state["normalize.mean"] *= 255
    with pytest.raises(UserError, match=r"^mean 76\.5 is of pixels .*; divide by 255 what .*theirs\.pt has$"):
        bring(saved(state, place), place)


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(legacy: bool, suffix: str, place: Workspace) -> None:
    proof = place.root / "proof"
    path = place.root / f"theirs{suffix}"
    content = {"state_dict": STATE, "extra": Malicious(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeFile, match=r"holds Python objects .* refused") as caught:
        bring(path, place)
    assert "\n" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)
    assert not proof.exists()
    assert not list(place.model_zoo.iterdir())
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file would not have run anything: the test proves nothing"


def test_a_pickled_model_is_refused(place: Workspace) -> None:
    with pytest.raises(UnsafeFile, match=r"Save model\.state_dict\(\) in it instead"):
        bring(saved(network(), place), place)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(share: float, suffix: str, place: Workspace) -> None:
    path = place.root / f"theirs{suffix}"
    if suffix == ".pt":
        torch.save(STATE, path)
    else:
        safetensors.torch.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnsafeFile, match=f"theirs{suffix} is .*cut short") as caught:
        bring(path, place)
    assert "\n" not in str(caught.value)
    assert not list(place.model_zoo.iterdir())


def test_other_files_are_refused(place: Workspace) -> None:
    text = place.root / "notes.pt"
    text.write_text("hello")
    archive = place.root / "archive.pth"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hello")
    for path in (text, archive):
        with pytest.raises(UnsafeFile, match="no PyTorch file"):
            read_weights(path)
    for content in (
        b"",
        b"hello",
        b"notes\nof mine\n",
        b'{"a": 1}',
        b"\x80\x04}\x94\x8c\x01a\x94K\x01s.",
        b"\x89PNG\r\n\x1a\n",
        b"\0" * 64,
    ):
        text.write_bytes(content)
        with pytest.raises(UnsafeFile, match=r"no PyTorch file; give what torch\.save\(model\.state_dict") as caught:
            read_weights(text)
        for quoted in ("weights_only", "Error", "\n"):
            assert quoted not in str(caught.value)
    with pytest.raises(UserError, match=r"there is no file .*absent\.pt"):
        read_weights(place.root / "absent.pt")


@pytest.mark.parametrize("content", [{"epoch": 3, "lr": 0.1}, {}, [1, 2], torch.zeros(3)])
def test_a_file_without_a_state_dict_lists_what_it_has(content: Any, place: Workspace) -> None:
    with pytest.raises(UserError, match=r"holds no state dict; it has: (epoch, lr|nothing|list|Tensor)"):
        bring(saved(content, place), place)


def test_wrong_names_stand_beside_the_nearest_expected_ones(place: Workspace) -> None:
    state = {n.replace("linear1", "fc1"): t for n, t in STATE.items()}
    state["extra.scale"] = torch.zeros(3, 2)
    with pytest.raises(UserError) as caught:
        bring(saved(state, place), place)
    lines = str(caught.value).splitlines()
    assert "2 names are missing, 3 not expected, 0 of another shape" in lines[0]
    assert [line.split() for line in lines[1:]] == [
        ["expected", "found"],
        ["linear1.weight", "32x512", "fc1.weight", "32x512"],
        ["linear1.bias", "32", "fc1.bias", "32"],
        ["-", "extra.scale", "3x2"],
    ]
    assert not list(place.model_zoo.iterdir())


def test_wrong_shapes_are_listed(place: Workspace) -> None:
    state = {**STATE, "linear2.weight": torch.zeros(7, 32), "linear2.bias": torch.zeros(7)}
    with pytest.raises(UserError, match=r"2 of another shape\n") as caught:
        bring(saved(state, place), place)
    assert ["linear2.weight", "10x32", "linear2.weight", "7x32"] in [
        line.split() for line in str(caught.value).splitlines()
    ]


def test_long_lists_are_cut(place: Workspace) -> None:
    with pytest.raises(UserError) as caught:
        bring(saved({f"layer{i}.scale": torch.zeros(i + 1) for i in range(30)}, place), place)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 + 12 + 1
    assert re.fullmatch(r"\s+\.\.\. and \d+ more", lines[-1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "../up"}, UserError, "model name"),
        ({"architecture": "digits_cn"}, UnknownName, "did you mean 'digits_cnn'"),
        ({"dataset": "digit"}, UnknownName, "did you mean 'digits'"),
        ({"parameters": {"depth": 3}}, UserError, "architecture digits_cnn has no parameter depth"),
        (
            {"normalization": Normalization(mean=(0.1,) * 3, std=(0.2,) * 3)},
            UserError,
            "3 values, .* 1 channels",
        ),
        ({"normalization": Normalization(mean=(0.1,), std=(0.0,))}, UserError, "must be positive"),
        (
            {"normalization": Normalization(mean=(125.0,), std=(60.0,))},
            UserError,
            "^mean 125 is of .*; divide it by 255$",
        ),
        (
            {"normalization": Normalization(mean=(0.0,), std=(255.0,))},
            UserError,
            "^std 255 is of .*; divide it by 255$",
        ),
        ({"normalization": Normalization(mean=(math.nan,), std=(0.5,))}, UserError, "^mean nan is not finite"),
        ({"normalization": Normalization(mean=(0.5,), std=(math.inf,))}, UserError, "^std inf is not finite"),
    ],
)
def test_a_wrong_request_is_refused(
    changes: dict[str, Any], error: type[UserError], message: str, place: Workspace
) -> None:
    with pytest.raises(error, match=message):
        bring(saved(STATE, place), place, **changes)
    assert not list(place.model_zoo.iterdir())


def test_a_taken_name_is_refused_before_anything_is_read(place: Workspace) -> None:
    (place.model_zoo / "theirs").mkdir()
    with pytest.raises(UserError, match="model 'theirs' exists"):
        bring(place.root / "absent.pt", place)


def test_weights_that_give_no_numbers_are_refused(place: Workspace) -> None:
    state = {**STATE, "linear2.bias": torch.full((10,), torch.nan)}
    with pytest.raises(PreflightFailed, match="NaN"):
        bring(saved(state, place), place)
    assert not list(place.model_zoo.iterdir())


def test_importing_draws_no_random_numbers(place: Workspace) -> None:
    before = torch.get_rng_state()
    bring(saved(STATE, place), place)
    assert torch.equal(torch.get_rng_state(), before)

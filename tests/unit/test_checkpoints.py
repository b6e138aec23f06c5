"""What is saved is what is loaded; what was changed, cut short or interrupted is never loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robench import checkpoints
from robench.checkpoints import (
    Weights,
    build_classifier,
    load_card_model,
    load_model,
    save_checkpoint,
    state_sha256,
)
from robench.classifier import Classifier, random_images
from robench.errors import StorageError, UnsafeFile, UserError
from robench.provenance import provenance
from robench.records import Configured, ModelCard, Normalization
from robench.registry import cards
from robench.workspace import Workspace

SHAPE = (1, 8, 8)
NORMALIZATION = Normalization(mean=(0.3,), std=(0.6,))
FACTS: dict[str, Any] = {
    "id": "digits-a",
    "summary": "a model",
    "architecture": Configured(name="digits_cnn"),
    "dataset": "digits",
    "data_licence": "CC BY 4.0",
    "threat": None,
    "recipe": {"name": "digits-a"},
    "provenance": provenance("cpu", "robench train digits-a"),
}


def fresh() -> Classifier:
    with torch.random.fork_rng():
        return build_classifier(
            Configured(name="digits_cnn"), num_classes=10, input_shape=SHAPE, normalization=NORMALIZATION
        )


def save(registry: Path, classifier: Classifier | None = None, **changes: Any) -> ModelCard:
    classifier = classifier or fresh()
    arguments = {"facts": FACTS, "selected": Weights(state=classifier.network.state_dict()), **changes}
    return save_checkpoint(classifier, registry, **arguments)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr("robench.workspace.PACKAGE", tmp_path / "package")
    return Workspace(root=tmp_path, data_root=tmp_path / "data", user_zoo=tmp_path / "user")


def test_what_is_saved_is_what_is_loaded(place: Workspace) -> None:
    classifier = fresh().eval()
    last = {name: tensor + 1 for name, tensor in classifier.network.state_dict().items()}
    card = save(
        place.user_zoo,
        classifier,
        selected=Weights(state=classifier.network.state_dict(), epoch=3, validation={"robust_accuracy": 0.5}),
        last=Weights(state=last, epoch=8),
        extra_files={"training.csv": b"epoch,loss\n"},
    )
    folder = place.user_zoo / "digits-a"
    assert {p.name for p in folder.iterdir()} == {
        "card.json",
        "golden.json",
        "model.safetensors",
        "last.safetensors",
        "training.csv",
    }
    assert cards(place) == {"digits-a": (folder, card)}
    assert (card.weights.epoch, card.weights.validation) == (3, {"robust_accuracy": 0.5})
    assert card.last is not None
    assert card.last.epoch == 8
    assert card.parameter_count == sum(p.numel() for p in classifier.parameters())
    loaded = load_model("digits-a", place, input_shape=SHAPE, num_classes=10)
    images = random_images(SHAPE, count=5)
    assert torch.equal(loaded.model(images), classifier(images))
    assert not any(m.training for m in loaded.model.modules())
    assert loaded.identity.weights_sha256 == card.weights.sha256
    assert loaded.card == card


def test_saving_and_loading_leave_mode_and_random_numbers_alone(place: Workspace) -> None:
    classifier = fresh().train()
    before = torch.get_rng_state()
    card = save(place.user_zoo, classifier)
    assert all(m.training for m in classifier.modules())
    load_card_model(card, place.user_zoo / "digits-a")
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_weights_are_saved_and_shared_again(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def tied() -> Classifier:
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
        network[2].weight = network[1].weight
        return Classifier(network, input_shape=SHAPE, num_classes=64)

    monkeypatch.setattr(checkpoints, "build_classifier", lambda *_, **__: tied())
    classifier = tied().eval()
    card = save(place.user_zoo, classifier)
    loaded = load_card_model(card, place.user_zoo / "digits-a")
    images = random_images(SHAPE, count=2)
    assert torch.equal(loaded(images), classifier(images))
    assert loaded.network[1].weight is loaded.network[2].weight


def test_a_taken_name_is_refused_and_replaced_on_request(place: Workspace) -> None:
    first = save(place.user_zoo)
    with pytest.raises(UserError, match=r"model 'digits-a' exists .*--replace"):
        save(place.user_zoo)
    assert cards(place)["digits-a"][1] == first
    second = save(place.user_zoo, replace=True, facts={**FACTS, "summary": "a better model"})
    assert cards(place)["digits-a"][1] == second != first
    assert [p.name for p in place.user_zoo.iterdir()] == ["digits-a"]


@pytest.mark.parametrize("name", ["../up", "A", ""])
def test_a_name_that_is_no_safe_folder_is_refused(name: str, place: Workspace) -> None:
    with pytest.raises(UserError, match="model name"):
        save(place.user_zoo, facts={**FACTS, "id": name})
    assert not place.user_zoo.exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(6))
def test_an_interrupted_save_leaves_the_old_model_and_nothing_else(
    failure: BaseException, at: int, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(place.user_zoo)
    steps = iter(range(100))

    def step(original: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if next(steps) == at:
                raise failure
            return original(*arguments)

        return run

    # Three files and their folder are synchronised, then two renames follow.
    monkeypatch.setattr(os, "fsync", step(os.fsync))
    monkeypatch.setattr(Path, "rename", step(Path.rename))
    with pytest.raises((StorageError, KeyboardInterrupt)):
        save(place.user_zoo, replace=True)
    monkeypatch.undo()
    assert [p.name for p in place.user_zoo.iterdir()] == ["digits-a"]
    assert ModelCard.from_json((place.user_zoo / "digits-a" / "card.json").read_text(), origin="") == old
    load_card_model(old, place.user_zoo / "digits-a")


def test_a_registry_that_cannot_be_written_is_named(place: Workspace) -> None:
    place.user_zoo.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"cannot write to .*digits-a: a file is in the way; .*--workspace$"):
        save(place.user_zoo)


def test_diverged_weights_are_not_saved(place: Workspace) -> None:
    classifier = fresh()
    with torch.no_grad():
        next(classifier.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite logits; it was not saved"):
        save(place.user_zoo, classifier)
    assert not place.user_zoo.exists()


def test_changed_weights_are_refused_with_both_hashes(place: Workspace) -> None:
    card = save(place.user_zoo)
    path = place.user_zoo / "digits-a" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnsafeFile, match=rf"model\.safetensors has SHA-256 .{{12}}.*{card.weights.sha256[:12]}"):
        load_card_model(card, path.parent)


@pytest.mark.parametrize("keep", [0, 7, 100, -5])
def test_truncated_weights_are_refused_even_if_the_hash_agrees(
    keep: int, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    serialized = checkpoints._serialized
    monkeypatch.setattr(checkpoints, "_serialized", lambda state: serialized(state)[:keep])
    card = save(place.user_zoo)
    with pytest.raises(UnsafeFile, match="is no safetensors file"):
        load_card_model(card, place.user_zoo / "digits-a")


def test_weights_of_another_architecture_are_refused(place: Workspace) -> None:
    card = save(place.user_zoo)
    other = card.model_copy(update={"num_classes": 7})
    with pytest.raises(UserError, match=r"does not fit architecture digits_cnn: .*linear2"):
        load_card_model(other, place.user_zoo / "digits-a")


def test_changed_code_shows_in_the_golden_logits(place: Workspace) -> None:
    card = save(place.user_zoo)
    changed = card.model_copy(update={"normalization": Normalization(mean=(0.3,), std=(0.5,))})
    with pytest.raises(UnsafeFile, match="gives other logits than when it was saved"):
        load_card_model(changed, place.user_zoo / "digits-a")


def test_golden_logits_of_another_kind_are_refused(place: Workspace) -> None:
    card = save(place.user_zoo)
    path = place.user_zoo / "digits-a" / "golden.json"
    golden = json.loads(path.read_text())
    path.write_text(json.dumps({**golden, "logits": [row[:3] for row in golden["logits"]]}))
    with pytest.raises(UnsafeFile, match="gives other logits"):
        load_card_model(card, path.parent)


@pytest.mark.parametrize("content", [None, b"", b'{"count": 4, "lo', b'{"count": 4}', b'{"torch": "\xff"}'])
def test_lost_or_damaged_golden_logits_are_refused_with_the_remedy(content: bytes | None, place: Workspace) -> None:
    card = save(place.user_zoo)
    path = place.user_zoo / "digits-a" / "golden.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_card_model(card, path.parent)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.endswith("; restore it from version control, or run: robench train digits-a --replace")
    assert "\n" not in message


def test_absent_weights_name_the_command(place: Workspace) -> None:
    save(place.user_zoo)
    (place.user_zoo / "digits-a" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="run: robench train digits-a"):
        load_model("digits-a", place, input_shape=SHAPE, num_classes=10)


def test_a_model_of_other_data_is_refused(place: Workspace) -> None:
    save(place.user_zoo)
    with pytest.raises(UserError, match=r"maps \(1, 8, 8\) images to 10 classes, the data set has \(3, 32, 32\)"):
        load_model("digits-a", place, input_shape=(3, 32, 32), num_classes=10)
    resized = r"\(3, 224, 224\) images \(what images of a folder become if their sizes differ\) of 10 classes"
    with pytest.raises(UserError, match=resized):
        load_model("digits-a", place, input_shape=(3, 224, 224), num_classes=10)


def test_the_state_hash_knows_names_types_shapes_and_values() -> None:
    def linear(**changes: torch.Tensor) -> nn.Module:
        module = nn.Module()
        tensors = {"a": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.int64), **changes}
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    same = linear(a=torch.ones(3, 2).T)
    hashes = [
        state_sha256(linear()),
        state_sha256(linear(a=torch.ones(3, 2))),
        state_sha256(linear(a=torch.ones(2, 3, dtype=torch.bfloat16))),
        state_sha256(linear(b=torch.ones((), dtype=torch.int64))),
        state_sha256(linear(c=torch.zeros(0))),
    ]
    assert len(set(hashes)) == len(hashes)
    assert state_sha256(same) == hashes[0]

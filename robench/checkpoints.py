"""Checkpoints: what is written into a registry when a model is made, and checked when it is loaded.

A model is a folder `model_zoo/<id>/`: `card.json` (how to build it, where it is from), `model.safetensors`
(the network's own state dict, without the normalisation, which the card has), `golden.json` (logits on a
fixed batch) and whatever its maker adds. Loading compares the hash of the weights, then the logits: the first
finds changed files, the second changed code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robench import catalog
from robench.classifier import (
    LOGIT_TOLERANCE,
    Classifier,
    logit_gap,
    mode,
    random_images,
)
from robench.datasets import RESIZED
from robench.errors import UnsafeFile, UserError
from robench.foreign_models import foreign_architecture, load_foreign
from robench.records import Configured, ModelCard, ModelIdentity, Normalization, Value, WeightsFile
from robench.registry import (
    CARD,
    checked_id,
    find_card,
    how_to_make_again,
    identity_of,
    is_reference,
    weights_path,
)
from robench.store import storage_errors
from robench.workspace import Workspace

WEIGHTS = "model.safetensors"
LAST_WEIGHTS = "last.safetensors"
DEFENSE = "defense.safetensors"
GOLDEN = "golden.json"


class Golden(Value):
    """The logits that a model gave when it was saved, on the CPU in float32."""

    schema_version: Literal[1] = 1
    count: int
    """Of the images: :func:`robench.classifier.random_images` of the card's input shape."""
    logits: tuple[tuple[float, ...], ...]
    torch: str
    """The version that computed them."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A state of the network, as it is written beside a card."""

    state: Mapping[str, Tensor]
    """The network's state dict (`classifier.network.state_dict()`)."""
    epoch: int | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    """What was measured on the validation split at that epoch."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A classifier in eval mode on its device, and what is known of it."""

    model: Classifier
    identity: ModelIdentity
    card: ModelCard | None
    """None for models that are not in a registry."""


def build_classifier(
    architecture: Configured,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    normalization: Normalization | None = None,
) -> Classifier:
    """Return an untrained classifier; the architecture's parameters may be some of them, the others take
    their defaults.

    Initial weights are drawn from torch's global generator. Raises UnknownName, or UserError for a wrong
    parameter.
    """
    plugin = catalog.find("architectures", architecture.name)
    settings = plugin.settings(architecture.parameters)
    network = plugin.load().build(num_classes=num_classes, input_shape=input_shape, **settings)
    return Classifier(network, input_shape=input_shape, num_classes=num_classes, normalization=normalization)


def save_checkpoint(
    classifier: Classifier,
    registry: Path,
    *,
    facts: Mapping[str, Any],
    selected: Weights,
    last: Weights | None = None,
    defense: Weights | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> ModelCard:
    """Write `registry/<id>/` as a whole, or nothing, and return its card.

    Args:
        classifier: a classifier of that architecture; its own weights are replaced by the selected ones.
        registry: the folder of models; made if it is not there.
        facts: the card's fields that a classifier does not know: `id, summary, architecture, dataset,
        data_licence,
            threat, provenance` and the optional ones.
        selected: the weights that loading returns.
        last: those of the last epoch, where they are others.
        defense: what the training objective had learned by itself, where it keeps a state; loading does not need it.
        extra_files: further content of the folder by file name (`training.csv`).
        replace: replace a model of that id.

    Raises UserError for a bad id, one that is taken, or logits that are not finite; StorageError where the
    folder cannot be written.
    """
    folder = registry / checked_id(str(facts["id"]))
    require_free(folder, replace=replace)
    classifier.network.load_state_dict(dict(selected.state))
    files = {**(extra_files or {}), WEIGHTS: _serialized(selected.state)}
    if last is not None:
        files[LAST_WEIGHTS] = _serialized(last.state)
    if defense is not None:
        files[DEFENSE] = _serialized(defense.state)
    card = ModelCard(
        **facts,
        input_shape=classifier.input_shape,
        num_classes=classifier.num_classes,
        parameter_count=sum(p.numel() for p in classifier.parameters()),
        normalization=classifier.normalization,
        weights=_described(WEIGHTS, files[WEIGHTS], selected),
        last=None if last is None else _described(LAST_WEIGHTS, files[LAST_WEIGHTS], last),
        defense_state=None if defense is None else _described(DEFENSE, files[DEFENSE], defense),
    )
    golden = golden_logits(classifier)
    if not torch.tensor(golden.logits).isfinite().all():
        raise UserError(f"model {card.id!r} gives NaN or infinite logits; it was not saved")
    files[GOLDEN] = golden.to_json().encode()
    files[CARD] = card.to_json().encode()
    _write_folder(folder, files, replace=replace)
    return card


def require_free(folder: Path, *, replace: bool) -> None:
    """Raise UserError if a model is there already and is not to be replaced: ask before hours of training."""
    if folder.exists() and not replace:
        raise UserError(f"model {folder.name!r} exists ({folder}); give --replace to replace it, or another name")


def load_model(
    reference: str,
    workspace: Workspace,
    *,
    device: torch.device | str = "cpu",
    input_shape: tuple[int, int, int],
    num_classes: int,
) -> LoadedModel:
    """Return the model that a user names, in eval mode as far as robench decides it.

    Args:
        reference: an id of the registry, `torchvision:NAME`, `timm:NAME`, `FILE.py:FACTORY` or
        `MODULE:FACTORY`. workspace: where models are looked up.
        device: where it is put.
        input_shape: (channels, height, width) of the data set's images.
        num_classes: of the data set.

    Raises UserError and its kinds: unknown names, absent or damaged weights, a model that does not fit the
    data set.
    """
    if is_reference(reference):
        classifier = load_foreign(reference, input_shape=input_shape, num_classes=num_classes)
        architecture = foreign_architecture(reference, behaviour=_behaviour(classifier))
        identity = ModelIdentity(
            id=architecture.name,
            weights_sha256=state_sha256(classifier.network),
            architecture=architecture,
            normalization=classifier.normalization,
        )
        found = LoadedModel(model=classifier.to(device), identity=identity, card=None)
    else:
        folder, card = find_card(reference, workspace)
        classifier = load_card_model(card, folder, device=device)
        found = LoadedModel(model=classifier, identity=identity_of(card), card=card)
    if (classifier.input_shape, classifier.num_classes) != (tuple(input_shape), num_classes):
        resized = " (what images of a folder become if their sizes differ)" if tuple(input_shape) == RESIZED else ""
        raise UserError(
            f"{reference} maps {classifier.input_shape} images to {classifier.num_classes} classes, the "
            f"data set has {tuple(input_shape)} images{resized} of {num_classes} classes; choose the one it was "
            "trained on"
        )
    return found


def _behaviour(classifier: Classifier) -> str:
    """Return a hash of the logits on a fixed batch, to three digits: code that a factory imports is seen by it."""
    try:
        logits = torch.tensor(golden_logits(classifier).logits)
    except Exception:  # noqa: BLE001 - a model that cannot answer is stopped by the preflight, with the reason
        return "none"
    scale = logits.abs().max().clamp_min(1e-6)
    return hashlib.sha256(str((1000 * logits / scale).round().tolist()).encode()).hexdigest()[:16]


def load_card_model(card: ModelCard, folder: Path, *, device: torch.device | str = "cpu") -> Classifier:
    """Return a registered model with its selected weights, in eval mode.

    Raises UserError where the weights are not there or do not fit the architecture, UnsafeFile where their
    hash is another, they are no safetensors, or the logits on the golden batch differ by more than
    `LOGIT_TOLERANCE` of the largest.
    """
    path = weights_path(card, folder)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.weights.sha256:
        raise UnsafeFile(
            f"{path} has SHA-256 {digest[:12]}..., its card says {card.weights.sha256[:12]}...; it is "
            f"damaged or was changed; restore it, or {how_to_make_again(card)}"
        )
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise UnsafeFile(f"{path} is no safetensors file: {error}; {how_to_make_again(card)}") from None
    # Building draws initial weights, which are thrown away; nobody's random numbers may change by that.
    with torch.random.fork_rng(devices=[]):
        classifier = build_classifier(
            card.architecture,
            num_classes=card.num_classes,
            input_shape=card.input_shape,
            normalization=card.normalization,
        )
    try:
        classifier.network.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit architecture {card.architecture.name}: {problem}") from None
    _compare_golden(
        classifier, folder / GOLDEN, remedy=f"restore it from version control, or {how_to_make_again(card)}"
    )
    return classifier.to(device).eval()


def golden_logits(classifier: Classifier, *, count: int = 4) -> Golden:
    """Return the classifier's logits on `count` fixed images, computed in eval mode on the CPU."""
    device = classifier.device
    with mode(classifier.cpu(), training=False), torch.no_grad():
        logits = classifier(random_images(classifier.input_shape, count=count))
    classifier.to(device)
    return Golden(count=count, logits=tuple(map(tuple, logits.tolist())), torch=torch.__version__)


def _compare_golden(classifier: Classifier, path: Path, *, remedy: str) -> None:
    try:
        golden = Golden.from_json(path.read_text(encoding="utf-8"), origin=str(path), remedy=remedy)
    except OSError as error:
        raise UnsafeFile(
            f"{path} cannot be read ({error.strerror}), so that the model cannot be checked; {remedy}"
        ) from None
    except UnicodeDecodeError:
        raise UnsafeFile(f"{path} is damaged: it is no UTF-8 text; {remedy}") from None
    found = torch.tensor(golden_logits(classifier, count=golden.count).logits)
    expected = torch.tensor(golden.logits)
    gap = logit_gap(found, expected) if found.shape == expected.shape else float("inf")
    if gap > LOGIT_TOLERANCE:
        raise UnsafeFile(
            f"{path.parent.name} gives other logits than when it was saved (by {gap:.1e} of the largest; "
            f"with torch {golden.torch} then, {torch.__version__} now): its architecture's code or its card "
            "has changed"
        )


def state_sha256(module: nn.Module) -> str:
    """Return the hash of a module's state: names, types, shapes and bytes of its tensors, by sorted name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _serialized(state: Mapping[str, Tensor]) -> bytes:
    # Clones: safetensors refuses tensors that share memory; shared ones are written twice and loaded back
    # into one.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    return safetensors.torch.save(tensors)


def _described(name: str, data: bytes, weights: Weights) -> WeightsFile:
    digest = hashlib.sha256(data).hexdigest()
    validation = dict(weights.validation)
    return WeightsFile(file=name, sha256=digest, bytes=len(data), epoch=weights.epoch, validation=validation)


def _write_folder(folder: Path, files: Mapping[str, bytes], *, replace: bool) -> None:
    """Write the files beside `folder`, then rename: nobody sees half a model."""
    unique = uuid.uuid4().hex[:8]
    fresh, old = (folder.with_name(f".{folder.name}.{unique}.{state}") for state in ("new", "old"))
    try:
        with storage_errors(folder):
            fresh.mkdir(parents=True)
            for name, data in files.items():
                with (fresh / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(fresh)
            # Somebody may have been faster since the first look.
            require_free(folder, replace=replace)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            _sync(folder.parent)
    finally:
        # Interrupted between the two renames, Ctrl-C included: the old model comes back.
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    # Makes the names durable; Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

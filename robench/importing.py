"""Somebody else's checkpoint becomes a registered model: read as data, fitted to an architecture, measured,
written.

Nothing in a foreign file is run: `.pt` and `.pth` are read with `weights_only=True` in every case. What
people put around a state dict (`{"state_dict": ...}`, `module.`, a normalisation layer) is taken off; what
then does not fit is listed beside what was expected.
"""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robench import catalog
from robench.checkpoints import Weights, build_classifier, require_free, save_checkpoint
from robench.classifier import Classifier, mode, tensor_float32
from robench.datasets import ImageSet, dataset_facts, open_split
from robench.errors import UnsafeFile, UserError
from robench.preflight import preflight
from robench.provenance import provenance
from robench.records import Configured, ModelCard, Normalization, Proportion
from robench.registry import checked_id
from robench.statistics import proportion
from robench.workspace import Workspace

#: Where training scripts keep the weights in what they save, in the order in which they are tried.
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "params",
    "weights",
    "state_dict_ema",
    "ema",
)
#: How normalisation layers name their buffers.
_MEAN_STD = {"mean": "std", "mu": "sigma"}
_EXPECTED = (
    "give what torch.save(model.state_dict(), 'weights.pt') wrote, or safetensors in a file that ends in .safetensors"
)
_ROWS = 12
_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What is to be brought into the registry."""

    path: Path
    architecture: str
    dataset: str
    name: str
    """The model's id."""
    normalization: Normalization | None = None
    """In front of the network; None takes the file's own where it has one, else the network sees [0, 1]."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the architecture, where they are not its defaults."""
    replace: bool = False


def import_weights(
    request: ImportRequest, workspace: Workspace, *, device: torch.device | str = "cpu", command: str
) -> ModelCard:
    """Register the weights in a file, with their clean accuracy on the data set's test split, and return the
    card.

    Raises UnsafeFile for a file that is damaged or would run code, UserError for weights that do not fit
    (expected and found names side by side), PreflightFailed for a model that breaks the classifier contract.
    Nothing is written then.
    """
    require_free(workspace.model_zoo / checked_id(request.name), replace=request.replace)
    facts = dataset_facts(request.dataset, workspace)
    parameters = catalog.find("architectures", request.architecture).settings(request.parameters)
    architecture = Configured(name=request.architecture, parameters=parameters)
    state = unwrapped(read_weights(request.path), origin=request.path)
    normalization, state = _normalization(state, request, channels=facts.image_shape[0])
    with torch.random.fork_rng(devices=[]):
        classifier = build_classifier(
            architecture,
            num_classes=len(facts.classes),
            input_shape=facts.image_shape,
            normalization=normalization,
        )
    expected = classifier.network.state_dict()
    state = without_prefix(state, expected)
    _require_fit(state, expected, origin=f"{request.path} and architecture {request.architecture}")
    classifier.network.load_state_dict(state)
    images = open_split(request.dataset, "test", workspace)
    accuracy = clean_accuracy(classifier.to(device).eval(), images, device=device)
    card_facts = {
        "id": request.name,
        "summary": f"imported from {request.path.name} (SHA-256 {_sha256(request.path)[:12]}...)",
        "architecture": architecture,
        "dataset": facts.name,
        "data_licence": facts.licence,
        "threat": None,
        "clean_accuracy": accuracy,
        "clean_accuracy_split": "test",
        "clean_accuracy_data": images.sha256,
        "provenance": provenance(device, command),
    }
    selected = Weights(state=classifier.network.state_dict())
    return save_checkpoint(
        classifier, workspace.model_zoo, facts=card_facts, selected=selected, replace=request.replace
    )


def read_weights(path: Path) -> Any:
    """Return what a `.safetensors`, `.pt` or `.pth` file holds, on the CPU; no code in it is run.

    Raises UserError where there is no such file, UnsafeFile where it would run code or is damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a .pt, .pth or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UnsafeFile(f"{path} is no safetensors file or is cut short ({error}); {_EXPECTED}") from None
    if not path.stat().st_size:
        raise UnsafeFile(f"{path} is empty: cut short or no PyTorch file; {_EXPECTED}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are none of torch's
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Nothing of the loader's own text is repeated: it advises to switch the protection off.
        if "unsupported global" in str(error).lower() or "weights_unpickler" in str(error).lower():
            raise UnsafeFile(
                f"{path} holds Python objects that loading would run, not only tensors; it was refused. Save "
                "model.state_dict() in it instead of the model"
            ) from error
        raise UnsafeFile(f"{path} is damaged, cut short or no PyTorch file; {_EXPECTED}") from error


def unwrapped(content: Any, *, origin: Path) -> dict[str, Tensor]:
    """Return the state dict in what a training script saved; raise UserError if there is none."""
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if _holds_tensors(content.get(key)):
                return unwrapped(content[key], origin=origin)
        state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if state:
            return state
    entries = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(f"{origin} holds no state dict; it has: {entries or 'nothing'}")


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take off what stands before every name (`module.`, `_orig_mod.`, `1.`) while none is expected."""
    state = dict(state)
    while state and not state.keys() & expected.keys():
        heads = {name.partition(".")[0] for name in state}
        if len(heads) != 1 or any("." not in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def _normalization(
    state: Mapping[str, Tensor], request: ImportRequest, *, channels: int
) -> tuple[Normalization | None, dict[str, Tensor]]:
    """Return the normalisation to use, and the state without the file's own normalisation layer."""
    given = request.normalization
    if given is not None:
        _check_normalization(given, channels, remedy="divide it by 255")
    pairs = []
    for name, tensor in state.items():
        layer, dot, last = name.rpartition(".")
        partner = f"{layer}{dot}{_MEAN_STD.get(last)}"
        if partner in state and tensor.numel() == state[partner].numel() == channels:
            pairs.append((name, partner))
    if len(pairs) != 1:
        return given, dict(state)
    mean, std = (tuple(round(v, 6) for v in state[name].flatten().tolist()) for name in pairs[0])
    own = Normalization(mean=mean, std=std)
    _check_normalization(own, channels, remedy=f"divide by 255 what the normalisation layer in {request.path} has")
    if given is not None and not np.allclose([given.mean, given.std], [mean, std], atol=1e-4):
        raise UserError(
            f"{request.path} has a normalisation layer of its own (mean {mean}, std {std}), other than mean "
            f"{given.mean}, std {given.std}; leave --mean and --std out to use the file's"
        )
    return given or own, {name: tensor for name, tensor in state.items() if name not in pairs[0]}


def _check_normalization(normalization: Normalization, channels: int, *, remedy: str) -> None:
    if problem := normalization.problem(channels=channels, remedy=remedy):
        raise UserError(problem)


def _require_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, origin: str) -> None:
    """Raise UserError with a table of the names that do not fit, expected ones beside the nearest found."""
    # Batch norms count batches for training only, and files of old releases have no counters.
    missing = [n for n in expected if n not in state and not n.endswith(".num_batches_tracked")]
    unexpected = [n for n in state if n not in expected]
    reshaped = [n for n in expected if n in state and state[n].shape != expected[n].shape]
    if not missing and not unexpected and not reshaped:
        return
    pairs: list[tuple[str, str]] = [(n, n) for n in reshaped]
    left = list(unexpected)
    for name in missing:
        near = _nearest(name, expected[name], {n: state[n] for n in left})
        pairs.append((name, near))
        left = [n for n in left if n != near]
    pairs += [("", name) for name in left]
    rows = [("expected", "", "found", "")]
    rows += [(e or "-", _size(expected.get(e)), f or "-", _size(state.get(f))) for e, f in pairs[:_ROWS]]
    more = f"\n  ... and {len(pairs) - _ROWS} more" if len(pairs) > _ROWS else ""
    raise UserError(
        f"{origin} do not fit: {len(missing)} names are missing, {len(unexpected)} not expected, "
        f"{len(reshaped)} of another shape\n{_table(rows)}{more}"
    )


def _nearest(name: str, like: Tensor, candidates: Mapping[str, Tensor]) -> str:
    """Return the candidate of the most similar name, those of the same shape first; "" if there is none."""
    same_shape = [n for n in candidates if candidates[n].shape == like.shape]
    for names in (same_shape, list(candidates)):
        if near := difflib.get_close_matches(name, names, n=1, cutoff=0.3):
            return near[0]
    return ""


def _size(tensor: Tensor | None) -> str:
    return "" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  " + line.rstrip() for line in lines)


def clean_accuracy(classifier: Classifier, images: ImageSet, *, device: torch.device | str) -> Proportion:
    """Return the share of a split that the classifier gets right, after the preflight on its first images."""
    correct = 0
    for start in range(0, len(images), _BATCH):
        positions = np.arange(start, min(start + _BATCH, len(images)))
        batch = torch.from_numpy(images.read(positions)).to(device).float() / 255
        labels = torch.from_numpy(images.labels[positions]).to(device)
        if start == 0:
            preflight(classifier, batch, labels)
        with mode(classifier, training=False), torch.no_grad(), tensor_float32(allowed=False):
            correct += int((classifier(batch).argmax(1) == labels).sum())
    return proportion(correct, len(images))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

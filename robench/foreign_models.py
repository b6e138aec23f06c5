"""Models that are not in a registry: torchvision's, timm's, and users' own factories."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from robench.classifier import Classifier
from robench.errors import MissingData, UnknownName, UserError
from robench.records import Configured, Normalization


def load_foreign(reference: str, *, input_shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Return the classifier that `reference` names, on the CPU.

    `torchvision:NAME` and `timm:NAME` are in eval mode, with their published weights, input shape and
    classes. A user's factory (`FILE.py:FACTORY`, `MODULE:FACTORY`) is called without arguments; its module
    stays as it is, and is taken to fit the shape and classes given. Raises UserError, UnknownName, or
    MissingData for weights that cannot be downloaded.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise UserError(
            f"model {reference!r} is incomplete; write torchvision:NAME, timm:NAME, FILE.py:FACTORY or MODULE:FACTORY"
        )
    if source == "torchvision":
        return _torchvision(name)
    if source == "timm":
        return _timm(name)
    network = _made_by(reference, source, name)
    return Classifier(network, input_shape=input_shape, num_classes=num_classes)


def foreign_architecture(reference: str, *, behaviour: str) -> Configured:
    """Return how records name a model that :func:`load_foreign` returned: without the machine's path.

    For users' factories with the hash of the source file and of what the model answers (`behaviour`): a changed
    `forward`, here or in what the file imports, leaves the weights as they were and is another model all the same.
    """
    source, _, name = reference.rpartition(":")
    if source in {"torchvision", "timm"}:
        return Configured(name=reference)
    module = sys.modules[_module_name(Path(source)) if source.endswith(".py") else source]
    digest = hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest() if module.__file__ else ""
    return Configured(name=f"{Path(source).name}:{name}", parameters={"source_sha256": digest, "behaviour": behaviour})


def _torchvision(name: str) -> Classifier:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownName("torchvision model", name, known)
    weights = models.get_model_weights(name).DEFAULT
    with _downloading(f"torchvision:{name}"):
        # Read as data first: what the builder then finds in the cache is known to hold nothing but tensors.
        weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        network = models.get_model(name, weights=weights, progress=False)
    preset = weights.transforms()
    return Classifier(
        network.eval(),
        input_shape=(3, preset.crop_size[0], preset.crop_size[0]),
        num_classes=len(weights.meta["categories"]),
        normalization=Normalization(mean=tuple(preset.mean), std=tuple(preset.std)),
    )


def _timm(name: str) -> Classifier:
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{name} needs timm; run: pip install 'robench[timm]'") from None
    if not timm.is_model(name):
        raise UnknownName("timm model", name, timm.list_models(pretrained=True))
    with _downloading(f"timm:{name}"):
        network = timm.create_model(name, pretrained=True)
    facts = timm.data.resolve_model_data_config(network)
    return Classifier(
        network.eval(),
        input_shape=tuple(facts["input_size"]),
        num_classes=network.num_classes,
        normalization=Normalization(mean=tuple(facts["mean"]), std=tuple(facts["std"])),
    )


@contextmanager
def _downloading(reference: str) -> Iterator[None]:
    try:
        yield
    # URLError, timeouts and the Hub's connection errors are OSErrors; a wrong hash or a missing file is a
    # RuntimeError.
    except (OSError, RuntimeError) as error:
        raise MissingData(
            f"the weights of {reference} could not be downloaded ({_line(error)}); try again with a "
            f"connection, or copy them from another machine's {torch.hub.get_dir()}"
        ) from error


def _made_by(reference: str, source: str, name: str) -> nn.Module:
    with _users_code(reference, "importing it"), _sibling_imports(Path(source)):
        module = _file_module(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        defined = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UnknownName(f"function in {source}", name, defined)
    with _users_code(reference, f"{name}()"), _sibling_imports(Path(source)):
        network = factory()
    if not isinstance(network, nn.Module):
        raise UserError(f"{reference}: {name}() returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # Registered, because dataclasses look a module up by its name.
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _module_name(path: Path) -> str:
    """Return a name apart from anything installed, another for each file."""
    return f"_robench_user_{path.stem}_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"


@contextmanager
def _sibling_imports(path: Path) -> Iterator[None]:
    """Let a user's file import what lies beside it, and `package.module` be found in the current folder."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # The user's code may have changed the list, too.
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _users_code(reference: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"{reference}: {what} failed with {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or "no message"

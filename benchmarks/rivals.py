"""The other libraries with robench's parameters: by their backends, and torchattacks, which is none.

Each attacks the plain model, all images in one batch, with the weights as a user has them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robench import backends, planning
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: The others, in the order of their columns.
LIBRARIES = (*backends.names()[1:], "torchattacks")


#: What a library does otherwise than it is asked, by library and the attack's entry.
_OTHERWISE = {
    (
        "torchattacks",
        "cw-l2",
    ): "does not search for the constant: all rounds' steps are one run with its own, 1",
}


@dataclass(frozen=True)
class Target:
    """What is attacked, on its device."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat: ThreatModel


class NotOffered(Exception):
    """A library lacks the attack, or is not installed; the text says which."""


def rival(library: str, attack: str, target: Target) -> tuple[str, Callable[[], Tensor]]:
    """Return a library's version and its attack, ready to be called; `attack` is written as for `robench eval`.

    Raises NotOffered.
    """
    if library == "torchattacks":
        return _torchattacks(attack, target)
    try:
        identity = planning.identify_attack(attack, target.threat, backend=library)
    except UserError as error:
        raise NotOffered(str(error)) from None
    search = backends.attack_of(identity, target.threat.norm)
    random = RandomStream(0, torch.arange(len(target.images), device=target.images.device))

    def call() -> Tensor:
        found: Tensor = search(
            target.model, target.images, target.labels, threat=target.threat, random=random, **identity.parameters
        )
        return found

    return identity.backend.partition(" ")[2], call


def otherwise(library: str, attack: str) -> str | None:
    """Return what a library does otherwise than `attack` asks, where that is not for its backend's record to say."""
    return _OTHERWISE.get((library, planning.attack_settings(attack)[0].entry))


def _torchattacks(attack: str, target: Target) -> tuple[str, Callable[[], Tensor]]:
    plugin, parameters = planning.attack_settings(attack)
    make = _TORCHATTACKS.get((plugin.entry, target.threat.norm))
    if make is None:
        raise NotOffered(f"torchattacks has no {plugin.entry} for {target.threat.norm}")
    try:
        version, library = importlib.metadata.version("torchattacks"), importlib.import_module("torchattacks")
    except ImportError as error:
        raise NotOffered(f"torchattacks is not installed, or something it imports: {error}") from None
    ready = make(library, target, parameters)
    return version, lambda: ready(target.images, target.labels)


Maker = Callable[[Any, Target, Mapping[str, Any]], Callable[[Tensor, Tensor], Tensor]]


def _pgd(kind: str) -> Maker:
    def make(library: Any, target: Target, given: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
        radius, steps = target.threat.radius, given["steps"]
        attack: Callable[[Tensor, Tensor], Tensor] = getattr(library, kind)(
            target.model,
            eps=radius,
            alpha=2.5 * radius / steps if given["step_size"] is None else given["step_size"],
            steps=steps,
            random_start=given["start"] == "random",
        )
        return attack

    return make


def _apgd(library: Any, target: Target, given: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    common = {"norm": target.threat.norm, "eps": target.threat.radius, "steps": given["steps"]}
    common["n_restarts"] = given["restarts"]
    if given["targets"]:
        attack: Callable[[Tensor, Tensor], Tensor] = library.APGDT(
            target.model, **common, n_classes=given["targets"] + 1
        )
        return attack
    attack = library.APGD(target.model, **common, loss=given["loss"])
    return attack


def _deepfool(library: Any, target: Target, given: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    attack: Callable[[Tensor, Tensor], Tensor] = library.DeepFool(
        target.model, steps=given["steps"], overshoot=given["overshoot"]
    )
    return attack


def _cw(library: Any, target: Target, given: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    # As many steps as the others' rounds have together. The first constant of a search says nothing to a library that
    # does not search, so it keeps its own.
    chosen = {} if given["step_size"] is None else {"lr": given["step_size"]}
    attack: Callable[[Tensor, Tensor], Tensor] = library.CW(
        target.model, kappa=given["confidence"], steps=given["rounds"] * given["steps"], **chosen
    )
    return attack


_TORCHATTACKS: dict[tuple[str, str], Maker] = {
    ("pgd", "Linf"): _pgd("PGD"),
    ("pgd", "L2"): _pgd("PGDL2"),
    ("apgd", "Linf"): _apgd,
    ("apgd", "L2"): _apgd,
    ("deepfool", "L2"): _deepfool,
    ("cw-l2", "L2"): _cw,
}

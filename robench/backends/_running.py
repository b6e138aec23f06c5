"""What all backends share: seeded generators that are put back, restarts, the rounding at the ball's edge."""

from __future__ import annotations

import random as python_random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robench.errors import UserError
from robench.losses import TOP_1
from robench.lp_geometry import distance, per_example, project
from robench.random_streams import RandomStream
from robench.target import Target, narrowed, remark
from robench.threat_model import ThreatModel

#: A library that projects in another order of operations may end so far outside, relative to epsilon.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Question:
    """What a library is asked."""

    attack: str
    """Name of the attack's entry."""
    parameters: Mapping[str, Any]
    """Robench's, all of them."""
    threat: ThreatModel
    seed: int
    """Of a library that takes one; the global generators are seeded with it already."""


Search = Callable[[nn.Module, Tensor, Tensor, Question], Tensor]


@dataclass(frozen=True)
class Adapted:
    """A library's attack, called as robench's own are."""

    search: Search
    library: str
    attack: str
    """Name of the attack's entry."""
    minimum_norm: bool
    notes: Sequence[str]
    """What the record has to say."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        threat: ThreatModel,
        random: RandomStream,
        **parameters: Any,
    ) -> Tensor:
        """Return the library's answer `(N, C, H, W)` as it is, but for rounding at the edges of box and ball.

        Args:
            model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
            images: `(N, C, H, W)` in [0, 1].
            labels: `(N,)` int64.
            threat: norm and radius.
            random: the examples' random numbers; all of them together seed the library.
            parameters: robench's, all of them.
        """
        if len(images) == 0:
            return images.clone()
        for note in self.notes:
            remark(model, note)
        seed = int(random.at(self.library).words(1).sum()) % 2**31
        question = Question(self.attack, parameters, threat, seed)
        with global_generators(seed, images.device), warnings.catch_warnings(), _on_device(images.device):
            warnings.simplefilter("ignore")  # of the libraries, about themselves
            found = self.search(model, images, labels, question).detach().to(images.dtype)
        if found.shape != images.shape:
            return found
        return in_box(found) if self.minimum_norm else in_ball(in_box(found), images, threat)


def in_box(found: Tensor) -> Tensor:
    """Return `found` with rounding errors at the edges of the box put right; what is further out stays there."""
    outside = torch.maximum(-found, found - 1).flatten(1).amax(1)
    return torch.where(per_example(outside < _ROUNDING, found), found.clamp(0.0, 1.0), found)


def in_ball(found: Tensor, images: Tensor, threat: ThreatModel) -> Tensor:
    """Return `found` with rounding errors at the edge of the ball put right; what is further out stays there, and the
    engine's verdict is about the library's own answer.
    """
    length = distance(found.double() - images.double(), threat.norm)
    edge = (length > threat.radius) & (length <= threat.radius * (1 + _ROUNDING))
    return torch.where(per_example(edge, found), project(found, images, threat), found)


def restarted(
    once: Callable[[nn.Module, Tensor, Tensor, bool], Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    parameters: Mapping[str, Any],
) -> Tensor:
    """Run a library's attack `restarts` times, each time on the examples that still stand.

    `once(model, images, labels, at_random)` is one run; only a first run from the images themselves is not random.
    """
    found = images.clone()
    rows = torch.arange(len(images), device=images.device)
    for restart in range(parameters["restarts"]):
        at_random = parameters["start"] == "random" or restart > 0
        target = narrowed(model, rows)
        found[rows] = once(target, images[rows], labels[rows], at_random)
        if restart + 1 < parameters["restarts"]:
            with torch.no_grad():
                rows = rows[~TOP_1.broken(target(found[rows]), labels[rows])]
            if len(rows) == 0:
                break
    return found


def number_of_classes(model: nn.Module, images: Tensor) -> int:
    """Return K; the pass of one image that tells it is nobody's search, and not charged."""
    with torch.no_grad():
        logits: Tensor = (model.model if isinstance(model, Target) else model)(images[:1])
    return logits.shape[1]


def require_classes(least: int, classes: int, what: str) -> None:
    """Raise UserError where `what` has no form for so few classes."""
    if classes < least:
        raise UserError(f"{what} needs {least} classes, the model has {classes}; use backend native")


@contextmanager
def global_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators inside the block, and put them back after it."""
    python, array = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed)
        python_random.seed(seed)
        try:
            yield
        finally:
            python_random.setstate(python)
            np.random.set_state(array)


@contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Make `device` the current one: some libraries put what they make there."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield

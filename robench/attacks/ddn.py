"""Decoupled direction and norm (Rony et al., arXiv:1811.09600): minimum-norm L2 in few steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._line_search import nearest_on_segment
from robench.catalog import AttackEntry, NonNegativeInt, PositiveFloat, PositiveInt, Probability
from robench.errors import UserError
from robench.losses import TOP_1, Criterion, PerExampleLoss, loss_named
from robench.lp_geometry import distance, per_example, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel


def ddn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 100,
    gamma: Probability = 0.05,
    start_norm: PositiveFloat = 1.0,
    loss: Literal["ce", "margin", "dlr"] = "ce",
    levels: PositiveInt | None = None,
    final_search: NonNegativeInt = 3,
) -> Tensor:
    """Walk along the boundary: gradients turn the offset, and its norm shrinks where it breaks and grows where not.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: its norm is L2; its epsilon is not looked at.
        random: a direction for each example, taken where its gradient vanishes.
        criterion: what counts as broken.
        steps: gradient steps.
        gamma: by how much of itself the norm changes at each step.
        start_norm: the norm before the first change, on the [0, 1] scale of pixels.
        loss: `ce` cross-entropy as in the paper, `margin` Carlini and Wagner's, `dlr` the difference of logits ratio.
        levels: round all iterates to so many values per pixel (256: what an 8-bit image can hold); None: do not.
        final_search: points tried after the walk between what was found and the image; not with `levels`, which these
            points would not hold. The paper has none.

    Returns:
        `(N, C, H, W)` in [0, 1]: the nearest broken point; the image itself where none was found, or where it is
        broken already.
    """
    del threat
    result = images.detach().clone()
    with torch.no_grad():
        rows = (~criterion.broken(model(result), labels)).nonzero().squeeze(1)
    images, labels, random, model = result[rows], labels[rows], random[rows], narrowed(model, rows)
    pace = Pace(steps=steps, gamma=gamma, start_norm=start_norm, levels=levels)
    found = walk(
        model, images, labels, pace=pace, random=random, criterion=criterion, loss=loss_named(loss, criterion, model)
    )
    if levels is None:
        some = (found != images).flatten(1).any(1).nonzero().squeeze(1)
        found[some] = nearest_on_segment(
            narrowed(model, some),
            images[some],
            found[some],
            labels[some],
            criterion=criterion,
            evaluations=final_search,
        )
    result[rows] = found
    return result


@dataclass(frozen=True)
class Pace:
    """How the walk proceeds; the fields are :func:`ddn`'s."""

    steps: int
    gamma: float
    start_norm: float
    levels: int | None = None

    def step_sizes(self) -> Iterator[float]:
        """Yield the length of each step: from 1 down to 0.01 along half a cosine (section 4 of the paper)."""
        for step in range(self.steps):
            yield 0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2


def walk(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    pace: Pace,
    random: RandomStream,
    criterion: Criterion,
    loss: PerExampleLoss,
) -> Tensor:
    """Return the nearest broken iterate of algorithm 1 `(N, C, H, W)`, the image itself where no iterate is broken.

    `model` is asked for logits once per step, with gradients, and once at the end; what it averages over is its own
    affair. No example leaves the batch.
    """
    nearest = Nearest(images, images, torch.full(labels.shape, torch.inf, dtype=images.dtype, device=images.device))
    norm = torch.full_like(nearest.distance, pace.start_norm)
    farthest = distance(torch.maximum(images, 1 - images), "L2")
    # A gradient of zero has no direction (line 5 divides by its norm).
    instead = random.at("direction").normal(images)
    current = images
    for step_size in pace.step_sizes():
        current = current.detach().requires_grad_()
        logits = model(current)
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), current)
        current, broken = current.detach(), criterion.broken(logits.detach(), labels)
        nearest.keep(current, broken)
        gradient = torch.where(per_example(gradient.flatten(1).any(1), images), gradient, instead)
        offset = current - images + step_size * steepest(gradient, "L2")
        norm = torch.minimum(norm * torch.where(broken, 1 - pace.gamma, 1 + pace.gamma), farthest)
        length = distance(offset, "L2").clamp_min(torch.finfo(offset.dtype).tiny)
        current = rounded((images + offset * per_example(norm / length, images)).clamp(0.0, 1.0), pace.levels)
    with torch.no_grad():
        broken = criterion.broken(model(current), labels)
    nearest.keep(current, broken)
    return nearest.points


@dataclass
class Nearest:
    """The nearest broken points so far."""

    images: Tensor
    points: Tensor
    """(N, C, H, W): the images themselves where nothing is broken yet."""
    distance: Tensor
    """(N,) in L2, infinite where nothing is broken yet."""

    def keep(self, candidates: Tensor, broken: Tensor) -> None:
        """Take the candidates that are broken and nearer than all before."""
        length = distance(candidates - self.images, "L2")
        nearer = broken & (length < self.distance)
        self.points = torch.where(per_example(nearer, candidates), candidates, self.points)
        self.distance = torch.where(nearer, length, self.distance)


def rounded(images: Tensor, levels: int | None) -> Tensor:
    """Return the images with pixels at the nearest of `levels` equally spaced values in [0, 1]; None: as they are.

    Raises UserError below 2 levels.
    """
    if levels is None:
        return images
    if levels < 2:
        raise UserError(f"levels = {levels}: pixels need at least 2 values, such as 256")
    return (images * (levels - 1)).round() / (levels - 1)


ENTRY = AttackEntry(
    name="ddn",
    attack=ddn,
    summary="the nearest adversarial image in L2, by turning an offset and adjusting its norm",
    source="Rony et al., arXiv:1811.09600, algorithm 1 and section 4",
    version=2,
    norms=("L2",),
    minimum_norm=True,
    passes="steps",
    queries="4 + final_search",
    presets={
        "ddn-20": {"steps": 20, "levels": 256},
        "ddn-100": {"steps": 100},
    },
)

"""Projected gradient descent (Madry et al., arXiv:1706.06083), in L-infinity and L2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks import _compaction
from robench.catalog import AttackEntry, PositiveFloat, PositiveInt
from robench.losses import TOP_1, Criterion, PerExampleLoss, loss_named
from robench.lp_geometry import Balls, per_example, project, random_start, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 40,
    step_size: PositiveFloat | None = None,
    restarts: PositiveInt = 1,
    start: Literal["random", "image"] = "random",
    loss: Literal["ce", "margin", "dlr"] = "ce",
    stop_when_broken: bool = True,
) -> Tensor:
    """Ascend the loss by `steps` projected steepest steps; section 2.1 and 5 of the paper.

    Every iterate counts, not only the last: an example that is misclassified at any step is returned as it was there
    and costs nothing from then on. So with the same step size more steps, and more restarts, never help the defender.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: the examples' random numbers (start points).
        criterion: what counts as broken.
        steps: gradient steps per restart.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps, which can
            reach the ball's boundary from any start (section 5 of the paper).
        restarts: independent runs; an example is broken if any of them breaks it.
        start: a uniformly random point of the ball, or the image itself (then further restarts would repeat the first,
            so they start at random points).
        loss: `ce` cross-entropy, `margin` Carlini and Wagner's, `dlr` the difference of logits ratio.
        stop_when_broken: False walks all steps whatever the prediction and returns the last iterate, of several
            restarts the one with the largest loss: the inner maximisation of adversarial training.

    Returns:
        `(N, C, H, W)` in the ball and the box.
    """
    length = 2.5 * threat.radius / steps if step_size is None else step_size
    best = images.detach().clone()
    best_loss = torch.full(labels.shape, -torch.inf, dtype=images.dtype, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    ascent = Ascent(threat, steps, length, loss_named(loss, criterion, model), criterion)
    for restart in range(restarts):
        x, y, target = images[rows], labels[rows], narrowed(model, rows)
        at_random = start == "random" or restart > 0
        begin = random_start(x, threat, random[rows].at("restart", restart)) if at_random else x
        if stop_when_broken:
            last, standing = ascend_until_broken(target, begin, x, y, ascent=ascent)
        else:
            last, standing = ascend(target, begin, x, y, ascent=ascent), torch.ones_like(y, dtype=torch.bool)
        if restart == restarts - 1 and (stop_when_broken or restarts == 1):
            best[rows] = last
            break
        with torch.no_grad():
            logits = target(last)
        value = ascent.loss(logits, y).to(best_loss.dtype)
        if stop_when_broken:
            standing &= ~criterion.broken(logits, y)
            best[rows] = last
            rows = rows[standing]
        else:
            better = rows[value > best_loss[rows]]
            best[better] = last[value > best_loss[rows]]
            best_loss[better] = value[value > best_loss[rows]]
        if len(rows) == 0:
            break
    return best


@dataclass(frozen=True)
class Ascent:
    """How to climb."""

    threat: ThreatModel | Balls
    steps: int
    length: float | Tensor
    """Of a step, in the threat's norm; a tensor is `(N, 1, ...)`."""
    loss: PerExampleLoss
    criterion: Criterion = TOP_1
    """What counts as broken, where that ends an ascent."""

    def step(self, gradient: Tensor, current: Tensor, images: Tensor) -> Tensor:
        """Return the next iterate."""
        moved = current.detach() + self.length * steepest(gradient, self.threat.norm)
        return project(moved, images, self.threat)


def ascend(model: nn.Module, begin: Tensor, images: Tensor, labels: Tensor, *, ascent: Ascent) -> Tensor:
    """Take all steps from `begin` whatever is predicted there; return the last iterates `(N, C, H, W)`.

    The inner maximisation of adversarial training, on any loss: `images` are the ball's centres.
    """
    current = begin
    for _ in range(ascent.steps):
        current = current.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ascent.loss(model(current), labels).sum(), current)
        current = ascent.step(gradient, current, images)
    return current


def ascend_until_broken(
    model: nn.Module, begin: Tensor, images: Tensor, labels: Tensor, *, ascent: Ascent
) -> tuple[Tensor, Tensor]:
    """Take steps with the examples that still stand; return the first broken iterates, else the last, and who stood.

    The last iterates themselves are not looked at: that is one forward pass that the caller makes anyway.
    """
    result = begin.clone()
    standing = torch.ones(len(images), dtype=torch.bool, device=images.device)
    interval = _compaction.steps_between_looks(images.device)
    rows = torch.arange(len(images), device=images.device)
    # Of the examples in the batch: the last iterate, or the one at which an example first fell; and who has not fallen.
    current = reached = begin
    still = standing
    for step in range(ascent.steps):
        current = current.detach().requires_grad_()
        logits = model(current)
        all_stood = step == 0 or (step - 1) % interval == 0
        reached = current.detach() if all_stood else _where(still, current.detach(), reached)
        still = still & ~ascent.criterion.broken(logits.detach(), labels)
        looks = step % interval == 0
        if looks:
            keep = still.nonzero().squeeze(1)
            if len(keep) == 0:
                break
        (gradient,) = torch.autograd.grad(ascent.loss(logits, labels).sum(), current)
        current = ascent.step(gradient, current, images)
        if looks and len(keep) < len(rows):
            gone = (~still).nonzero().squeeze(1)
            result[rows[gone]], standing[rows[gone]] = reached[gone], False
            current, images, labels, still = current[keep], images[keep], labels[keep], still[keep]
            reached, rows, model = current, rows[keep], narrowed(model, keep)
    result[rows], standing[rows] = _where(still, current.detach(), reached), still
    return result, standing


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """Return the images `(N, C, H, W)` of the examples that are chosen `(N,)`, and the others' of the rest."""
    return torch.where(per_example(chosen, images), images, others)


ENTRY = AttackEntry(
    name="pgd",
    attack=pgd,
    summary="projected gradient steps from a random point of the ball",
    source="Madry et al., arXiv:1706.06083, sections 2.1 and 5",
    version=2,
    norms=("Linf", "L2"),
    presets={
        "pgd-10": {"steps": 10},
        "pgd-20": {"steps": 20},
        "pgd-40": {"steps": 40},
        "pgd-100": {"steps": 100},
        # What papers print as "CW" in L-infinity: PGD on Carlini and Wagner's loss, not their attack.
        "cw-pgd-20": {"steps": 20, "loss": "margin"},
        "cw-pgd-40": {"steps": 40, "loss": "margin"},
        "cw-pgd-100": {"steps": 100, "loss": "margin"},
    },
)

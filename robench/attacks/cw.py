"""Carlini and Wagner's attack in L2 (arXiv:1608.04644, section VI-A): distance and loss in one objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._line_search import nearest_on_segment
from robench.attacks.ddn import Nearest
from robench.catalog import AttackEntry, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance, per_example
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

#: By how much the constant grows while nothing is found; section VI-A doubles it, the authors' code takes 10.
_GROWTH = 10.0
#: Every other round takes steps of a third of the pixels' range: networks that were trained against large balls are
#: flat around the image, and shorter first steps stay there. The rounds between take so many times the root mean square
#: of a pixel's change if the model were linear. Annealing ends at a share of the step.
_LONG_STEP, _STEPS_PER_CHANGE, _FINAL_SHARE = 1 / 3, 5.0, 0.003
#: Adam's averages of the gradient and of its square (Kingma and Ba, arXiv:1412.6980, algorithm 1).
_ADAM = 0.9, 0.999
#: tanh of finite numbers is never 0 or 1: the image is moved so little towards grey before it is transformed.
_INSIDE = 1 - 1e-6


def cw_l2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    rounds: PositiveInt = 4,
    steps: PositiveInt = 100,
    step_size: PositiveFloat | None = None,
    constant: PositiveFloat | None = None,
    confidence: NonNegativeFloat = 0.0,
    variable: Literal["box", "tanh"] = "box",
    final_search: NonNegativeInt = 3,
) -> Tensor:
    """Minimise ``|x' - x|^2 + c max(f(x'), 0)`` by Adam, and search for the constant c, for each example its own.

    f is the label's logit minus the largest other one (f_6 of the paper). The constant starts where a linear model
    would just be crossed, so that it does not depend on the scale of the logits. Each round starts at the image; the
    nearest broken iterate of all rounds is kept.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: its norm is L2; its epsilon is not looked at.
        random: unused, the method is deterministic.
        criterion: what counts as broken.
        rounds: constants that are tried ("binary search steps").
        steps: gradient steps for each of them.
        step_size: Adam's, annealed along half a cosine; None: in turn a third of the pixels' range, and by the linear
            model. On the [0, 1] scale of pixels, with `tanh` on that of its argument.
        constant: c of the first round; None: from the linear model.
        confidence: by how much the other logit is to exceed the label's (kappa).
        variable: `box` clamps pixels to [0, 1] after each step, `tanh` is the paper's change of variable.
        final_search: points tried at the end between what was found and the image. The paper has none.

    Returns:
        `(N, C, H, W)` in [0, 1]: the nearest broken point; the image itself where none was found, or where it is broken
        already.
    """
    del threat, random
    result = images.detach().clone()
    start = result.clone().requires_grad_()
    logits = model(start)
    margin = criterion.margin(logits, labels)
    (gradient,) = torch.autograd.grad(margin.sum(), start)
    gap, slope = -margin.detach().to(images.dtype), distance(gradient, "L2")
    # A class that does not exist cannot be reached: of K classes at most K - 1 come before the label.
    rows = ((~criterion.broken(logits.detach(), labels)) & gap.isfinite()).nonzero().squeeze(1)
    if len(rows) == 0:
        return result
    problem = Problem(narrowed(model, rows), result[rows], labels[rows], criterion, confidence, variable)
    gap, slope = gap[rows], slope[rows].clamp_min(1e-12)
    if step_size is None:
        change = gap / slope / math.sqrt(result[0].numel())
        step_sizes = [torch.full_like(gap, _LONG_STEP), (_STEPS_PER_CHANGE * change).clamp(1e-4, _LONG_STEP)]
    else:
        step_sizes = [torch.full_like(gap, step_size)]
    # Of a linear model the boundary is reached from c = 2 gap / slope^2 on.
    begin = 3 * gap / slope.square() if constant is None else torch.full_like(gap, constant)
    found = _search(problem, begin.clamp_max(1e10), step_sizes, rounds=rounds, steps=steps)
    some = (found != problem.images).flatten(1).any(1).nonzero().squeeze(1)
    if confidence == 0:
        found[some] = nearest_on_segment(
            narrowed(problem.model, some),
            problem.images[some],
            found[some],
            problem.labels[some],
            criterion=criterion,
            evaluations=final_search,
        )
    result[rows] = found
    return result


@dataclass(frozen=True)
class Problem:
    """What is minimised, for the examples that are to be broken."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    criterion: Criterion
    confidence: float
    variable: str

    def free(self) -> Tensor:
        """Return the images in terms of the variable that is optimised."""
        return ((2 * self.images - 1) * _INSIDE).atanh() if self.variable == "tanh" else self.images

    def pixels(self, free: Tensor) -> Tensor:
        """Return the variable as images."""
        return (free.tanh() + 1) / 2 if self.variable == "tanh" else free

    def look(self, free: Tensor, constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the iterate as an image, which examples it breaks, and the objective's gradient."""
        free = free.detach().requires_grad_()
        candidate = self.pixels(free)
        logits = self.model(candidate)
        missing = (self.confidence - self.criterion.margin(logits, self.labels)).clamp_min(0)
        squared = (candidate - self.images).square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad((squared + constant * missing).sum(), free)
        broken = self.criterion.broken(logits.detach(), self.labels) & (missing.detach() == 0)
        return candidate.detach(), broken, gradient


def _search(problem: Problem, constant: Tensor, step_sizes: list[Tensor], *, rounds: int, steps: int) -> Tensor:
    """Return the nearest broken iterates `(N, C, H, W)`, the images where there is none."""
    nearest = Nearest(problem.images, problem.images, torch.full_like(constant, torch.inf))
    low, high = torch.zeros_like(constant), torch.full_like(constant, torch.inf)
    for turn in range(rounds):
        step = step_sizes[turn % len(step_sizes)]
        reached = torch.zeros_like(constant, dtype=torch.bool)
        free, adam = problem.free(), Adam.at(problem.images)
        for taken in range(steps):
            candidate, broken, gradient = problem.look(free, constant)
            nearest.keep(candidate, broken)
            reached |= broken
            annealed = _FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * taken / steps)) / 2
            free = free - per_example(annealed * step, free) * adam.direction(gradient)
            if problem.variable == "box":
                free = free.clamp(0.0, 1.0)
        high = torch.where(reached, torch.minimum(high, constant), high)
        low = torch.where(reached, low, torch.maximum(low, constant))
        constant = torch.where(high.isinf(), constant * _GROWTH, (low + high) / 2)
    return nearest.points.clone()


@dataclass
class Adam:
    """Adam's state (arXiv:1412.6980), for all examples at once; torch's own has no place for a step of each."""

    first: Tensor
    second: Tensor
    taken: int = 0

    @classmethod
    def at(cls, like: Tensor) -> Adam:
        """Return the state before the first step."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def direction(self, gradient: Tensor) -> Tensor:
        """Take note of a gradient; return what a step of size 1 would subtract."""
        self.taken += 1
        decay, decay_square = _ADAM
        self.first = decay * self.first + (1 - decay) * gradient
        self.second = decay_square * self.second + (1 - decay_square) * gradient.square()
        scale = (self.second / (1 - decay_square**self.taken)).sqrt() + 1e-8
        return self.first / (1 - decay**self.taken) / scale


ENTRY = AttackEntry(
    name="cw-l2",
    attack=cw_l2,
    summary="the nearest adversarial image in L2, by descending distance and loss together",
    source="Carlini and Wagner, arXiv:1608.04644, section VI-A",
    version=2,
    norms=("L2",),
    minimum_norm=True,
    passes="1 + steps * rounds",
    queries="2 + final_search",
)

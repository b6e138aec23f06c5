"""Auto-PGD (Croce and Hein, arXiv:2003.01690, section 3), in L-infinity and L2, untargeted and targeted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks import _compaction
from robench.attacks._targets import remark_on_fewer
from robench.catalog import AttackEntry, NonNegativeInt, PositiveInt
from robench.losses import TOP_1, Criterion, loss_named
from robench.lp_geometry import per_example, project, random_start, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed, remark
from robench.threat_model import ThreatModel

#: What is ascended: `(N, K)` logits, `(N,)` labels, `(N, k)` classes that are aimed at -> `(N,)`.
Goal = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Weight of the new direction against the previous step; "alpha" of Algorithm 1, section 3.1.
_MOMENTUM_SPLIT = 0.75
#: Share of the steps between two checkpoints that must increase the loss; "rho" of condition 1, section 3.2.
_INCREASES = 0.75


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    loss: Literal["ce", "margin", "dlr"] = "ce",
    targets: NonNegativeInt = 0,
    steps: PositiveInt = 100,
    restarts: PositiveInt = 1,
    eot_copies: PositiveInt = 1,
) -> Tensor:
    """Ascend the loss with momentum, a step size that halves itself where progress stalls, and restarts from the best.

    Algorithm 1 of the paper. An example leaves at its first broken iterate, and then costs nothing in later steps,
    targets and restarts. One that stands through a run took `steps` + 1 forward and `steps` backward passes.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: the examples' random numbers (start points).
        criterion: what counts as broken.
        loss: `ce` cross-entropy, `margin` Carlini and Wagner's, `dlr` the difference of logits ratio (equation 6); with
            `targets` the forms towards one class (equation 7 for `dlr`).
        targets: 0 is untargeted; else so many runs, each towards another class, the largest logits of the clean image
            first; at most as many as there are other classes, and where there are fewer the record says so.
        steps: gradient steps of a run.
        restarts: independent runs (for each target).
        eot_copies: of a randomised model, how many answers each step averages (loss, gradient, and the logits that
            decide what is broken).

    Returns:
        `(N, C, H, W)` in the ball and the box: the first broken iterate, else the one of the largest loss in the last
        run.
    """
    result = images.detach().clone()
    rows = torch.arange(len(images), device=images.device)
    climb = Climb(threat, criterion, steps, eot_copies)
    if targets == 0:
        named = loss_named(loss, criterion, model)
        aims = labels.new_empty(len(labels), 1, 0)
        goal: Goal = lambda logits, labels, _: named(logits, labels)  # noqa: E731 - a type that mypy knows
    else:
        with torch.no_grad():
            logits = model(images)
        aims = classes_aimed_at(logits, labels, count=targets, criterion=criterion)
        remark_on_fewer(model, asked=targets, taken=aims.shape[1])
        goal = targeted(loss, criterion, model)
        rows = (~criterion.broken(logits, labels)).nonzero().squeeze(1)
    for run in range(aims.shape[1]):
        for restart in range(restarts):
            if len(rows) == 0:
                return result
            x, stream = images[rows], random[rows].at("target", run, "restart", restart)
            start = random_start(x, threat, stream)
            found, standing = climb(narrowed(model, rows), start, x, labels[rows], goal=goal, aims=aims[rows, run])
            result[rows] = found
            rows = rows[standing]
    return result


def classes_aimed_at(logits: Tensor, labels: Tensor, *, count: int, criterion: Criterion) -> Tensor:
    """Return for each of the runs the `k` classes that are to come before the label, `(N, runs, k)`.

    For top-1 that is one class each, in the order of the clean image's logits `(N, K)`. For top-k the k - 1 strongest
    other classes are aimed at in every run, and the k-th changes. There are at most K - k runs: none where no label can
    leave the top k.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
    k = criterion.top_k
    runs = max(0, min(count, others.shape[1] - k + 1))
    common = others[:, None, : k - 1].expand(-1, runs, -1)
    return torch.cat([common, others[:, k - 1 : k - 1 + runs, None]], dim=2)


def targeted(name: str, criterion: Criterion, model: nn.Module) -> Goal:
    """Return the loss of that name towards given classes; of several, towards the one that is furthest behind.

    Where the targeted DLR has no form (fewer than 4 classes, or beyond top-1) the margin takes its place, and the
    record of `model`'s evaluation says so.
    """

    def margin(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:
        return logits.gather(1, aims).amin(1) - logits.gather(1, labels[:, None]).squeeze(1)

    def ratio(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:
        if criterion.top_k > 1 or logits.shape[1] < 4:
            remark(model, "the targeted DLR loss was replaced by the margin: it has no form below 4 classes or top-k")
            return margin(logits, labels, aims)
        ordered = logits.topk(4, dim=1).values
        # Equation (7); the constant keeps equal logits from dividing by zero.
        return margin(logits, labels, aims) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)

    def log_probability(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:  # noqa: ARG001 - a Goal
        return F.log_softmax(logits, dim=1).gather(1, aims).amin(1)

    return {"ce": log_probability, "margin": margin, "dlr": ratio}[name]


def checkpoints(steps: int) -> Iterator[int]:
    """Yield the steps after which the step size is looked at: w_0 = 0, then w_j = ceil(p_j steps); section 3.2."""
    yield 0
    before, now = 0.0, 0.22
    while now < 1:
        # Rounded first: 0.57 * 100 is 56.99999999999999 in floating point.
        yield math.ceil(round(now * steps, 6))
        before, now = now, now + max(now - before - 0.03, 0.06)


@dataclass
class Position:
    """Where the examples that still stand are. Tensors have one entry for each of them."""

    images: Tensor
    labels: Tensor
    aims: Tensor
    current: Tensor
    previous: Tensor
    step_size: Tensor
    """(n,) in the threat's norm."""
    loss: Tensor
    """(n,) of the current iterate."""
    best: Tensor
    best_loss: Tensor
    """(n,) the largest so far; infinite from the first broken iterate on, so that nothing replaces that one."""
    best_gradient: Tensor
    gradient: Tensor
    increases: Tensor
    """(n,) int64: steps since the last checkpoint that increased the loss."""
    halved: Tensor
    """(n,) bool: was the step size halved at the last checkpoint?"""
    best_at_checkpoint: Tensor
    """(n,) the largest loss at the last checkpoint."""

    @classmethod
    def at(cls, start: Tensor, images: Tensor, labels: Tensor, *, aims: Tensor, radius: float) -> Position:
        """Return the position before the first look."""
        lowest = torch.full(labels.shape, -torch.inf, dtype=images.dtype, device=images.device)
        zeros = torch.zeros_like(images)
        return cls(
            images=images,
            labels=labels,
            aims=aims,
            current=start,
            previous=start,
            # "eta^(0) = 2 epsilon", section 3.1.
            step_size=torch.full_like(lowest, 2 * radius),
            loss=-lowest,  # the first look is no increase
            best=start,
            best_loss=lowest,
            best_gradient=zeros,
            gradient=zeros,
            increases=torch.zeros_like(labels),
            halved=torch.zeros_like(labels, dtype=torch.bool),
            best_at_checkpoint=lowest,
        )

    def __getitem__(self, rows: Tensor) -> Position:
        """Return the position of some of the examples."""
        return Position(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def record(self, loss: Tensor, broken: Tensor, gradient: Tensor | None) -> None:
        """Take note of what was seen at the current iterate."""
        value = torch.where(broken, torch.inf, loss)
        better = value > self.best_loss
        self.increases = self.increases + (loss > self.loss)
        self.loss = loss
        self.best_loss = torch.where(better, value, self.best_loss)
        self.best = torch.where(per_example(better, self.best), self.current, self.best)
        if gradient is not None:
            self.gradient = gradient
            self.best_gradient = torch.where(per_example(better, gradient), gradient, self.best_gradient)

    def adapt(self, since: int) -> None:
        """Halve the step size where `since` steps brought too little, and go back to the best point there."""
        stalled = self.increases < _INCREASES * since
        stuck = ~self.halved & (self.best_loss == self.best_at_checkpoint)
        back = stalled | stuck
        self.step_size = torch.where(back, self.step_size / 2, self.step_size)
        self.current = torch.where(per_example(back, self.current), self.best, self.current)
        self.gradient = torch.where(per_example(back, self.gradient), self.best_gradient, self.gradient)
        self.loss = torch.where(back, self.best_loss, self.loss)
        self.increases = torch.zeros_like(self.increases)
        self.halved, self.best_at_checkpoint = back, self.best_loss

    def move(self, threat: ThreatModel, split: float) -> None:
        """Go to the next iterate: a projected gradient step, blended with the step before (Algorithm 1)."""
        step = per_example(self.step_size, self.current) * steepest(self.gradient, threat.norm)
        ahead = project(self.current + step, self.images, threat)
        blend = self.current + split * (ahead - self.current) + (1 - split) * (self.current - self.previous)
        self.previous, self.current = self.current, project(blend, self.images, threat)


@dataclass(frozen=True)
class Climb:
    """One run of Algorithm 1."""

    threat: ThreatModel
    criterion: Criterion
    steps: int
    copies: int

    def __call__(
        self, model: nn.Module, start: Tensor, images: Tensor, labels: Tensor, *, goal: Goal, aims: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the first broken iterates, else the best ones, and which examples stood through all steps."""
        at = Position.at(start, images, labels, aims=aims, radius=self.threat.radius)
        result, standing = start.clone(), torch.ones_like(labels, dtype=torch.bool)
        rows = torch.arange(len(images), device=images.device)
        interval = _compaction.steps_between_looks(images.device)
        due, last_checkpoint = set(checkpoints(self.steps)), 0
        for step in range(self.steps + 1):
            loss, broken, gradient = self._look(model, at, goal, with_gradient=step < self.steps)
            at.record(loss, broken, gradient)
            if step == self.steps:
                break
            if step in due:
                at.adapt(step - last_checkpoint)
                last_checkpoint = step
            if step % interval == 0:
                keep = (at.best_loss < torch.inf).nonzero().squeeze(1)
                if len(keep) < len(rows):
                    result[rows], standing[rows] = at.best, at.best_loss < torch.inf
                    if len(keep) == 0:
                        return result, standing
                    at, rows, model = at[keep], rows[keep], narrowed(model, keep)
            # "x^(1) <- P(x^(0) + eta grad f(x^(0)))": nothing came before the first step.
            at.move(self.threat, _MOMENTUM_SPLIT if step else 1.0)
        result[rows], standing[rows] = at.best, at.best_loss < torch.inf
        return result, standing

    def _look(
        self, model: nn.Module, at: Position, goal: Goal, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return loss, who is broken, and the loss's gradient at the current iterates, averaged over the copies."""
        current = at.current.detach().requires_grad_(with_gradient)
        gradient = torch.zeros_like(at.current) if with_gradient else None
        answers, losses = [], []
        for _ in range(self.copies):
            with torch.set_grad_enabled(with_gradient):
                logits = model(current)
                loss = goal(logits, at.labels, at.aims)
            if gradient is not None:
                (one,) = torch.autograd.grad(loss.sum(), current)
                gradient += one / self.copies
            answers.append(logits.detach())
            losses.append(loss.detach())
        loss, logits = torch.stack(losses).mean(0), torch.stack(answers).mean(0)
        return loss.to(at.current.dtype), self.criterion.broken(logits, at.labels), gradient


ENTRY = AttackEntry(
    name="apgd",
    attack=apgd,
    summary="gradient steps with momentum that set their own size",
    source="Croce and Hein, arXiv:2003.01690, section 3 and Algorithm 1",
    version=2,
    passes="steps * restarts * max(1, min(targets, classes - 1)) * eot_copies",
    norms=("Linf", "L2"),
    presets={
        "apgd-ce": {"loss": "ce"},
        "apgd-dlr": {"loss": "dlr"},
        "apgd-t": {"loss": "dlr", "targets": 9},
    },
)

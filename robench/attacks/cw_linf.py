"""Carlini and Wagner's attack in L-infinity (arXiv:1608.04644, section VI-C): what exceeds a bound that shrinks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._boundaries import Candidates, Nearest, Run, nearest_boundary
from robench.catalog import AttackEntry, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance, per_example, project_onto_hyperplane
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

#: The bound stays in this range of pixels: below, float32 has few values left between it and the image.
_SMALLEST, _LARGEST = 1e-5, 1.0
#: Squares of the gradients that it multiplies are to be finite in float32.
_LARGEST_CONSTANT = 1e15
#: By how much the step across the linearised boundary, with which the search begins, overshoots.
_OVERSHOOT = 1.05
#: Where nothing else is asked for: c's pull at a pixel, in units of the penalty's, and the step as a share of tau.
_PULL, _STEP = 0.25, 0.1
#: The steps of one minimisation shrink linearly to this share of the first.
_FINAL_SHARE = 0.1
#: Adam's averages of the gradient and of its square (Kingma and Ba, arXiv:1412.6980, algorithm 1). The second is the
#: shorter one of ten steps: the penalty sets in at once and would rule an average over a thousand to the end.
_ADAM = 0.9, 0.99
#: tanh of finite numbers is never 0 or 1: the image is moved so little towards grey before it is transformed.
_INSIDE = 1 - 1e-6
#: Logits of the same image differ by less than this share of the largest from one batch to another.
_ROUNDING = 1e-5
#: On an accelerator looking at which examples are done makes the host wait, so it is done at intervals of steps.
_STEPS_BETWEEN_COMPACTIONS = 5


def cw_linf(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 400,
    solve_steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    constant: PositiveFloat | None = None,
    doublings: NonNegativeInt = 6,
    shrink: Probability = 0.9,
    tolerance: PositiveFloat = 0.01,
    confidence: NonNegativeFloat = 0.0,
    variable: Literal["box", "tanh"] = "box",
    start: Literal["boundary", "image"] = "boundary",
    candidates: PositiveInt = 10,
    final_search: NonNegativeInt = 3,
) -> Tensor:
    """Minimise ``c max(f(x'), 0) + sum_i max(|x'_i - x_i| - tau, 0)`` by Adam, again and again for a smaller tau.

    f is the label's logit minus the largest other one (f_6 of the paper). Each example has its own c and tau, and every
    minimisation starts where the one before ended. Once an example is broken and nothing exceeds tau, tau shrinks below
    the distance that was reached. Where that does not come about c doubles, and where it does not for the largest c
    either, tau goes back half way (of its logarithm) to the smallest distance that was reached, which is where the
    paper stops. Until something is found tau doubles together with c. The nearest broken iterate of all is kept.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: its norm is Linf; its epsilon is not looked at.
        random: unused, the method is deterministic.
        criterion: what counts as broken.
        steps: gradient steps for each example, all its minimisations together.
        solve_steps: gradient steps for one pair of tau and c, at most.
        step_size: Adam's first in a minimisation, on the [0, 1] scale of pixels, with `tanh` on that of its argument;
            None: a tenth of tau, with `tanh` of how far its argument goes while the pixel goes by tau.
        constant: c of the first minimisation; None: where the loss pulls at an average pixel of the image a quarter as
            strongly as the penalty does, so that it does not depend on the scale of the logits.
        doublings: how often c doubles for one tau.
        shrink: tau becomes this share of the distance reached (the paper's 0.9).
        tolerance: an example is done when a tau was in vain that the distance reached exceeds by no more than this
            share.
        confidence: by how much the other logit is to exceed the label's (kappa).
        variable: `box` clamps pixels to [0, 1] after each step, `tanh` is the paper's change of variable.
        start: `boundary`: behind the nearest boundary of the linearised model, with tau as large as that is far;
            `image`: at the image, with tau = 1 (the paper).
        candidates: of how many other classes, those of the largest logits, the boundaries are compared for that start;
            at least top-k, at most all others.
        final_search: points tried at the end between what was found and the image. The paper has none.

    Returns:
        `(N, C, H, W)` in [0, 1]: the nearest broken point; the image itself where none was found, or where it is broken
        already.
    """
    del threat, random
    with torch.no_grad():
        logits = model(images)
    nearest, images = Nearest.to(images), images.detach()
    # A class that does not exist cannot be reached: of K classes at most K - 1 come before the label.
    if criterion.top_k >= logits.shape[1]:
        return nearest.images
    nearest.distance[criterion.broken(logits, labels)] = 0.0
    rows = (nearest.distance > 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return nearest.images
    others = Candidates.nearest(logits, labels, max(candidates if start == "boundary" else 1, criterion.top_k))
    run = Run(rows, images[rows], images[rows], labels[rows], others[rows], narrowed(model, rows))
    search = _Search(criterion, solve_steps, step_size, doublings, shrink, tolerance, confidence, variable)
    state = _begin(run, search, constant=constant, at_boundary=start == "boundary")
    interval = 1 if images.device.type == "cpu" else _STEPS_BETWEEN_COMPACTIONS
    for step in range(steps):
        done = search.step(state, nearest)
        if step % interval == 0:
            keep = (~done).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            state = state[keep] if len(keep) < len(done) else state
    if confidence == 0:
        nearest.search_lines(model, images, labels, criterion=criterion, enough=0.0, evaluations=final_search)
    return nearest.images


@dataclass
class State:
    """The examples that are searched for, what is minimised for each, and how far that is."""

    rows: Tensor
    """(M,) int64: which of all examples they are."""
    model: nn.Module
    images: Tensor
    """(M, C, H, W), as are `free`, `first` and `second`."""
    labels: Tensor
    free: Tensor
    """The variable that is optimised."""
    tau: Tensor
    """(M,), as are all that follow."""
    constant: Tensor
    in_vain: Tensor
    """The largest tau that was given up; 0 where none was."""
    doubled: Tensor
    """int64: how often c has doubled for this tau."""
    first: Tensor
    """Adam's average of the gradients in this minimisation, and `second`, of their squares."""
    second: Tensor
    taken: Tensor
    """int64: steps taken in this minimisation."""

    def __getitem__(self, keep: Tensor) -> State:
        """Return some of the examples, by row numbers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        model = narrowed(values.pop("model"), keep)
        return State(model=model, **{name: value[keep] for name, value in values.items()})


def _begin(run: Run, search: _Search, *, constant: float | None, at_boundary: bool) -> State:
    """Return the examples where their search begins."""
    boundary = nearest_boundary(run, norm="Linf", criterion=search.criterion)
    slope = boundary.normal.flatten(1)
    # What the loss pulls at a pixel on average; a gradient that vanishes says nothing about the scale.
    pull = slope.abs().sum(1) / (slope != 0).sum(1).clamp_min(1)
    begin = torch.where(pull > 0, _PULL / pull, 1.0).clamp(1e-10, 1e10)
    begin = begin if constant is None else torch.full_like(begin, constant)
    points, tau = run.images, torch.full_like(begin, _LARGEST)
    if at_boundary:
        points = project_onto_hyperplane(run.images, boundary.normal, _OVERSHOOT * boundary.gap, "Linf")
        tau = distance(points - run.images, "Linf").clamp(_SMALLEST, _LARGEST)
    zeros, count = torch.zeros_like(run.images), torch.zeros_like(run.labels)
    return State(
        run.rows,
        run.model,
        run.images,
        run.labels,
        search.free(points),
        tau,
        begin,
        torch.zeros_like(tau),
        count,
        zeros,
        zeros.clone(),
        count.clone(),
    )


@dataclass(frozen=True)
class _Search:
    """How to search; names as in :func:`cw_linf`."""

    criterion: Criterion
    solve_steps: int
    step_size: float | None
    doublings: int
    shrink: float
    tolerance: float
    confidence: float
    variable: str

    def free(self, points: Tensor) -> Tensor:
        """Return points in terms of the variable that is optimised."""
        return ((2 * points - 1) * _INSIDE).atanh() if self.variable == "tanh" else points

    def pixels(self, free: Tensor) -> Tensor:
        """Return the variable as images."""
        return (free.tanh() + 1) / 2 if self.variable == "tanh" else free

    def look(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Return the iterates as images, which examples they break, and the objective's gradient."""
        free = state.free.detach().requires_grad_()
        candidate = self.pixels(free)
        logits = state.model(candidate)
        wanted = (_ROUNDING * logits.detach().abs().amax(1)).clamp_min(self.confidence)
        missing = (wanted - self.criterion.margin(logits, state.labels)).clamp_min(0)
        excess = ((candidate - state.images).abs() - per_example(state.tau, free)).clamp_min(0).flatten(1).sum(1)
        (gradient,) = torch.autograd.grad((excess + state.constant * missing).sum(), free)
        broken = self.criterion.broken(logits.detach(), state.labels) & (missing.detach() == 0)
        return candidate.detach(), broken, gradient

    def step(self, state: State, nearest: Nearest) -> Tensor:
        """Look at the iterates, keep what is nearer, choose tau and c, and take a step; return who is done `(M,)`."""
        candidate, broken, gradient = self.look(state)
        length = distance(candidate - state.images, "Linf")
        nearer = broken & (length < nearest.distance[state.rows])
        nearest.images[state.rows[nearer]] = candidate[nearer]
        nearest.distance[state.rows[nearer]] = length[nearer]
        solved = broken & (length <= (1 + _ROUNDING) * state.tau)
        over = state.taken >= self.solve_steps
        self._descend(state, gradient)
        more = (state.doubled < self.doublings) | nearest.distance[state.rows].isinf()
        # With a larger c it goes on from where it is, which is looked at then; to give up it is looked at before.
        double = ~solved & more & (state.taken >= self.solve_steps)
        return self._choose(state, candidate, nearest, solved=solved, double=double, give_up=~solved & ~more & over)

    def _descend(self, state: State, gradient: Tensor) -> None:
        """Take Adam's step."""
        decay, decay_square = _ADAM
        left = 1 - state.taken / self.solve_steps
        share = _FINAL_SHARE + (1 - _FINAL_SHARE) * left.to(state.tau.dtype)
        state.taken = state.taken + 1
        state.first = decay * state.first + (1 - decay) * gradient
        state.second = decay_square * state.second + (1 - decay_square) * gradient.square()
        taken = state.taken.to(state.tau.dtype)
        first = state.first / per_example(1 - decay**taken, gradient)
        second = state.second / per_example(1 - decay_square**taken, gradient)
        way = self._length(state) * per_example(share, gradient)
        # Gradients of float32 networks vanish below 1e-20 in their squares.
        moved = state.free - way * first / (second.sqrt() + 1e-12)
        state.free = moved if self.variable == "tanh" else moved.clamp(0.0, 1.0)
        # Adam's last steps leave a few pixels a little beyond tau: the last look is at what remains without that.
        last = per_example(state.taken == self.solve_steps, gradient)
        state.free = torch.where(last, self.free(self._cut(state)), state.free)

    def _cut(self, state: State) -> Tensor:
        """Return the iterates as images, with what exceeds tau cut off."""
        tau = per_example(state.tau, state.free)
        return torch.minimum(torch.maximum(self.pixels(state.free), state.images - tau), state.images + tau)

    def _length(self, state: State) -> Tensor:
        """Return the length of a minimisation's first step, for each pixel or for all."""
        tau = per_example(state.tau, state.images)
        if self.step_size is not None:
            return torch.full_like(tau, self.step_size)
        if self.variable == "box":
            return _STEP * tau
        # Where tanh is flat its argument has far to go until a pixel has gone by tau, towards grey.
        inward = torch.where(state.images < 0.5, state.images + tau, state.images - tau).clamp(0.0, 1.0)
        return _STEP * (self.free(inward) - self.free(state.images)).abs()

    def _choose(
        self, state: State, candidate: Tensor, nearest: Nearest, *, solved: Tensor, double: Tensor, give_up: Tensor
    ) -> Tensor:
        """Choose tau and c of the next minimisation, for whom the last is over; return who is done."""
        best, points = nearest.distance[state.rows], nearest.images[state.rows]
        found, ended = best.isfinite(), solved | give_up
        state.in_vain = torch.where(give_up, state.tau, state.in_vain)
        # Half way in the logarithm, between what was in vain and what was reached.
        between = (state.in_vain * best).sqrt()
        tau = torch.where(solved, torch.maximum(self.shrink * best, between), state.tau)
        tau = torch.where(give_up, between, torch.where(double & ~found, 2 * tau, tau))
        state.tau = tau.clamp(_SMALLEST, _LARGEST)
        # Where nothing was found for long, c began too small: it goes back by as much as one tau may cost.
        back = 0.5 ** state.doubled.clamp_max(self.doublings).to(best.dtype)
        factor = torch.where(ended, back, torch.where(double, 2.0, 1.0).to(best.dtype))
        state.constant = (state.constant * factor).clamp_max(_LARGEST_CONSTANT)
        state.doubled = torch.where(ended, 0, state.doubled + double.long())
        # Whoever is solved stands at the boundary already, and goes on from there; who gave up goes back to its best.
        place = torch.where(per_example(solved, points), candidate, points)
        state.free = torch.where(per_example(ended, points), self.free(place), state.free)
        fresh = per_example(ended | double, points)
        state.first, state.second = state.first.masked_fill(fresh, 0), state.second.masked_fill(fresh, 0)
        state.taken = state.taken.masked_fill(ended | double, 0)
        return found & (state.in_vain > 0) & (best <= (1 + self.tolerance) * state.in_vain)


ENTRY = AttackEntry(
    name="cw-linf",
    attack=cw_linf,
    summary="the nearest adversarial image in Linf, by descending the loss and what exceeds a shrinking bound together",
    source="Carlini and Wagner, arXiv:1608.04644, section VI-C",
    version=1,
    norms=("Linf",),
    minimum_norm=True,
    passes='steps + (min(candidates, classes - 1) if start == "boundary" else 1)',
    queries="3 + final_search",
)

"""The boundary nearest to a point, as the gradients there tell: what DeepFool and FAB step towards.

Between the label y and another class c the decision changes where `logit_c - logit_y` is zero. At a point that function is
taken for linear, so its boundary is a hyperplane as far away as what is missing over the dual norm of the gradient
(DeepFool, arXiv:1511.04599, equations (6) and (8)). Gradients to all classes at every step are what makes the attacks
slow elsewhere. How steep a class is changes slowly, so here it is remembered, and a gradient is computed only while a
class whose steepness is old may be nearer than the nearest one whose gradient is new: mostly one gradient a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.losses import Criterion
from robench.target import narrowed


@dataclass(frozen=True)
class Boundary:
    """One linearised boundary per example."""

    logits: Tensor
    """(N, K) at the points, without a graph."""
    normal: Tensor
    """(N, ...): gradient of the class's logit minus the label's."""
    gap: Tensor
    """(N,): by how much the label's logit exceeds the class's; negative beyond the boundary."""


@dataclass(frozen=True)
class Candidates:
    """The other classes whose boundaries are looked at, and how steep each was when its gradient was last computed."""

    classes: Tensor
    """(N, C) int64."""
    slopes: Tensor
    """(N, C): dual norm of the gradient; negative: never computed. Brought up to date in place."""

    @classmethod
    def nearest(cls, logits: Tensor, labels: Tensor, count: int) -> Candidates:
        """Return those `count` classes, at most all others, that have the largest logits."""
        count = min(count, logits.shape[1] - 1)
        classes = logits.detach().scatter(1, labels[:, None], -torch.inf).topk(count, dim=1).indices
        return cls(classes, torch.full(classes.shape, -1.0, dtype=logits.dtype, device=logits.device))

    def __getitem__(self, rows: Tensor) -> Candidates:
        """Return a copy for some of the examples, by row numbers."""
        return Candidates(self.classes[rows], self.slopes[rows])


def nearest_boundary(
    model: nn.Module,
    points: Tensor,
    labels: Tensor,
    candidates: Candidates,
    *,
    norm: str,
    criterion: Criterion,
    every: bool = False,
) -> Boundary:
    """Return the boundary that is nearest to each of `points` `(N, ...)`, in the threat's norm and without the box.

    Under top-k it is the k-th nearest one, behind which k classes come before the label: on either side of the boundary
    of what counts as broken this is the one to cross.

    Args:
        model: images -> logits.
        points: `(N, ...)` in [0, 1].
        labels: `(N,)` int64.
        candidates: the classes to choose from, at least k; their slopes are updated.
        norm: `Linf` or `L2`.
        criterion: says k.
        every: compute the gradients of all candidates anew.
    """
    if every:
        candidates.slopes.fill_(-1.0)
    points = points.detach().requires_grad_()
    logits = model(points)
    values = logits.detach()
    gaps = values.gather(1, labels[:, None]) - values.gather(1, candidates.classes)
    fresh = torch.zeros_like(gaps, dtype=torch.bool)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        chosen = _chosen(gaps, candidates.slopes, criterion.top_k)
        rows = (~fresh.gather(1, chosen[:, None])).squeeze(1).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        position = chosen[rows]
        gradient = _gradients(model, points, logits, labels, (rows, candidates.classes[rows, position]))
        candidates.slopes[rows, position] = _dual_norm(gradient, norm).to(gaps.dtype)
        fresh[rows, position] = True
        found.append((rows, position, gradient))
    normal = torch.zeros_like(points)
    for rows, position, gradient in found:
        final = chosen[rows] == position
        normal[rows[final]] = gradient[final]
    return Boundary(values, normal.detach(), gaps.gather(1, chosen[:, None]).squeeze(1))


def boundary_to(model: nn.Module, points: Tensor, labels: Tensor, targets: Tensor, criterion: Criterion) -> Boundary:
    """Return the boundary to one class per example, `targets` `(N,)`: one forward and one backward pass.

    Under top-k the boundary behind which the target and k - 1 others come before the label.
    """
    points = points.detach().requires_grad_()
    logits = model(points)
    entering = logits.gather(1, targets[:, None]).squeeze(1)
    if criterion.top_k > 1:
        others = logits.scatter(1, torch.stack([labels, targets], dim=1), -torch.inf)
        entering = torch.minimum(entering, others.topk(criterion.top_k - 1, dim=1).values[:, -1])
    advantage = entering - logits.gather(1, labels[:, None]).squeeze(1)
    (normal,) = torch.autograd.grad(advantage.sum(), points)
    return Boundary(logits.detach(), normal, -advantage.detach())


def _chosen(gaps: Tensor, slopes: Tensor, top_k: int) -> Tensor:
    """Return `(N,)` which candidate to look at: one never looked at, else the k-th nearest as far as is known."""
    tiny = torch.finfo(gaps.dtype).tiny
    estimate = torch.where(slopes < 0, -torch.inf, gaps / slopes.clamp_min(tiny))
    least, nearest = estimate.min(dim=1)
    if top_k == 1:
        return nearest
    return torch.where(least == -torch.inf, nearest, estimate.kthvalue(top_k, dim=1).indices)


def _gradients(
    model: nn.Module, points: Tensor, logits: Tensor, labels: Tensor, wanted: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the gradients of logit minus label's logit, for the rows and classes `wanted`.

    A backward pass through the graph that is there takes all examples along, so for less than half of them a
    forward pass of their own is cheaper.
    """
    rows, classes = wanted
    if 2 * len(rows) < len(points):
        points = points.detach()[rows].requires_grad_()
        logits, labels, rows = narrowed(model, rows)(points), labels[rows], torch.arange(len(rows), device=rows.device)
    else:
        labels = labels[rows]
    advantage = logits[rows, classes] - logits[rows, labels]
    (gradient,) = torch.autograd.grad(advantage.sum(), points, retain_graph=True)
    return gradient if len(rows) == len(gradient) else gradient[rows]


def _dual_norm(gradient: Tensor, norm: str) -> Tensor:
    flat = gradient.flatten(1)
    if norm == "Linf":
        return flat.abs().sum(1)
    largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    # Scaled by the largest entry: squares of gradients below 1e-19 would vanish in float32.
    return torch.linalg.vector_norm(flat / largest, dim=1) * largest.squeeze(1)

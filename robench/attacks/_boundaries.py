"""What DeepFool and FAB have in common: examples on their way, and the boundary that the gradients there tell of.

Between the label y and another class c the decision changes where `logit_c - logit_y` is zero. At a point that function
is taken for linear, so its boundary is a hyperplane as far away as its value over the dual norm of its gradient
(DeepFool, arXiv:1511.04599, equations (6) and (8)). Gradients to all classes at every step are what makes these attacks
slow elsewhere. Here it is remembered how steep the classes are, compared with each other, and a gradient is computed
only while a class that was not looked at here may be nearer than the nearest one that was: mostly one a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robench.attacks._line_search import nearest_on_segment
from robench.losses import Criterion
from robench.lp_geometry import distance, per_example
from robench.target import narrowed

#: Of the factor by which the slopes of classes that are not looked at are believed to change: never to fall, so that a
#: class is sooner looked at in vain than forgotten.
_GROWTH = (1.0, 1e3)

#: In the threat's norm. In float32 an example whose remaining way is below the spacing of its pixels would stand before
#: the boundary for ever.
_SHORTEST_STEP = 1e-4

#: Logits of the same image differ by less than this share of the largest from one batch to another.
_ROUNDING = 1e-5


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


@dataclass(frozen=True)
class Run:
    """The examples that are on their way, and where they are."""

    rows: Tensor
    """(M,) int64: which of all examples they are."""
    points: Tensor
    """(M, ...) in [0, 1], as are `images`."""
    images: Tensor
    labels: Tensor
    candidates: Candidates
    model: nn.Module

    def __getitem__(self, keep: Tensor) -> Run:
        """Return some of them, by row numbers."""
        return Run(
            self.rows[keep],
            self.points[keep],
            self.images[keep],
            self.labels[keep],
            self.candidates[keep],
            narrowed(self.model, keep),
        )

    def at(self, points: Tensor) -> Run:
        """Return the same examples elsewhere."""
        return replace(self, points=points)


@dataclass(frozen=True)
class Nearest:
    """What was found so far; brought up to date in place."""

    images: Tensor
    """(N, ...): the nearest adversarial image, or the image itself."""
    distance: Tensor
    """(N,): how far that is; infinite where nothing was found."""
    last: Tensor
    """(N,): how far from its image the example was when last looked at."""

    @classmethod
    def to(cls, images: Tensor) -> Nearest:
        """Return that nothing was found yet."""
        nothing = torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device)
        return cls(images.detach().clone(), nothing, torch.zeros_like(nothing))

    def keep(self, run: Run, broken: Tensor, norm: str) -> None:
        """Take over the points of `run` that are broken and nearer than all before."""
        last = distance(run.points - run.images, norm)
        nearer = broken & (last < self.distance[run.rows])
        self.images[run.rows] = torch.where(per_example(nearer, run.points), run.points, self.images[run.rows])
        self.distance[run.rows] = torch.where(nearer, last, self.distance[run.rows])
        self.last[run.rows] = last

    def search_lines(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, criterion: Criterion, enough: float, evaluations: int
    ) -> None:
        """Search the lines from what was found, and is farther than `enough`, to the images for something nearer."""
        rows = (self.distance.isfinite() & (self.distance > enough)).nonzero().squeeze(1)
        self.images[rows] = nearest_on_segment(
            narrowed(model, rows),
            images[rows],
            self.images[rows],
            labels[rows],
            criterion=criterion,
            evaluations=evaluations,
        )


def gap_to_cross(gap: Tensor, normal: Tensor, standing: Tensor, norm: str) -> Tensor:
    """Return `gap`, and for those who stand at least what the shortest step gains, wherever rounding has them."""
    shortest = _SHORTEST_STEP * _dual_norm(normal, norm)
    return torch.where(standing, torch.maximum(gap, shortest), gap)


def surely_broken(logits: Tensor, labels: Tensor, criterion: Criterion) -> Tensor:
    """Return `(N,)` who is broken by more than rounding, which another batch or the plain model may undo."""
    return criterion.margin(logits, labels) > _ROUNDING * logits.abs().amax(1)


def nearest_boundary(
    run: Run, *, norm: str, criterion: Criterion, every: bool = False, either_side: bool = False
) -> Boundary:
    """Return the boundary that is nearest to each point of `run`, in the threat's norm and without the box.

    Distances have a sign: of boundaries that were crossed the one that lies farthest behind, which is the last to be
    crossed on the way back. Under top-k it is the k-th one in this order: behind it k classes come before the label.

    Args:
        run: its candidates' slopes are updated; there must be at least k of them.
        norm: `Linf` or `L2`.
        criterion: says k.
        every: compute the gradients of all candidates anew.
        either_side: under top-1, the nearest by the distance without its sign.
    """
    classes, slopes = run.candidates.classes, run.candidates.slopes
    if every:
        slopes.fill_(-1.0)
    points = run.points.detach().requires_grad_()
    logits = run.model(points)
    values = logits.detach()
    gaps = values.gather(1, run.labels[:, None]) - values.gather(1, classes)
    fresh = torch.zeros_like(gaps, dtype=torch.bool)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        chosen = _chosen(gaps.abs() if either_side and criterion.top_k == 1 else gaps, slopes, criterion.top_k)
        rows = (~fresh.gather(1, chosen[:, None])).squeeze(1).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        position = chosen[rows]
        gradient = _gradients(run, points, logits, rows=rows, classes=classes[rows, position])
        _learn((slopes, fresh), rows, position, _dual_norm(gradient, norm))
        found.append((rows, position, gradient))
    normal = torch.zeros_like(points)
    for rows, position, gradient in found:
        final = per_example(chosen[rows] == position, gradient)
        normal[rows] = torch.where(final, gradient, normal[rows])
    return Boundary(values, normal, gaps.gather(1, chosen[:, None]).squeeze(1))


def boundary_to(run: Run, targets: Tensor, criterion: Criterion) -> Boundary:
    """Return the boundary to one class per example, `targets` `(M,)`: one forward and one backward pass.

    Under top-k the boundary behind which the target and k - 1 others come before the label.
    """
    points = run.points.detach().requires_grad_()
    logits = run.model(points)
    entering = logits.gather(1, targets[:, None]).squeeze(1)
    if criterion.top_k > 1:
        others = logits.scatter(1, torch.stack([run.labels, targets], dim=1), -torch.inf)
        entering = torch.minimum(entering, others.topk(criterion.top_k - 1, dim=1).values[:, -1])
    advantage = entering - logits.gather(1, run.labels[:, None]).squeeze(1)
    (normal,) = torch.autograd.grad(advantage.sum(), points)
    return Boundary(logits.detach(), normal, -advantage.detach())


def _chosen(gaps: Tensor, slopes: Tensor, top_k: int) -> Tensor:
    """Return `(N,)` which candidate to look at: one never looked at, else the k-th nearest as far as is known."""
    unknown = slopes < 0
    away = gaps / slopes.clamp_min(torch.finfo(gaps.dtype).tiny)
    return torch.where(unknown.any(1), unknown.int().argmax(1), away.kthvalue(top_k, dim=1).indices)


def _learn(known: tuple[Tensor, Tensor], rows: Tensor, position: Tensor, slope: Tensor) -> None:
    """Note in `known`, slopes and which of them are fresh, a new slope for each of `rows`.

    The old slopes grow by as much: gradients to all classes rise and fall together.
    """
    slopes, fresh = known
    before = slopes[rows, position]
    growth = torch.where((before > 0) & (slope > 0), slope / before, 1.0).clamp(*_GROWTH)
    old = ~fresh[rows] & (slopes[rows] > 0)
    slopes[rows] *= torch.where(old, growth[:, None], 1.0)
    slopes[rows, position] = slope
    fresh[rows, position] = True


def _gradients(run: Run, points: Tensor, logits: Tensor, *, rows: Tensor, classes: Tensor) -> Tensor:
    """Return the gradients of the logits of `classes` minus the label's, for these rows.

    A backward pass through the graph that is there takes all examples along, so for less than half of them a
    forward pass of their own is cheaper.
    """
    labels, places = run.labels[rows], rows
    if 2 * len(rows) < len(points):
        points = points.detach()[rows].requires_grad_()
        logits, places = narrowed(run.model, rows)(points), torch.arange(len(rows), device=rows.device)
    advantage = logits[places, classes] - logits[places, labels]
    (gradient,) = torch.autograd.grad(advantage.sum(), points, retain_graph=True)
    return gradient[places]


def _dual_norm(gradient: Tensor, norm: str) -> Tensor:
    flat = gradient.flatten(1)
    if norm == "Linf":
        return flat.abs().sum(1)
    largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    # Scaled by the largest entry: squares of gradients below 1e-19 would vanish in float32.
    length: Tensor = torch.linalg.vector_norm(flat / largest, dim=1)
    return length * largest.squeeze(1)

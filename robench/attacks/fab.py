"""The fast adaptive boundary attack (FAB: Croce and Hein, arXiv:1907.02044; FAB-T: arXiv:2003.01690, section 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._boundaries import Boundary, Candidates, boundary_to, nearest_boundary
from robench.attacks._line_search import nearest_on_segment
from robench.catalog import AttackEntry, NonNegativeInt, PositiveFloat, PositiveInt, Probability
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance, per_example, project_onto_hyperplane, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

#: On an accelerator looking at which examples are done makes the host wait, so it is done at intervals of steps.
_STEPS_BETWEEN_COMPACTIONS = 5


def fab(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 100,
    restarts: PositiveInt = 1,
    targets: NonNegativeInt = 0,
    candidates: PositiveInt = 10,
    stop_within_epsilon: bool = False,
    bias: Probability = 0.1,
    extrapolation: PositiveFloat = 1.05,
    step_back: Probability = 0.9,
    linearize: Literal["arrived", "departing"] = "arrived",
    every_candidate: bool = False,
    final_search: NonNegativeInt = 3,
) -> Tensor:
    """Look for the nearest adversarial image; algorithm 1 of the paper.

    A step goes to the box-constrained projection onto the linearised decision boundary, mixed with the projection of the
    image itself; whoever arrives beyond the boundary is remembered where that is nearer than all before, and stepped
    back towards the image.

    The paper linearises where the next step departs from, which costs a second forward pass after every step back.
    Where the step before arrived is nearer to the boundary, so linearising there is not only cheaper: on a robust
    LeNet-5 50 such steps find what takes 100 of the paper's, at a third of the passes.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: the norm; its radius is used only with `stop_within_epsilon`.
        random: the examples' random numbers (starts of further restarts).
        criterion: what counts as broken.
        steps: per restart and target.
        restarts: runs; the first starts at the image, further ones at a random point of the ball of half the distance
            found so far. Where nothing was found that is half the distance at which the run before ended.
        targets: 0 steps towards the nearest boundary whatever its class (FAB). Else one run for each of so many other
            classes, those of the largest logits, at most all others (FAB-T).
        candidates: of how many other classes, those of the largest logits at the image, the boundaries are compared
            without `targets`; at least top-k, at most all others.
        stop_within_epsilon: be content with any adversarial image in the ball of `threat`, and return the image itself
            where none was found in it.
        bias: largest weight of the image's own projection (alpha_max of the paper).
        extrapolation: how far the projections are overshot, as a factor (eta).
        step_back: whoever is beyond the boundary keeps this share of its distance to the image (beta).
        linearize: where the step before `arrived`, or where the next one is `departing` (the paper).
        every_candidate: compute the gradients of all candidates at every step (the paper), instead of those which may
            be nearest by how steep they were when last looked at.
        final_search: points tried between what was found and the image at the end.

    Returns:
        `(N, C, H, W)` in the box: the nearest adversarial image found, or the image itself.
    """
    with torch.no_grad():
        logits = model(images)
    standing = ~criterion.broken(logits, labels)
    if criterion.top_k >= logits.shape[1]:
        return images.detach().clone()
    nearest = _Nearest(images.detach().clone(), torch.where(standing, torch.inf, 0.0).to(images.dtype))
    search = _Search(
        norm=threat.norm,
        criterion=criterion,
        steps=steps,
        enough=threat.radius if stop_within_epsilon else 0.0,
        bias=bias,
        extrapolation=extrapolation,
        step_back=step_back,
        linearize=linearize,
        every_candidate=every_candidate,
    )
    classes = Candidates.nearest(logits, labels, targets or max(candidates, criterion.top_k))
    reached = nearest.distance.clone()
    for goal in range(classes.classes.shape[1]) if targets else [None]:
        for restart in range(restarts):
            rows = (nearest.distance > search.enough).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            points = images[rows].detach()
            if restart > 0:
                radius = torch.minimum(nearest.distance, reached)[rows].clamp_max(search.enough or torch.inf) / 2
                stream = random[rows].at("goal", 0 if goal is None else goal, "restart", restart)
                points = _random_point(points, radius, threat.norm, stream)
            run = _Run(rows, points, images[rows].detach(), labels[rows], classes[rows], narrowed(model, rows))
            reached[rows] = _walk(run, nearest, replace(search, goal=goal))
    return _finished(model, images.detach(), labels, nearest, search, final_search)


@dataclass(frozen=True)
class _Nearest:
    """What was found so far; brought up to date in place."""

    images: Tensor
    """(N, ...): the nearest adversarial image, or the image itself."""
    distance: Tensor
    """(N,): how far that is; infinite where nothing was found."""

    def keep(self, rows: Tensor, points: Tensor, distances: Tensor, broken: Tensor) -> None:
        """Take over those of `points` that are broken and nearer than all before."""
        nearer = broken & (distances < self.distance[rows])
        self.images[rows] = torch.where(per_example(nearer, points), points, self.images[rows])
        self.distance[rows] = torch.where(nearer, distances, self.distance[rows])


@dataclass(frozen=True)
class _Run:
    """The examples that are on their way, and where they are."""

    rows: Tensor
    """(M,): which of all examples they are."""
    points: Tensor
    images: Tensor
    labels: Tensor
    classes: Candidates
    model: nn.Module

    def __getitem__(self, keep: Tensor) -> _Run:
        """Return those of these row numbers."""
        return _Run(
            self.rows[keep],
            self.points[keep],
            self.images[keep],
            self.labels[keep],
            self.classes[keep],
            narrowed(self.model, keep),
        )

    def at(self, points: Tensor) -> _Run:
        """Return the same examples elsewhere."""
        return replace(self, points=points)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """How to step; names as in `fab`."""

    norm: str
    criterion: Criterion
    steps: int
    enough: float
    """The distance at which an example is done."""
    bias: float
    extrapolation: float
    step_back: float
    linearize: str
    every_candidate: bool
    goal: int | None = None
    """The position among the candidates of the class to make for; None: whichever is nearest."""

    def boundary(self, run: _Run) -> Boundary:
        """Return the boundary to step to, linearised where the examples are."""
        if self.goal is not None:
            targets = run.classes.classes[:, self.goal]
            return boundary_to(run.model, run.points, run.labels, targets, self.criterion)
        return nearest_boundary(
            run.model,
            run.points,
            run.labels,
            run.classes,
            norm=self.norm,
            criterion=self.criterion,
            every=self.every_candidate,
        )

    def step(self, run: _Run, normal: Tensor, gap: Tensor) -> Tensor:
        """Return the next points: equations (8) to (10), with the extrapolation and the box of algorithm 1."""
        gap_of_images = gap + _inner(normal, run.points - run.images)
        from_points, from_images = project_onto_hyperplane(
            torch.cat([run.points, run.images]), torch.cat([normal] * 2), torch.cat([gap, gap_of_images]), self.norm
        ).chunk(2)
        to_point, to_image = from_points - run.points, from_images - run.images
        ways = distance(to_point, self.norm), distance(to_image, self.norm)
        share = (ways[0] / (ways[0] + ways[1]).clamp_min(1e-12)).clamp_max(self.bias)
        weight = per_example(share, normal)
        moved = (1 - weight) * (run.points + self.extrapolation * to_point)
        return (moved + weight * (run.images + self.extrapolation * to_image)).clamp(0.0, 1.0)


def _walk(run: _Run, nearest: _Nearest, search: _Search) -> Tensor:
    """Take the steps of one run; return how far from their images its examples were at the end."""
    everyone, reached = run.rows, torch.zeros_like(nearest.distance)
    interval = 1 if run.points.device.type == "cpu" else _STEPS_BETWEEN_COMPACTIONS
    for step in range(search.steps):
        if search.linearize == "arrived":
            boundary = search.boundary(run)
            broken = _note(run, boundary.logits, nearest, reached, search)
            departing = _stepped_back(run, broken, search)
            # The linearisation holds all along the line.
            gap = boundary.gap + _inner(boundary.normal, run.points - departing.points)
        else:
            broken = _note(run, _logits(run), nearest, reached, search)
            departing = _stepped_back(run, broken, search)
            boundary = search.boundary(departing)
            gap = boundary.gap
        run = departing.at(search.step(departing, boundary.normal, gap))
        if search.enough and step % interval == 0:
            keep = (nearest.distance[run.rows] > search.enough).nonzero().squeeze(1)
            run = run[keep] if len(keep) < len(run.rows) else run
            if len(keep) == 0:
                break
    if len(run.rows):
        _note(run, _logits(run), nearest, reached, search)
    return reached[everyone]


@torch.no_grad()
def _logits(run: _Run) -> Tensor:
    logits: Tensor = run.model(run.points)
    return logits


def _note(run: _Run, logits: Tensor, nearest: _Nearest, reached: Tensor, search: _Search) -> Tensor:
    """Remember where the examples are; return which are broken."""
    broken = search.criterion.broken(logits, run.labels)
    reached[run.rows] = distance(run.points - run.images, search.norm)
    nearest.keep(run.rows, run.points, reached[run.rows], broken)
    return broken


def _stepped_back(run: _Run, broken: Tensor, search: _Search) -> _Run:
    """Return those who are beyond the boundary nearer to their images; algorithm 1, line 13."""
    nearer = run.images + search.step_back * (run.points - run.images)
    return run.at(torch.where(per_example(broken, nearer), nearer, run.points))


def _finished(
    model: nn.Module, images: Tensor, labels: Tensor, nearest: _Nearest, search: _Search, evaluations: int
) -> Tensor:
    """Search the lines to the images at the end; what is still too far does not count."""
    rows = (nearest.distance.isfinite() & (nearest.distance > search.enough)).nonzero().squeeze(1)
    found = nearest_on_segment(
        narrowed(model, rows),
        images[rows],
        nearest.images[rows],
        labels[rows],
        criterion=search.criterion,
        evaluations=evaluations,
    )
    if search.enough:
        near = distance(found - images[rows], search.norm) <= search.enough
        found = torch.where(per_example(near, found), found, images[rows])
    nearest.images[rows] = found
    return nearest.images


def _inner(normal: Tensor, difference: Tensor) -> Tensor:
    return (normal * difference).flatten(1).sum(1)


def _random_point(images: Tensor, radius: Tensor, norm: str, random: RandomStream) -> Tensor:
    """Return a uniformly random point of each example's own ball, clamped to the box."""
    if norm == "Linf":
        offset = 2 * random.uniform(images) - 1
    else:
        dimension = max(1, images[0].numel())
        share = random.at("radius").uniform(radius) ** (1.0 / dimension)
        offset = steepest(random.at("direction").normal(images), "L2") * per_example(share, images)
    return (images + offset * per_example(radius, images)).clamp(0.0, 1.0)


ENTRY = AttackEntry(
    name="fab",
    attack=fab,
    summary="steps along the decision boundary to the nearest adversarial image",
    source="Croce and Hein, arXiv:1907.02044, algorithm 1; targeted: arXiv:2003.01690, section 5",
    version=1,
    # Untargeted it looks at one or two boundaries a step, unless it is told to look at all.
    passes="steps * restarts * (min(targets, classes - 1) if targets else candidates if every_candidate else 2)",
    norms=("Linf", "L2"),
    minimum_norm=True,
    presets={"fab-t": {"targets": 9}},
)

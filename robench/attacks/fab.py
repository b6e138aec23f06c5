"""The fast adaptive boundary attack (FAB: Croce and Hein, arXiv:1907.02044; FAB-T: arXiv:2003.01690, section 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks import _compaction
from robench.attacks._boundaries import (
    Boundary,
    Candidates,
    Nearest,
    Run,
    boundary_to,
    gap_to_cross,
    nearest_boundary,
    surely_broken,
)
from robench.attacks._targets import remark_on_fewer
from robench.catalog import AttackEntry, NonNegativeInt, PositiveFloat, PositiveInt, Probability
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance, per_example, project_onto_hyperplane, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel


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
    linearize: Literal["departing-then-arrived", "arrived", "departing"] = "departing-then-arrived",
    every_candidate: bool = False,
    final_search: NonNegativeInt = 3,
) -> Tensor:
    """Look for the nearest adversarial image; algorithm 1 of the paper.

    A step goes to the projection onto the linearised decision boundary in the box, mixed with the projection of the
    image itself. Whoever arrives beyond the boundary is remembered if that is nearer than all before, and steps back
    towards the image.

    The paper linearises where the next step departs from, which costs a second forward pass after every step back.
    Where the step before arrived is nearer to the boundary, so linearising there is cheaper, and closes in faster on
    the boundary at hand, but leaves it less often for a nearer one. Hence the first half of the steps as in the paper,
    the second half where they arrive.

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
            classes, those of the largest logits, at most all others (FAB-T); of fewer the record tells.
        candidates: of how many other classes, those of the largest logits at the image, the boundaries are compared
            without `targets`; at least top-k, at most all others.
        stop_within_epsilon: be content with any adversarial image in the ball of `threat`, and return the image itself
            where none was found in it.
        bias: largest weight of the image's own projection (alpha_max of the paper).
        extrapolation: how far the projections are overshot, as a factor (eta).
        step_back: whoever is beyond the boundary keeps this share of its distance to the image (beta).
        linearize: where the step before `arrived`, where the next one is `departing` (the paper), or
            `departing-then-arrived`, half of the steps each. Of the boundaries at a point beyond some, the first looks
            at the last one on the way back, the second at the nearest.
        every_candidate: compute the gradients of all candidates at every step (the paper), instead of those which may
            be nearest by how steep they were when last looked at.
        final_search: points tried between what was found and the image at the end.

    Returns:
        `(N, C, H, W)` in the box: the nearest adversarial image found, or the image itself.
    """
    with torch.no_grad():
        logits = model(images)
    nearest, images = Nearest.to(images), images.detach()
    if criterion.top_k >= logits.shape[1]:
        return nearest.images
    nearest.distance[criterion.broken(logits, labels)] = 0.0
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
    others = Candidates.nearest(logits, labels, targets or max(candidates, criterion.top_k))
    if targets:
        remark_on_fewer(model, asked=targets, taken=others.classes.shape[1])
    for goal in range(others.classes.shape[1]) if targets else [None]:
        for restart in range(restarts):
            rows = (nearest.distance > search.enough).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            points = images[rows]
            if restart > 0:
                radius = torch.minimum(nearest.distance, nearest.last)[rows].clamp_max(search.enough or torch.inf) / 2
                stream = random[rows].at("goal", 0 if goal is None else goal, "restart", restart)
                points = _random_point(points, radius, threat.norm, stream)
            run = Run(rows, points, images[rows], labels[rows], others[rows], narrowed(model, rows))
            _walk(run, nearest, replace(search, goal=goal))
    nearest.search_lines(model, images, labels, criterion=criterion, enough=search.enough, evaluations=final_search)
    if stop_within_epsilon:
        near = distance(nearest.images - images, threat.norm) <= search.enough
        return torch.where(per_example(near, images), nearest.images, images)
    return nearest.images


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

    def departs(self, step: int) -> bool:
        """Tell whether this step's boundary is linearised where the step departs."""
        if self.linearize == "departing-then-arrived":
            return 2 * step < self.steps
        return self.linearize == "departing"

    def boundary(self, run: Run, *, either_side: bool) -> Boundary:
        """Return the boundary to step to, linearised where the examples are."""
        if self.goal is None:
            return nearest_boundary(
                run,
                norm=self.norm,
                criterion=self.criterion,
                every=self.every_candidate,
                either_side=either_side,
            )
        return boundary_to(run, run.candidates.classes[:, self.goal], self.criterion)

    def departing(self, run: Run, logits: Tensor, nearest: Nearest) -> tuple[Run, Tensor]:
        """Remember who is beyond the boundary, and step back from there; algorithm 1, lines 8 to 13.

        Return where everybody is then, and who stood.
        """
        broken = surely_broken(logits, run.labels, self.criterion)
        nearest.keep(run, broken, self.norm)
        back = run.images + self.step_back * (run.points - run.images)
        return run.at(torch.where(per_example(broken, back), back, run.points)), ~broken

    def step(self, run: Run, normal: Tensor, gap: Tensor) -> Run:
        """Go to the next points: equations (8) to (10), with the extrapolation and the box of algorithm 1."""
        gap_of_images = gap + _inner(normal, run.points - run.images)
        from_points, from_images = project_onto_hyperplane(
            torch.cat([run.points, run.images]), torch.cat([normal] * 2), torch.cat([gap, gap_of_images]), self.norm
        ).chunk(2)
        to_point, to_image = from_points - run.points, from_images - run.images
        ways = distance(to_point, self.norm), distance(to_image, self.norm)
        share = (ways[0] / (ways[0] + ways[1]).clamp_min(1e-12)).clamp_max(self.bias)
        weight = per_example(share, normal)
        moved = (1 - weight) * (run.points + self.extrapolation * to_point)
        return run.at((moved + weight * (run.images + self.extrapolation * to_image)).clamp(0.0, 1.0))


def _walk(run: Run, nearest: Nearest, search: _Search) -> None:
    """Take the steps of one run."""
    interval = _compaction.steps_between_looks(run.points.device)
    for step in range(search.steps):
        if search.departs(step):
            departing, stood = search.departing(run, _logits(run), nearest)
            boundary = search.boundary(departing, either_side=True)
            gap = boundary.gap
        else:
            boundary = search.boundary(run, either_side=False)
            departing, stood = search.departing(run, boundary.logits, nearest)
            # The linearisation holds all along the line.
            gap = boundary.gap + _inner(boundary.normal, run.points - departing.points)
        gap = gap_to_cross(gap, boundary.normal, stood, search.norm)
        run = search.step(departing, boundary.normal, gap)
        if search.enough and step % interval == 0:
            keep = (nearest.distance[run.rows] > search.enough).nonzero().squeeze(1)
            run = run[keep] if len(keep) < len(run.rows) else run
            if len(keep) == 0:
                return
    search.departing(run, _logits(run), nearest)


@torch.no_grad()
def _logits(run: Run) -> Tensor:
    logits: Tensor = run.model(run.points)
    return logits


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
    version=3,
    # Untargeted it looks at one or two boundaries a step, unless it is told to look at all.
    passes="steps * restarts * (min(targets, classes - 1) if targets else candidates if every_candidate else 2)",
    # Looking at who has crossed before the step back costs a forward pass of its own.
    queries='restarts * (min(targets, classes - 1) if targets else 1) * (steps if linearize == "departing" else '
    '(steps + 1) // 2 if linearize == "departing-then-arrived" else 0)',
    norms=("Linf", "L2"),
    minimum_norm=True,
    presets={"fab-t": {"targets": 9}},
)

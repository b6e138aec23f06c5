"""DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, arXiv:1511.04599), in L2 and L-infinity."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._boundaries import Candidates, Nearest, Run, gap_to_cross, nearest_boundary, surely_broken
from robench.catalog import AttackEntry, NonNegativeFloat, NonNegativeInt, PositiveInt
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import per_example, project_onto_hyperplane, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

#: An example leaves after so many rounds that got farther from the image than one before had ended.
_ROUNDS_IN_VAIN = 2


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,  # noqa: ARG001 - nothing is drawn
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 50,
    overshoot: NonNegativeFloat = 0.02,
    candidates: PositiveInt = 10,
    box: Literal["aware", "clamp"] = "aware",
    rounds: PositiveInt = 5,
    every_candidate: bool = False,
    final_search: NonNegativeInt = 3,
) -> Tensor:
    """Step to the nearest linearised boundary until it is crossed; algorithm 2 of the paper (L2), section 3.3 (Linf).

    Three things are not the paper's, and each can be turned off. Steps that are clamped to the box fall short of the
    boundary where pixels are black or white, and come to rest there, so a step is the shortest one *in the box* that
    reaches it. Where the boundary was crossed a new round begins half way back to the image, with a linearisation that
    is nearer to the boundary than the image's; a round that gets farther out than one before had ended is over, too.
    And in the end the straight line back to the image is searched.
    ``box="clamp", rounds=1, final_search=0, every_candidate=True`` is the paper's attack as other libraries have it.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: the norm; its radius is not used.
        random: not used.
        criterion: what counts as broken.
        steps: at most so many in all rounds together.
        overshoot: each step goes this share beyond the boundary.
        candidates: to how many other classes, those of the largest logits at the image, the boundaries are compared;
            at least top-k, at most all others.
        box: `aware` steps to the nearest point of the boundary in the box; `clamp` to the nearest of all, clamped.
        rounds: at most so many; an example leaves after two that got farther from the image than one before had ended.
        every_candidate: compute the gradients of all candidates at every step, instead of those which may be nearest
            by how steep they were when last looked at.
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
    rows = (nearest.distance > 0).nonzero().squeeze(1)
    others = Candidates.nearest(logits, labels, max(candidates, criterion.top_k))
    run = Run(rows, images[rows], images[rows], labels[rows], others[rows], narrowed(model, rows))
    ended, in_vain = torch.zeros_like(labels), torch.zeros_like(labels)
    for step in range(steps + 1 if len(rows) else 0):
        boundary = nearest_boundary(run, norm=threat.norm, criterion=criterion, every=every_candidate, either_side=True)
        broken = surely_broken(boundary.logits, run.labels, criterion)
        nearest.keep(run, broken, threat.norm)
        # A round goes outwards: who stands farther out than what was found before will find nothing nearer in it.
        farther = (nearest.last > nearest.distance)[run.rows]
        over = broken | farther
        ended[run.rows] += over.long()
        in_vain[run.rows] += farther.long()
        goes_on = (ended[run.rows] < rounds) & (in_vain[run.rows] < _ROUNDS_IN_VAIN)
        # Looking makes an accelerator's host wait, but so does choosing boundaries, at every step anyway.
        keep = (~over | goes_on).nonzero().squeeze(1)
        if step == steps or len(keep) == 0:
            break
        begin = torch.where(per_example(over, run.points), (run.points + run.images) / 2, run.points)
        # The linearisation holds all along the line.
        gap = boundary.gap + _inner(boundary.normal, run.points - begin)
        gap = gap_to_cross(gap, boundary.normal, ~over, threat.norm)
        way = _way(begin, boundary.normal, gap, threat.norm, aware=box == "aware")
        run = run.at((begin + (1 + overshoot) * way).clamp(0.0, 1.0))
        run = run[keep] if len(keep) < len(run.rows) else run
    nearest.search_lines(model, images, labels, criterion=criterion, enough=0.0, evaluations=final_search)
    return nearest.images


def _way(points: Tensor, normal: Tensor, gap: Tensor, norm: str, *, aware: bool) -> Tensor:
    """Return the shortest way to the boundary, in the box or not."""
    if aware:
        return project_onto_hyperplane(points, normal, gap, norm) - points
    direction = steepest(normal, norm)
    slope = _inner(direction, normal)
    return direction * per_example(gap / torch.where(slope > 0, slope, 1.0), direction)


def _inner(normal: Tensor, difference: Tensor) -> Tensor:
    return (normal * difference).flatten(1).sum(1)


ENTRY = AttackEntry(
    name="deepfool",
    attack=deepfool,
    summary="steps to the nearest linearised decision boundary until it is crossed",
    source="Moosavi-Dezfooli et al., arXiv:1511.04599, algorithm 2 and section 3.3",
    version=3,
    norms=("L2", "Linf"),
    minimum_norm=True,
)

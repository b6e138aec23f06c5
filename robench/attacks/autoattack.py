"""AutoAttack (Croce and Hein, arXiv:2003.01690, section 6): its attacks run on what those before left standing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks.apgd import apgd
from robench.attacks.fab import fab
from robench.attacks.square import square
from robench.catalog import AttackEntry, PositiveInt
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import per_example, project
from robench.random_streams import RandomStream
from robench.target import credit, narrowed
from robench.threat_model import ThreatModel

#: Of a randomised model, whose answers are averaged (section 6 of the paper, "randomized defenses").
_COPIES = 20
#: Runs towards another class each (section 5, "targeted").
_TARGETS = 9


def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    version: Literal["standard", "plus", "rand"] = "standard",
    steps: PositiveInt = 100,
    queries: PositiveInt = 5000,
) -> Tensor:
    """Run the members one after another; an example leaves for good with the first that breaks it.

    Each member has its own random numbers, `random.at(its name)`, and what it finds of an example depends on nothing
    else: an example stands here only if it stands against every member alone.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: the examples' random numbers.
        criterion: what counts as broken.
        version: `standard` APGD on the cross-entropy, APGD-T, FAB-T, Square; `plus` further restarts, APGD on the DLR
            loss and FAB; `rand`, for randomised models, APGD on both losses over averages of 20 answers.
        steps: of each run of APGD and FAB.
        queries: of Square.

    Returns:
        `(N, C, H, W)` in the ball and the box: a broken image, else the one of the largest margin that a member found.
    """
    result = images.detach().clone()
    with torch.no_grad():
        logits = model(images)
    largest = criterion.margin(logits, labels)
    rows = (~criterion.broken(logits, labels)).nonzero().squeeze(1)
    for name, member in members(version, steps=steps, queries=queries):
        if len(rows) == 0:
            break
        target, x, y = narrowed(model, rows), images[rows], labels[rows]
        found = member(target, x, y, threat=threat, random=random[rows].at(name), criterion=criterion)
        # FAB may come back a rounding error outside the ball.
        found = project(found.detach(), x, threat)
        with torch.no_grad():
            logits = target(found)
        broken, margin = criterion.broken(logits, y), criterion.margin(logits, y)
        better = broken | (margin > largest[rows])
        result[rows] = torch.where(per_example(better, found), found, result[rows])
        largest[rows] = torch.where(better, margin, largest[rows])
        credit(narrowed(target, broken), name)
        rows = rows[~broken]
    return result


def members(version: str, *, steps: int, queries: int) -> list[tuple[str, Callable[..., Tensor]]]:
    """Return the attacks of a version by name, in the order they run in (section 6 and its released code)."""
    apgd_t = partial(apgd, loss="dlr", targets=_TARGETS, steps=steps)
    fab_t = partial(fab, targets=_TARGETS, steps=steps, stop_within_epsilon=True)
    search = partial(square, queries=queries)
    match version:
        case "standard":
            ce = partial(apgd, loss="ce", steps=steps)
            return [("apgd-ce", ce), ("apgd-t", apgd_t), ("fab-t", fab_t), ("square", search)]
        case "plus":
            ce = partial(apgd, loss="ce", steps=steps, restarts=5)
            dlr = partial(apgd, loss="dlr", steps=steps, restarts=5)
            nearest = partial(fab, steps=steps, restarts=5, stop_within_epsilon=True)
            most = [("apgd-ce", ce), ("apgd-dlr", dlr), ("fab", nearest), ("square", search)]
            return [*most, ("apgd-t", apgd_t), ("fab-t", fab_t)]
        case _:
            ce = partial(apgd, loss="ce", steps=steps, eot_copies=_COPIES)
            dlr = partial(apgd, loss="dlr", steps=steps, eot_copies=_COPIES)
            return [("apgd-ce", ce), ("apgd-dlr", dlr)]


ENTRY = AttackEntry(
    name="autoattack",
    attack=autoattack,
    summary="APGD, targeted APGD, FAB and Square, each on what the others left standing",
    source="Croce and Hein, arXiv:2003.01690, section 6",
    version=3,
    passes='steps * (40 if version == "rand" else (20 if version == "plus" else 1) + 2 * min(9, classes - 1))',
    # Square's, and those of FAB at half of its steps.
    queries='0 if version == "rand" else queries + (steps + 1) // 2 * '
    '(min(9, classes - 1) + (5 if version == "plus" else 0))',
    norms=("Linf", "L2"),
    presets={
        "autoattack-plus": {"version": "plus"},
        "autoattack-rand": {"version": "rand"},
    },
)

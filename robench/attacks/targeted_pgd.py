"""Targeted PGD: projected gradient steps towards a class drawn at random (T-PGD of Roth et al., arXiv:1805.08736)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks.pgd import Ascent, ascend, ascend_until_broken
from robench.catalog import AttackEntry, PositiveFloat, PositiveInt
from robench.losses import TOP_1, Criterion, cross_entropy
from robench.lp_geometry import random_start
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

#: Of so many numbers, one draws an example's target.
NUMBERS = 2**20


class _OfPairs(Criterion):
    """A criterion whose labels are pairs `(N, 2)`: the true class, and the number that draws the one aimed at."""

    def broken(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return where the true class is no longer predicted; whether the target is does not count."""
        return super().broken(logits, labels[:, 0])


def targeted_pgd(
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
    stop_when_broken: bool = True,
) -> Tensor:
    """Descend the cross-entropy of a class drawn uniformly among the others, by `steps` projected steepest steps.

    An image counts as broken when it is misclassified as whatever class, as everywhere in robench. It is a weaker
    attack than :func:`robench.attacks.pgd.pgd`: the papers print it to compare with. `apgd-t` aims at the likeliest
    classes instead, one after the other.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: the examples' random numbers (targets, start points).
        criterion: what counts as broken.
        steps: gradient steps per restart.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps.
        restarts: independent runs, each with a target of its own; an example is broken if any of them breaks it.
        start: a uniformly random point of the ball, or the image itself.
        stop_when_broken: False walks all steps whatever the prediction and returns the last iterate, of several
            restarts that of the last: the images of a transfer.

    Returns:
        `(N, C, H, W)` in the ball and the box.
    """
    length = 2.5 * threat.radius / steps if step_size is None else step_size
    ascent = Ascent(threat, steps, length, _towards, _OfPairs(criterion.top_k))
    result = images.detach().clone()
    rows = torch.arange(len(images), device=images.device)
    for restart in range(restarts):
        x, stream, target = images[rows], random[rows], narrowed(model, rows)
        # How many classes there are is seen at the first logits.
        pairs = torch.stack([labels[rows], stream.at("target", restart).integers(NUMBERS)], dim=1)
        begin = random_start(x, threat, stream.at("restart", restart)) if start == "random" else x
        if not stop_when_broken:
            result = ascend(target, begin, x, pairs, ascent=ascent)
            continue
        result[rows], standing = ascend_until_broken(target, begin, x, pairs, ascent=ascent)
        if restart == restarts - 1:
            break
        with torch.no_grad():
            standing &= ~criterion.broken(target(result[rows]), labels[rows])
        rows = rows[standing]
        if len(rows) == 0:
            break
    return result


def drawn_classes(labels: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    """Return a class other than its label for each number in [0, NUMBERS), `(N,)`: uniform up to a millionth."""
    return (labels + 1 + numbers % (num_classes - 1)) % num_classes


def _towards(logits: Tensor, pairs: Tensor) -> Tensor:
    return -cross_entropy(logits, drawn_classes(pairs[:, 0], pairs[:, 1], logits.shape[1]))


ENTRY = AttackEntry(
    name="targeted-pgd",
    attack=targeted_pgd,
    summary="projected gradient steps towards a class drawn at random",
    source="Kurakin et al., arXiv:1611.01236 (random target classes); Roth et al., arXiv:1805.08736 (T-PGD)",
    version=1,
    norms=("Linf", "L2"),
    presets={"targeted-pgd-10": {"steps": 10}, "targeted-pgd-20": {"steps": 20}, "targeted-pgd-40": {"steps": 40}},
)

"""Uniform noise in the ball: the baseline that says what the direction of an attack is worth."""

from __future__ import annotations

from torch import Tensor, nn

from robench.attacks._worst_sample import worst_sample
from robench.catalog import AttackEntry, PositiveInt
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import random_start
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def random_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    samples: PositiveInt = 100,
) -> Tensor:
    """Return the worst of `samples` uniformly random points of the ball, each clamped to the box.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: the examples' random numbers.
        criterion: what counts as broken, and by whose margin the worst is chosen where nothing is.
        samples: points per example; 1 is the random baseline of the structured gradient regularisation paper.

    Returns:
        `(N, C, H, W)` in the ball and the box.
    """
    return worst_sample(
        model,
        images,
        labels,
        samples=samples,
        draw=lambda some, stream: random_start(some, threat, stream),
        random=random,
        criterion=criterion,
    )


ENTRY = AttackEntry(
    name="random-noise",
    attack=random_noise,
    summary="the worst of 100 uniformly random points of the ball",
    source="Roth, Lucchi, Nowozin, Hofmann, arXiv:1805.08736, section 4.1 (random baseline)",
    version=1,
    passes="0",
    queries="samples",
    norms=("Linf", "L2"),
    presets={"random-noise-1": {"samples": 1}},
)

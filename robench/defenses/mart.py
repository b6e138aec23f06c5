"""MART, misclassification aware adversarial training (Wang et al., ICLR 2020, openreview rklOg6EFwS), in L-infinity and
L2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.defenses._ascent import climbed
from robench.losses import cross_entropy, kl_divergence
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: From which the largest other probability is taken, so that its logarithm is finite where that is 1.
_ONE = 1.0001


def mart(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,  # noqa: ARG001  the contract's argument; nothing changes in the course of the training
    threat: ThreatModel,
    beta: NonNegativeFloat = 5.0,
    steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    start: Literal["noise", "random"] = "noise",
    attack_mode: Literal["eval", "train"] = "eval",
) -> LossParts:
    """Return the boosted cross-entropy at the worst images, and `beta` times the divergence of those from the clean
    ones, which counts for more where the clean image is misclassified.

    BCE(x') + beta KL(p(x) || p(x')) (1 - p_y(x)) with BCE(x') = -log p_y(x') - log(1.0001 - max_{j != y} p_j(x')), and
    x' of the largest cross-entropy in the ball: algorithm 1 of the paper, where beta is lambda; the constant as in the
    authors' code. Gradients flow into all predictions, the weight 1 - p_y(x) included.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (start points).
        progress: share of the training that is done.
        threat: norm and radius.
        beta: weight of the divergence.
        steps: gradient steps of the inner maximisation.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps in Linf and
            2 epsilon / steps in L2.
        start: `noise`, as in the authors' code, is the image plus normal noise of standard deviation 0.001, `random` a
            uniformly random point of the ball.
        attack_mode: the network's mode during the inner maximisation. `eval`, as in the authors' code, uses the running
            statistics; `train` normalises by the batch and updates them with the iterates.
    """
    with frozen(model), mode(model, training=attack_mode == "train"):
        adversarial = climbed(
            model,
            images,
            labels,
            threat=threat,
            random=random.at("mart"),
            loss=cross_entropy,
            steps=steps,
            step_size=step_size,
            start=start,
        )
    clean = evaluated(model, images, images)
    worst = evaluated(model, adversarial, images)
    boosted = _boosted_cross_entropy(worst.logits, labels).mean()
    doubt = 1 - clean.logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    divergence = (kl_divergence(clean.logits, worst.logits) * doubt).mean()
    parts = {
        "accuracy": accuracy_of(clean.logits, labels),
        "adversarial_accuracy": accuracy_of(worst.logits, labels),
        "divergence": divergence.detach(),
    }
    return LossParts(boosted + beta * divergence, parts, {"clean": clean, "adversarial": worst})


def _boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p_y - log(1.0001 - the largest other p) of `(N, K)` logits, per example."""
    others = logits.softmax(1).scatter(1, labels[:, None], 0.0)
    return cross_entropy(logits, labels) - torch.log(_ONE - others.amax(1))


ENTRY = DefenseEntry(
    name="mart",
    objective=mart,
    summary="boosted cross-entropy on the worst images; consistency where the clean image is misclassified",
    source="Wang et al., ICLR 2020 (openreview rklOg6EFwS), algorithm 1",
    views=("clean", "adversarial"),
    passes="steps + 1",
    presets={
        # github.com/YisenWang/MART, WRN-34-10 on CIFAR-10, Linf@0.031. (ResNet-18: beta 5.)
        "mart_official": {"beta": 6.0, "steps": 10, "step_size": 0.007},
    },
)

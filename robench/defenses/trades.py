"""TRADES (Zhang et al., arXiv:1901.08573), in L-infinity and L2."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.defenses._ascent import climbed
from robench.losses import PerExampleLoss, cross_entropy, kl_divergence
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def trades(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,  # noqa: ARG001  the contract's argument; nothing changes in the course of the training
    threat: ThreatModel,
    beta: NonNegativeFloat = 6.0,
    inner: Literal["kl", "ce"] = "kl",
    steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    start: Literal["noise", "random"] | None = None,
    attack_mode: Literal["eval", "train"] = "eval",
) -> LossParts:
    """Return the cross-entropy at the images, and `beta` times the divergence from there to the worst images.

    CE(x) + beta KL(p(x) || p(x')) with x' = argmax of the same divergence over the ball: equation (5) and algorithm 1
    of the paper, where beta is 1 / lambda. Gradients flow into both predictions.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (start points).
        progress: share of the training that is done.
        threat: norm and radius.
        beta: weight of robustness against accuracy; 0 is standard training.
        inner: what the inner maximisation ascends: `kl` the divergence from the clean prediction, as in the paper;
            `ce` the cross-entropy with the label.
        steps: gradient steps of the inner maximisation.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps in Linf and,
            as in the paper's code, 2 epsilon / steps in L2.
        start: `noise` is the image plus normal noise of standard deviation 0.001 (at the image itself the divergence
            has no gradient), `random` a uniformly random point of the ball; None: `noise` for kl, `random` for ce.
        attack_mode: the network's mode during the inner maximisation. `eval`, as in the paper's code, uses the running
            statistics; `train` normalises by the batch and updates them with the iterates.
    """
    adversarial = worst_images(
        model,
        images,
        labels,
        random=random.at("trades"),
        threat=threat,
        inner=inner,
        steps=steps,
        step_size=step_size,
        start=start,
        attack_mode=attack_mode,
    )
    return loss_at(model, images, labels, adversarial, beta=beta)


def worst_images(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    threat: ThreatModel,
    inner: Literal["kl", "ce"],
    steps: int,
    step_size: float | None,
    start: Literal["noise", "random"] | None,
    attack_mode: Literal["eval", "train"],
) -> Tensor:
    """Return the inner maximisation's last iterates `(N, C, H, W)`."""
    with frozen(model), mode(model, training=attack_mode == "train"):
        return climbed(
            model,
            images,
            labels,
            threat=threat,
            random=random,
            loss=_divergence_from_now(model, images) if inner == "kl" else cross_entropy,
            steps=steps,
            step_size=step_size,
            start=start or ("noise" if inner == "kl" else "random"),
        )


def loss_at(model: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor, *, beta: float) -> LossParts:
    """Return the loss where `adversarial` are the worst images for `images`."""
    clean = evaluated(model, images, images)
    worst = evaluated(model, adversarial, images)
    natural = cross_entropy(clean.logits, labels).mean()
    divergence = kl_divergence(clean.logits, worst.logits).mean()
    parts = {
        "accuracy": accuracy_of(clean.logits, labels),
        "adversarial_accuracy": accuracy_of(worst.logits, labels),
        "divergence": divergence.detach(),
    }
    return LossParts(natural + beta * divergence, parts, {"clean": clean, "adversarial": worst})


@torch.no_grad()
def _divergence_from_now(model: nn.Module, images: Tensor) -> PerExampleLoss:
    """Return the divergence from what the model predicts now at `images`, as a loss of logits."""
    clean = model(images)
    return lambda logits, _: kl_divergence(clean, logits)


ENTRY = DefenseEntry(
    name="trades",
    objective=trades,
    summary="cross-entropy on clean images, and how far predictions move in the ball",
    source="Zhang et al., 2019, arXiv:1901.08573, equation (5) and algorithm 1",
    views=("clean", "adversarial"),
    passes="steps + 1",
    presets={
        # github.com/yaodongyu/TRADES on CIFAR-10, Linf@0.031.
        "trades_official": {"beta": 6.0, "steps": 10, "step_size": 0.007},
        # What the code of EMR (arXiv:2210.05118) trains as TRADES, on CIFAR-10, Linf@0.0314.
        "trades_emr_official": {
            "beta": 12.0,
            "inner": "ce",
            "steps": 10,
            "step_size": 0.00784,
            "attack_mode": "train",
        },
    },
)

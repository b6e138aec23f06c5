"""Adversarial training with projected gradient descent (Madry et al., arXiv:1706.06083), in L-infinity and L2."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robench.attacks.pgd import pgd
from robench.catalog import DefenseEntry, PositiveFloat, PositiveInt, Probability
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.defenses._ascent import climbed
from robench.defenses._warmup import grown
from robench.losses import cross_entropy
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def pgd_training(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,
    threat: ThreatModel,
    steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    start: Literal["random", "image", "noise"] = "random",
    attack_mode: Literal["eval", "train"] = "train",
    warmup: Probability = 0.0,
) -> LossParts:
    """Return the mean cross-entropy at the images that PGD finds in the ball: equation (2.1) of the paper.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (start points).
        progress: share of the training that is done.
        threat: norm and radius.
        steps: gradient steps of the inner maximisation.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps.
        start: a `random` point of the ball, the `image` itself, or the image plus normal `noise` of standard deviation
            0.001, as in the code of TRADES and what follows it.
        attack_mode: the network's mode during the inner maximisation. `train`, as in the paper's code, normalises by
            the batch and updates running statistics with the iterates; `eval` uses the running statistics.
        warmup: share of the training over which radius and step size grow linearly from 0. At Linf@0.3 on MNIST
            training with the full radius from the start can remain at constant predictions for epochs.
    """
    threat, share = grown(threat, progress=progress, warmup=warmup)
    adversarial = worst_images(
        model,
        images,
        labels,
        random=random.at("pgd_training"),
        threat=threat,
        steps=steps,
        step_size=None if step_size is None else share * step_size,
        start=start,
        attack_mode=attack_mode,
    )
    return loss_at(model, images, labels, adversarial)


def worst_images(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    threat: ThreatModel,
    steps: int,
    step_size: float | None,
    start: Literal["random", "image", "noise"],
    attack_mode: Literal["eval", "train"],
) -> Tensor:
    """Return the inner maximisation's last iterates `(N, C, H, W)`."""
    with frozen(model), mode(model, training=attack_mode == "train"):
        if start == "noise":
            return climbed(
                model,
                images,
                labels,
                threat=threat,
                random=random,
                loss=cross_entropy,
                steps=steps,
                step_size=2.5 * threat.radius / steps if step_size is None else step_size,
                start=start,
            )
        return pgd(
            model,
            images.detach(),
            labels,
            threat=threat,
            random=random,
            steps=steps,
            step_size=step_size,
            start=start,
            stop_when_broken=False,
        )


def loss_at(model: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor) -> LossParts:
    """Return the mean cross-entropy at `adversarial`, the worst images for `images`."""
    worst = evaluated(model, adversarial, images)
    loss = cross_entropy(worst.logits, labels).mean()
    return LossParts(loss, {"accuracy": accuracy_of(worst.logits, labels)}, {"adversarial": worst})


ENTRY = DefenseEntry(
    name="pgd_training",
    objective=pgd_training,
    summary="cross-entropy at the worst images that PGD finds in the ball",
    source="Madry et al., 2018, arXiv:1706.06083, equation (2.1)",
    views=("adversarial",),
    passes="steps",
    presets={
        # Wong, Rice, Kolter, arXiv:2001.03994 (FGSM training), on CIFAR-10, Linf@8/255: one step of 1.25 epsilon from a
        # random point; start=image is the zero initialisation that they compare with.
        "fast_training": {"steps": 1, "step_size": 0.0392156862745098, "start": "random", "attack_mode": "train"},
    },
)

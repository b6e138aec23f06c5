"""Adversarial augmentation by FGSM or PGD: clean and adversarial images in one loss (Goodfellow et al.,
arXiv:1412.6572, section 6). Structured gradient regularisation is compared with it (Roth et al., arXiv:1805.08736,
section 4.1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks.fgsm import fgsm
from robench.attacks.pgd import pgd
from robench.catalog import DefenseEntry, PositiveFloat, PositiveInt, Probability
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.errors import UserError
from robench.losses import cross_entropy
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


class AdversarialAugmentation:
    """(1 - share) CE(x, y) + share CE(x', y), with x' found against the label that the network predicts."""

    def __init__(
        self,
        *,
        attack: Literal["fgsm", "pgd"] = "pgd",
        share: Probability = 0.5,
        attacked_label: Literal["predicted", "true"] = "predicted",
        steps: PositiveInt = 10,
        step_size: PositiveFloat | None = None,
        start: Literal["random", "image"] | None = None,
        attack_mode: Literal["eval", "train"] = "eval",
    ) -> None:
        """Take the parameters; raise UserError where they contradict each other.

        Args:
            attack: what finds x': `fgsm`, one step of length epsilon from the image, or `pgd`.
            share: of the adversarial images in the mixture; the paper does not give it, 0.5 is the convention.
            attacked_label: x' is made against the label that the network `predicts` at the image, so that it does not
                give the true one away (appendix 7.2 of the SGR paper), or against the `true` one. The loss always has
                the true one.
            steps: of pgd.
            step_size: of pgd, in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps.
            start: of pgd: a `random` point of the ball (None), or the `image` itself.
            attack_mode: the network's mode during the attack. `eval` uses the running statistics and no dropout;
                `train` normalises by the batch and updates the statistics with the iterates.
        """
        for name, value in (("step_size", step_size), ("start", start)):
            if attack == "fgsm" and value is not None:
                raise UserError(
                    f"adversarial_augmentation: {name} = {value} belongs to attack=pgd, and attack is fgsm; take "
                    f"--set defense.{name}=none, or attack=pgd"
                )
        self.attack, self.share, self.attacked_label = attack, share, attacked_label
        self.steps, self.step_size, self.start = steps, step_size, start or "random"
        self.attack_mode = attack_mode

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,
        progress: float,  # noqa: ARG002  the contract's argument; nothing changes in the course of the training
        threat: ThreatModel,
    ) -> LossParts:
        """Return the mixture of both losses, averaged over the batch `(N, C, H, W)`; two batches for batch norm."""
        stream = random.at("adversarial_augmentation")
        adversarial = self._attacked(model, images.detach(), labels, threat=threat, random=stream)
        clean = evaluated(model, images, images)
        worst = evaluated(model, adversarial, images)
        losses = [cross_entropy(view.logits, labels).mean() for view in (clean, worst)]
        parts = {
            "accuracy": accuracy_of(clean.logits, labels),
            "adversarial_accuracy": accuracy_of(worst.logits, labels),
        }
        total = (1 - self.share) * losses[0] + self.share * losses[1]
        return LossParts(total, parts, {"clean": clean, "adversarial": worst})

    def _attacked(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, random: RandomStream
    ) -> Tensor:
        with frozen(model), mode(model, training=self.attack_mode == "train"):
            if self.attacked_label == "predicted":
                with torch.no_grad():
                    labels = model(images).argmax(1)
            if self.attack == "fgsm":
                return fgsm(model, images, labels, threat=threat, random=random)
            return pgd(
                model,
                images,
                labels,
                threat=threat,
                random=random,
                steps=self.steps,
                step_size=self.step_size,
                start=self.start,
                stop_when_broken=False,
            )


ENTRY = DefenseEntry(
    name="adversarial_augmentation",
    objective=AdversarialAugmentation,
    summary="cross-entropy at a mixture of clean images and those that FGSM or PGD finds",
    source="Goodfellow, Shlens, Szegedy, 2015, arXiv:1412.6572, section 6; as in Roth et al., 2018, arXiv:1805.08736",
    views=("clean", "adversarial"),
    passes="steps + 2 if attack == 'pgd' else 3",
    presets={
        "fgsm_adv": {"attack": "fgsm"},
        "pgd_adv": {"attack": "pgd"},
    },
)

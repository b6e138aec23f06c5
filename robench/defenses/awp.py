"""AWP, adversarial weight perturbation (Wu, Xia, Wang, arXiv:2004.05884), on adversarial training and on TRADES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from robench.defenses import LossParts, pgd_training, trades
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


class AdversarialWeightPerturbation:
    """The loss at the worst images, and at the worst weights near to the network's.

    Each weight tensor w moves by v = gamma |w| g / |g|, with g the gradient of the loss: one step of the maximisation
    over weights. The loss, and so the gradient that the loop takes, is that of the network with the weights w + v; v
    counts as a constant. The weights themselves stay where they are.
    """

    def __init__(
        self,
        *,
        form: Literal["at", "trades"] = "at",
        gamma: NonNegativeFloat | None = None,
        warmup: Probability = 0.0,
        beta: NonNegativeFloat | None = None,
        inner: Literal["kl", "ce"] | None = None,
        steps: PositiveInt = 10,
        step_size: PositiveFloat | None = None,
        start: Literal["noise", "random"] | None = None,
        attack_mode: Literal["eval", "train"] = "eval",
    ) -> None:
        """Take the parameters; raise UserError where they contradict each other.

        Args:
            form: whose loss it is: adversarial training's (`at`) or that of `trades`.
            gamma: how far weights move, as a share of each tensor's length; 0 not at all. None: 0.01 in `at` and 0.005
                in `trades`, as in the authors' code.
            warmup: share of the training before weights begin to move.
            beta: weight of the divergence in `trades`. None: 6.
            inner: what the inner maximisation of `trades` ascends: `kl` the divergence, `ce` the cross-entropy. None:
                `kl`.
            steps: gradient steps of the inner maximisation, which sees the weights where they are.
            step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps (`trades`
                in L2: 2 epsilon / steps).
            start: `noise` is the image plus normal noise of standard deviation 0.001, `random` a uniformly random point
                of the ball; None: `noise` for the divergence, `random` for the cross-entropy.
            attack_mode: the network's mode during the inner maximisation. `eval` uses the running statistics; `train`
                normalises by the batch and updates them with the iterates.
        """
        for name, value in (("beta", beta), ("inner", inner)):
            if form == "at" and value is not None:
                raise UserError(
                    f"awp: {name} = {value} belongs to form=trades, and form is at; take --set defense.{name}=none, or "
                    "form=trades"
                )
        self.form = form
        self.gamma = {"at": 0.01, "trades": 0.005}[form] if gamma is None else gamma
        self.warmup = warmup
        self.beta = 6.0 if beta is None else beta
        self.inner: Literal["kl", "ce"] = inner or "kl"
        self.steps, self.step_size = steps, step_size
        self.start, self.attack_mode = start, attack_mode

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,
        progress: float,
        threat: ThreatModel,
    ) -> LossParts:
        """Return the loss at the worst images and weights; with gamma = 0 and in the warm-up the plain one."""
        adversarial = self._worst_images(model, images, labels, random=random, threat=threat)
        if self.gamma == 0 or progress < self.warmup:
            return self._loss(model, images, labels, adversarial)
        # What is evaluated to find the weights shall not move running statistics.
        untouched = WithTensors(model, {name: buffer.clone() for name, buffer in model.named_buffers()})
        plain = self._loss(untouched, images.detach(), labels, adversarial)
        weights = _weights(model)
        gradients = torch.autograd.grad(plain.total, list(weights.values()))
        moved = {
            name: weight + self._perturbation(weight.detach(), gradient)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        worst = self._loss(WithTensors(model, moved), images, labels, adversarial)
        return LossParts(worst.total, {**worst.parts, "plain_loss": plain.total.detach()}, worst.views)

    def _worst_images(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: RandomStream, threat: ThreatModel
    ) -> Tensor:
        if self.form == "at":
            return pgd_training.worst_images(
                model,
                images,
                labels,
                random=random.at("pgd_training"),
                threat=threat,
                steps=self.steps,
                step_size=self.step_size,
                start=self.start or "random",
                attack_mode=self.attack_mode,
            )
        return trades.worst_images(
            model,
            images,
            labels,
            random=random.at("trades"),
            threat=threat,
            inner=self.inner,
            steps=self.steps,
            step_size=self.step_size,
            start=self.start,
            attack_mode=self.attack_mode,
        )

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor) -> LossParts:
        if self.form == "at":
            return pgd_training.loss_at(model, images, labels, adversarial)
        return trades.loss_at(model, images, labels, adversarial, beta=self.beta)

    def _perturbation(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return v: up the loss, gamma times as long as the weight; 0 where the loss does not depend on it."""
        length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
        perturbation: Tensor = self.gamma * weight.norm() * (gradient / length)
        return perturbation


class WithTensors(nn.Module):
    """A network some of whose weights or buffers are others; gradients reach what those were made of."""

    def __init__(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.tensors = network, dict(tensors)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = functional_call(self.network, self.tensors, (images,))
        return logits


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what moves, as in the authors' code: weights of layers, no biases and no scales of normalisations."""
    return {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1 and p.requires_grad}


ENTRY = DefenseEntry(
    name="awp",
    objective=AdversarialWeightPerturbation,
    summary="adversarial training or TRADES, at the worst weights near to the network's",
    source="Wu, Xia, Wang, NeurIPS 2020 (arXiv:2004.05884), algorithm 1",
    views=("adversarial",),
    passes="steps + 1 if form == 'at' else steps + 3",
    presets={
        # github.com/csdongxian/AWP, on CIFAR-10, Linf@8/255: PreAct ResNet-18, and WRN-34-10 from epoch 10 of 200 on.
        "awp_at_official": {"form": "at", "gamma": 0.01, "steps": 10, "step_size": 0.00784313725490196},
        "awp_trades_official": {
            "form": "trades",
            "gamma": 0.005,
            "warmup": 0.045,
            "beta": 6.0,
            "steps": 10,
            "step_size": 0.00784313725490196,
        },
    },
)

"""MAIL, margin-aware instance reweighting learning (Wang et al., "Probabilistic Margins for Instance Reweighting in
Adversarial Training", arXiv:2106.07904), on adversarial training and on TRADES.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from robench.defenses import LossParts
from robench.defenses.pgd_training import pgd_training
from robench.defenses.trades import trades
from robench.errors import UserError
from robench.losses import cross_entropy, kl_divergence
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


class MarginAwareReweighting:
    """Adversarial training or TRADES in which images near to the boundary weigh more.

    An image's probabilistic margin is PM = p_y - max_{j != y} p_j at its adversarial image x', and its weight
    w = sigmoid(slope (bias - PM)), a constant:

        mean of w CE(x'),    or    mean of CE(x), plus beta times the mean of w KL(p(x) || p(x')).
    """

    def __init__(
        self,
        *,
        form: Literal["at", "trades"] = "at",
        slope: NonNegativeFloat | None = None,
        bias: float | None = None,
        scale: Literal["three", "batch"] = "three",
        burn_in: Probability = 0.74,
        burn_in_form: Literal["at", "same"] = "at",
        beta: NonNegativeFloat | None = None,
        inner: Literal["kl", "ce"] | None = None,
        steps: PositiveInt = 10,
        step_size: PositiveFloat | None = None,
        start: Literal["noise", "random"] | None = None,
        attack_mode: Literal["eval", "train"] = "eval",
    ) -> None:
        """Take the parameters; raise UserError where they contradict each other.

        Args:
            form: what is reweighted: the cross-entropy of adversarial training (`at`) or the divergence of `trades`.
            slope: how sharply weights fall with the margin; 0 weighs all alike. None: 30 in `at`, 5 in `trades`.
            bias: the margin at half the largest weight. None: -0.07 in `at` and 0.05 in `trades`, as in the authors'
                code; the text of EMR (arXiv:2210.05118) has 0.07 in `at`.
            scale: the weights are multiplied by `three`, as in the authors' code, or by what makes their mean over the
                `batch` 1.
            burn_in: share of the training before weights begin: 74 of 100 epochs.
            burn_in_form: what is trained until then: adversarial training (`at`), or the `same` as afterwards without
                weights.
            beta: weight of the divergence in `trades`. None: 5.
            inner: what the inner maximisation of `trades` ascends: `kl` the divergence, `ce` the cross-entropy. None:
                `kl`.
            steps: gradient steps of the inner maximisation.
            step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps (`trades`
                in L2: 2 epsilon / steps).
            start: where the inner maximisation begins: at the image plus normal `noise` of standard deviation 0.001, as
                in the authors' code, or at a `random` point of the ball. None: at the noise where it ascends the
                divergence, at random where it ascends the cross-entropy.
            attack_mode: the network's mode during the inner maximisation. `eval` uses the running statistics; `train`
                normalises by the batch and updates them with the iterates.
        """
        for name, value in (("beta", beta), ("inner", inner)):
            if form == "at" and value is not None:
                raise UserError(
                    f"mail: {name} = {value} belongs to form=trades, and form is at; take --set defense.{name}=none, "
                    "or form=trades"
                )
        self.form = form
        self.slope = {"at": 30.0, "trades": 5.0}[form] if slope is None else slope
        self.bias = {"at": -0.07, "trades": 0.05}[form] if bias is None else bias
        self.scale = scale
        self.burn_in = burn_in
        self.burn_in_form = form if burn_in_form == "same" else burn_in_form
        self.beta = 5.0 if beta is None else beta
        self.inner = inner or "kl"
        self.steps, self.step_size, self.start, self.attack_mode = steps, step_size, start, attack_mode

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
        """Return the reweighted loss, or in the burn-in the plain one."""
        weighs = progress >= self.burn_in
        form = self.form if weighs else self.burn_in_form
        plain = self._plain(form, model, images, labels, random=random, progress=progress, threat=threat)
        if not weighs:
            return plain
        worst = plain.views["adversarial"].logits
        weights = self._weights(worst, labels)
        if form == "at":
            total = (weights * cross_entropy(worst, labels)).mean()
        else:
            clean = plain.views["clean"].logits
            divergence = (weights * kl_divergence(clean, worst)).mean()
            total = cross_entropy(clean, labels).mean() + self.beta * divergence
        return LossParts(total, {**plain.parts, "weight": weights.mean()}, plain.views)

    def _plain(self, form: str, model: nn.Module, images: Tensor, labels: Tensor, **supplied: object) -> LossParts:
        """Return the loss without weights, and what it evaluated."""
        options = {"steps": self.steps, "step_size": self.step_size, "attack_mode": self.attack_mode, **supplied}
        if form == "at":
            return pgd_training(model, images, labels, start=self.start or "random", **options)  # type: ignore[arg-type]
        return trades(
            model,
            images,
            labels,
            beta=self.beta,
            inner=self.inner,
            start=self.start,
            **options,  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def _weights(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weights `(N,)` by the probabilistic margins of adversarial `(N, K)` logits."""
        probabilities = logits.float() if logits.dtype in {torch.float16, torch.bfloat16} else logits
        probabilities = probabilities.softmax(1)
        true = probabilities.gather(1, labels[:, None]).squeeze(1)
        largest_other = probabilities.scatter(1, labels[:, None], 0.0).amax(1)
        weights = torch.sigmoid(self.slope * (largest_other - true + self.bias))
        # Where a whole batch is far from the boundary its weights may all vanish.
        by_batch = weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
        return 3 * weights if self.scale == "three" else weights / by_batch


ENTRY = DefenseEntry(
    name="mail",
    objective=MarginAwareReweighting,
    summary="adversarial training or TRADES in which images near to the boundary weigh more",
    source="Wang et al., 2021, arXiv:2106.07904; weights as in the authors' code",
    views=("adversarial",),
    passes="steps if form == 'at' else steps + 1",
    presets={
        # EMR (arXiv:2210.05118), appendix A, on CIFAR-10, Linf@0.031; signs and inner maximisation as in its code.
        "mail_at_emr": {"form": "at", "slope": 30.0, "bias": -0.07, "step_size": 0.00784, "attack_mode": "train"},
        "mail_trades_emr": {
            "form": "trades",
            "slope": 5.0,
            "bias": 0.05,
            "beta": 5.0,
            "step_size": 0.00784,
            "attack_mode": "train",
        },
        # The same by the letter of the appendix.
        "mail_at_emr_paper": {"form": "at", "slope": 30.0, "bias": 0.07, "step_size": 0.00784},
        # github.com/QizhouWang/MAIL: the loss that is reweighted is also that of the burn-in.
        "mail_at_official": {"form": "at", "burn_in": 0.75, "step_size": 0.007, "start": "noise"},
        "mail_trades_official": {"form": "trades", "burn_in": 0.75, "burn_in_form": "same", "step_size": 0.007},
    },
)

"""L-Softmax, large-margin softmax (Liu, Wen, Yu, Yang, arXiv:1612.02295), in any objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveInt
from robench.defenses import LossParts, last_layer
from robench.defenses._margins import classified, surcharge
from robench.errors import UserError
from robench.random_streams import RandomStream


class LargeMarginSoftmax:
    """The label's logit |W_y| |x| cos(theta_y) must win although the angle counts `margin` times.

    What is added here turns the objective's cross-entropy into that of logits with

        (lambda f_y + |W_y| |x| psi(theta_y)) / (1 + lambda)

    in the place of f_y, where psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k + 1) pi / m], and
    lambda = max(lambda_min, lambda_start (1 + gamma t)^(-power)) after t steps. The network that is deployed has its
    plain logits.
    """

    def __init__(
        self,
        *,
        margin: PositiveInt = 4,
        lambda_start: NonNegativeFloat = 0.0,
        gamma: NonNegativeFloat = 0.0,
        power: NonNegativeFloat = 1.0,
        lambda_min: NonNegativeFloat = 0.0,
        at: Literal["clean", "adversarial"] | None = None,
    ) -> None:
        """Take the parameters.

        Args:
            margin: m; 1 leaves the objective as it is.
            lambda_start: lambda at the first step; 0 (the authors: enough on MNIST) begins with the full margin.
            gamma: how fast lambda falls with the steps.
            power: how fast it falls in the end.
            lambda_min: below which it does not fall.
            at: the images whose cross-entropy gets the margin. None: the clean ones where the objective evaluates them
                (standard training, and TRADES), else the adversarial ones.
        """
        self.margin, self.at = margin, at
        self.lambda_start, self.gamma, self.power, self.lambda_min = lambda_start, gamma, power, lambda_min
        self.step = 0

    def check(self, model: nn.Module) -> None:
        """Raise UserError for a network whose last layer is not linear, or has a bias."""
        last = last_layer(model)
        if not isinstance(last, nn.Linear) or last.bias is not None:
            raise UserError(
                "regularizer l_softmax: the margin is one between angles, and this network does not end in a linear "
                "layer without bias; take an architecture with such a head, such as small_cnn_unbiased, or --set "
                "architecture.name=with_head --set architecture.network=NAME --set architecture.head=unbiased"
            )

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,  # noqa: ARG002  the contract's argument; the objective has evaluated them
        labels: Tensor,
        *,
        random: RandomStream,  # noqa: ARG002  likewise; nothing is random here
        progress: float,  # noqa: ARG002  likewise
        base: LossParts,
    ) -> LossParts:
        """Return by how much the margin raises the cross-entropy."""
        self.check(model)
        view = classified(base, self.at, name="l_softmax")
        last = last_layer(model)
        assert view.features is not None
        assert isinstance(last, nn.Linear)
        with torch.autocast(labels.device.type, enabled=False):
            logits, features = view.logits.to(last.weight.dtype), view.features.to(last.weight.dtype)
            true = logits.gather(1, labels[:, None]).squeeze(1)
            length = last.weight[labels].norm(dim=1) * features.norm(dim=1)
            narrowed = length * psi(true / length.clamp_min(torch.finfo(length.dtype).tiny), self.margin)
            weight = self._lambda()
            mixed = (weight * true + narrowed) / (1 + weight)
            loss = surcharge(logits.scatter(1, labels[:, None], mixed[:, None]), logits, labels)
        self.step += 1
        return LossParts(loss, {"l_softmax": loss.detach()})

    def _lambda(self) -> float:
        falling: float = self.lambda_start * (1 + self.gamma * self.step) ** -self.power
        return max(self.lambda_min, falling)

    def state_dict(self) -> dict[str, Tensor]:
        """Return how many steps it has seen."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.step = int(state["step"])


def psi(cosine: Tensor, margin: int) -> Tensor:
    """Return (-1)^k cos(m theta) - 2k of cos(theta), theta in [k pi / m, (k + 1) pi / m]; it falls in theta.

    cos(m theta) is Chebyshev's polynomial of cos(theta), which is smooth where the angle itself is not.
    """
    cosine = cosine.clamp(-1, 1)
    before, multiple = torch.ones_like(cosine), cosine
    for _ in range(margin - 1):
        before, multiple = multiple, 2 * cosine * multiple - before
    bounds = [math.cos(k * math.pi / margin) for k in range(1, margin)]
    k = sum(((cosine.detach() < bound).to(cosine.dtype) for bound in bounds), torch.zeros_like(cosine.detach()))
    return (1 - 2 * (k % 2)) * multiple - 2 * k


ENTRY = DefenseEntry(
    name="l_softmax",
    objective=LargeMarginSoftmax,
    summary="a margin between angles in the cross-entropy: the label's angle counts several times",
    source="Liu et al., ICML 2016 (arXiv:1612.02295), equations (4) to (6)",
    role="regularizer",
    presets={
        # The example of github.com/wy1iu/LargeMargin_Softmax_Loss: lambda falls from 1000.
        "l_softmax_official": {
            "margin": 4,
            "lambda_start": 1000.0,
            "gamma": 0.000025,
            "power": 35.0,
            "lambda_min": 0.0,
        },
    },
)

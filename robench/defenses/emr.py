"""Effective margin regularisation (EMR, arXiv:2210.05118), exact and approximate, added to any objective."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat
from robench.classifier import mode
from robench.defenses import LossParts
from robench.defenses._piecewise_linear import PiecewiseLinear
from robench.errors import UserError
from robench.random_streams import RandomStream


class EffectiveMarginRegularizer:
    """The squared length of the logits' gradients by the image.

    A network of piecewise linear layers is f(x) = W x + b around an image, and the distance to its nearest boundary is
    the gap of two logits over the distance of the two rows of W (equation 3): shorter rows make larger margins.
    """

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 1.0,
        form: Literal["approximate", "exact"] = "approximate",
        temperature: PositiveFloat | None = None,
        at: Literal["clean", "adversarial"] | None = None,
        reduction: Literal["paper", "official"] = "paper",
        follows_learning_rate: bool = True,
    ) -> None:
        """Set it up; raise UserError for a temperature of the exact form.

        Args:
            strength: lambda, the weight of the penalty.
            form: `exact` sums the squared lengths of all rows (equation 5), one backward pass for each class.
                `approximate` takes that of one weighted mean of the rows (equation 7, algorithm 1), one pass in all.
            temperature: t of the mean's weights softmax(logits / t), which are constants: towards 0 the row of the
                predicted class, towards infinity the plain mean. None: 1, in the approximate form.
            at: the images where it is taken. None: the adversarial ones where the objective trains on such, else the
                clean ones.
            reduction: `paper` averages over the batch. `official`, as the authors' code, takes the gradient of the
                batch's mean and sums: the batch size times smaller, which published strengths for large networks are
                for.
            follows_learning_rate: the strength falls as the learning rate does (section 5.1).
        """
        if form == "exact" and temperature is not None:
            raise UserError(
                f"regularizer emr: temperature = {temperature:g} weighs the rows of the approximate form and form is "
                "exact; take --set regularizers.emr.temperature=none, or form=approximate"
            )
        self.strength = strength
        self.form = form
        self.temperature = 1.0 if temperature is None else temperature
        self.at = at
        self.reduction = reduction
        self.follows_learning_rate = follows_learning_rate

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,  # noqa: ARG002  the contract's argument; all classes' rows count
        *,
        random: RandomStream,  # noqa: ARG002  likewise; nothing is random here
        progress: float,  # noqa: ARG002  likewise
        learning_rate: float,
        base: LossParts,
    ) -> LossParts:
        """Return the penalty, times its strength; `learning_rate` is its share of the recipe's.

        The images are evaluated once more, in eval mode: with running statistics of batch norms they do not depend on
        each other, so that the gradient of a sum over the batch is the gradient of each, and the network is locally
        linear (section 4). Running statistics stay where they are.
        """
        at = self.at or ("adversarial" if "adversarial" in base.views else "clean")
        points = base.views["adversarial"].images if at == "adversarial" else images
        points = points.detach().requires_grad_()
        with mode(model, training=False), PiecewiseLinear():
            logits = model(points)
        penalty = self._squared_rows(logits, points).mean()
        if self.reduction == "official":
            penalty = penalty / len(images)
        strength = self.strength * (learning_rate if self.follows_learning_rate else 1.0)
        return LossParts(strength * penalty, {"emr": penalty.detach()})

    def _squared_rows(self, logits: Tensor, points: Tensor) -> Tensor:
        """Return the squared length of each example's row, or the sum of those of all rows: `(N,)`."""
        if self.form == "exact":
            rows = logits.T
        else:
            weights = (logits.detach() / self.temperature).softmax(1)
            rows = (weights * logits).sum(1)[None]
        gradients = (torch.autograd.grad(row.sum(), points, create_graph=True)[0] for row in rows)
        return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0)


ENTRY = DefenseEntry(
    name="emr",
    objective=EffectiveMarginRegularizer,
    summary="short gradients of the logits by the image: larger effective margins",
    source="Liu and Chan (EMR), 2022, arXiv:2210.05118, equations (5) and (7), algorithm 1",
    role="regularizer",
    passes="2 if form == 'approximate' else 2 * classes",
    presets={
        "emr_exact": {"form": "exact"},
        # github.com/ziquanliu/Effective_Margin_Reg, WRN-34-10: where code and paper differ, the code.
        "emr_official": {"strength": 3.0, "temperature": 40.0, "reduction": "official"},
    },
)

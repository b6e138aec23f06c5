"""Input gradient regularisation (IGR; Ross and Doshi-Velez, arXiv:1711.09404), added to any objective."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat
from robench.defenses import LossParts, seen
from robench.defenses.gn import gradient_of_log_likelihood
from robench.errors import UserError
from robench.random_streams import RandomStream


class InputGradientRegularizer:
    """The squared length of the loss's gradient by the image: `strength` |gradient of l|^2, averaged over the batch.

    Where l is the cross-entropy this is twice :mod:`robench.defenses.gn` at the same strength, and its place depends on
    the objective.
    """

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 1.0,
        of: Literal["ce", "loss"] = "ce",
        at: Literal["clean", "adversarial"] | None = None,
    ) -> None:
        """Take the parameters; raise UserError where they contradict each other.

        Args:
            strength: lambda, on the [0, 1] scale of pixels.
            of: `ce` is the cross-entropy of the label; `loss` all that the objective makes of an image, whose
                perturbation moves along with it: the gradients at its clean and its adversarial form add up.
            at: where `ce` is taken. None: at the clean images where the objective evaluates them (standard training,
                and TRADES, whose cross-entropy is taken there), else at the adversarial ones.
        """
        if of == "loss" and at is not None:
            raise UserError(
                f"igr: at = {at} says where of=ce is taken, and of is loss; take --set regularizers.igr.at=none, or "
                "of=ce"
            )
        self.strength, self.of, self.at = strength, of, at

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,  # noqa: ARG002  the contract's argument; nothing is random here
        progress: float,  # noqa: ARG002  likewise
        base: LossParts,
    ) -> LossParts:
        """Return the penalty, times its strength. It shares the objective's graph; each image has its own gradient."""
        if self.of == "loss":
            gradient = _gradient_of_everything(base, len(images))
        else:
            only_adversarial = "adversarial" in base.views and "clean" not in base.views
            at = self.at or ("adversarial" if only_adversarial else "clean")
            gradient = gradient_of_log_likelihood(seen(base, at, model, images), labels)
        penalty = gradient.square().flatten(1).sum(1).mean()
        return LossParts(self.strength * penalty, {"igr": penalty.detach()})


def _gradient_of_everything(base: LossParts, count: int) -> Tensor:
    """Return the gradient of each image's own loss `(N, C, H, W)`, summed over the views of it."""
    if not base.views:
        raise UserError("igr: of = loss, but this objective shows none of its images; take of=ce")
    # The batch's mean, times N, is the sum of what each image contributes.
    leaves = [view.images for view in base.views.values()]
    gradients = torch.autograd.grad(count * base.total, leaves, create_graph=True)
    return torch.stack(gradients).sum(0)


ENTRY = DefenseEntry(
    name="igr",
    objective=InputGradientRegularizer,
    summary="penalty on the squared length of the loss's gradient by the image",
    source="Ross and Doshi-Velez, 2018, arXiv:1711.09404; as in EMR (Liu and Chan, 2022, arXiv:2210.05118)",
    role="regularizer",
    differentiates_images=True,
    passes="2",
)

"""What losses with a margin have in common: the cross-entropy of an objective, made harder."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robench.defenses import LossParts, View
from robench.errors import UserError
from robench.losses import cross_entropy


def classified(base: LossParts, at: Literal["clean", "adversarial"] | None, *, name: str) -> View:
    """Return the images whose cross-entropy the objective took; with `at` None the clean ones, where it looked at such.

    Raises UserError where it shows no such images.
    """
    at = at or ("clean" if "clean" in base.views else "adversarial")
    if at not in base.views:
        raise UserError(
            f"regularizer {name}: this objective shows none of its {at} images, whose cross-entropy could have a "
            "margin; take defense.name=standard, pgd_training or trades"
        )
    return base.views[at]


def surcharge(harder: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the mean cross-entropy of the logits `harder` is above that of `logits`."""
    return (cross_entropy(harder, labels) - cross_entropy(logits, labels)).mean()

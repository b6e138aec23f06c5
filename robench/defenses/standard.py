"""Standard training: the cross-entropy of the images as they are."""

from __future__ import annotations

from torch import Tensor, nn

from robench.catalog import DefenseEntry
from robench.defenses import LossParts
from robench.losses import cross_entropy
from robench.random_streams import RandomStream


def standard(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,  # noqa: ARG001  the contract's argument; nothing is random here
    progress: float,  # noqa: ARG001  likewise
) -> LossParts:
    """Return the mean cross-entropy over the batch."""
    logits = model(images)
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return LossParts(cross_entropy(logits, labels).mean(), {"accuracy": accuracy})


ENTRY = DefenseEntry(
    name="standard",
    objective=standard,
    summary="cross-entropy on clean images: no defense",
    source="maximum likelihood",
)

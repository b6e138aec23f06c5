"""Standard training: the cross-entropy of the images as they are."""

from __future__ import annotations

from torch import Tensor, nn

from robench.catalog import DefenseEntry
from robench.defenses import LossParts, accuracy_of, evaluated
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
    clean = evaluated(model, images, images)
    loss = cross_entropy(clean.logits, labels).mean()
    return LossParts(loss, {"accuracy": accuracy_of(clean.logits, labels)}, {"clean": clean})


ENTRY = DefenseEntry(
    name="standard",
    objective=standard,
    summary="cross-entropy on clean images: no defense",
    source="maximum likelihood (Fisher, 1922)",
)

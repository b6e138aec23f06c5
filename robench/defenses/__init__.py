"""Defenses: what training minimises. One file each; :class:`robench.catalog.DefenseEntry` states the contract.

An objective is called once per batch, inside the training loop's autocast, with the network in training mode::

    objective(model, images, labels, *, random, progress, **parameters) -> LossParts

`images` `(N, C, H, W)` in [0, 1] and `labels` `(N,)` int64 are the augmented batch; `random` holds the examples'
numbers for this epoch; `progress` is the share of the training that is done, in [0, 1). An objective that takes
`threat` is given the recipe's. The loop differentiates `total` and takes the step; an objective leaves the images and
the network's mode as they were. Dropout draws from torch's global generator, which the loop seeds for every step.

A class is constructed once with its parameters and then called the same way. If it has `state_dict()` (tensors by name)
and `load_state_dict(state)`, its state is saved in checkpoints and comes back on resume. One objective may call another
with the same arguments: the parts add up by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossParts:
    """What one batch gives."""

    total: Tensor
    """Scalar, differentiable: the loss averaged over the batch."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars for the training log, averaged over the batch; `accuracy` is that on the images trained on."""

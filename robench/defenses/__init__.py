"""Defenses: what training minimises. One file each; :class:`robench.catalog.DefenseEntry` states the contract.

An objective is called once per batch, inside the training loop's autocast, with the network in training mode::

    objective(model, images, labels, *, random, progress, **parameters) -> LossParts

`images` `(N, C, H, W)` in [0, 1] and `labels` `(N,)` int64 are the augmented batch; `random` holds the examples'
numbers for this epoch, and in `random.ids` their positions in the training split; `progress` is the share of the
training that is done, in [0, 1). An objective that takes `threat` is given the recipe's, one that takes `learning_rate`
the share of the recipe's learning rate that this step takes. The loop differentiates `total` and takes the step; an
objective leaves the images, the network's weights and its mode as they were. Dropout draws from torch's global
generator, which the loop seeds for every step.

A class is constructed once with its parameters (and `teacher`, a frozen model in eval mode, if it takes one) and then
called the same way. If it has `state_dict()` (tensors by name) and `load_state_dict(state)`, its state is saved in
snapshots, comes back on resume, and stands beside the trained weights (`defense.safetensors`); what it remembers of an
example, it keeps in there under the example's id. One objective may call another with the same arguments.

What is deployed is the network of the recipe's architecture, its last layer included. A class that cannot train every
network has `check(model)`, which is called before the first step and raises UserError for those that it cannot.

A class that trains a second network takes `new_network`, a function that builds an untrained one for the recipe's data
by an architecture's name, and keeps it as `companion`: the recipe's optimiser takes the steps of that network, too,
each weight with its own momentum. Its weights belong into `state_dict()`.

If a class has `finish_round(model)`, a recipe may have several `rounds` of all its epochs, whose number the constructor
is given if it takes `num_rounds`. At the end of each but the last, `model` has the weights that the round selected; the
next round begins at them where the recipe names a `start`, else with random weights. What is made of `model` must be a
copy. On resume `finish_round` is called once before `load_state_dict`, with a model of the same network.

A regularizer is called after the objective, with the same arguments and `base`, what the objective returned; the loss
is the sum. What the objective evaluated stands in `base.views`, so that nothing is evaluated twice: :func:`seen` takes
it from there. Where a regularizer differentiates by images (`differentiates_images`), the batch requires a gradient,
and what an objective evaluates must, too: :func:`evaluated` sees to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class View:
    """Images that were evaluated in this step, and the graph that led to their logits."""

    images: Tensor
    """(N, C, H, W): a leaf; it requires a gradient where a regularizer differentiates by images."""
    logits: Tensor
    """(N, K), of the network in training mode."""
    features: Tensor | None = None
    """(N, F): what the network's last layer was given; None where its last module takes no part."""


@dataclass(frozen=True)
class LossParts:
    """What one batch gives."""

    total: Tensor
    """Scalar, differentiable: the loss averaged over the batch."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars for the training log, averaged over the batch; `accuracy` is that on the images trained on."""
    views: Mapping[str, View] = field(default_factory=dict)
    """What was evaluated: `clean`, `adversarial`."""


def evaluated(model: nn.Module, points: Tensor, images: Tensor) -> View:
    """Return the logits at `points`; they require a gradient where the batch's `images` do."""
    leaf = points if points is images else points.detach().requires_grad_(images.requires_grad)
    given: list[Tensor] = []
    watching = last_layer(model).register_forward_pre_hook(lambda _, arguments: given.extend(arguments[:1]))
    try:
        logits = model(leaf)
    finally:
        watching.remove()
    return View(leaf, logits, given[-1] if given else None)


def last_layer(model: nn.Module) -> nn.Module:
    """Return the network's last module, which makes the logits wherever networks are built in the order they run."""
    return list(model.modules())[-1]


def seen(base: LossParts, at: Literal["clean", "adversarial"], model: nn.Module, images: Tensor) -> View:
    """Return what the objective evaluated at the clean or the adversarial images; the clean ones are looked at now
    where it did not look at them.
    """
    return base.views[at] if at in base.views else evaluated(model, images, images)


def accuracy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of the batch that is classified correctly, detached."""
    return (logits.detach().argmax(1) == labels).float().mean()

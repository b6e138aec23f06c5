"""Gradient-norm regularisation (GN): structured gradient regularisation with the identity for covariance
(Roth et al., arXiv:1805.08736, section 4.1; :mod:`robench.defenses.sgr`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat
from robench.defenses import LossParts, View, seen
from robench.errors import UserError
from robench.random_streams import RandomStream


def gn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,  # noqa: ARG001  the contract's argument; nothing is random here
    progress: float,  # noqa: ARG001  likewise
    base: LossParts,
    strength: NonNegativeFloat = 1.0,
    at: Literal["clean", "adversarial"] = "clean",
    gradient_by: Literal["pixels", "standardized"] = "pixels",
) -> LossParts:
    """Return `strength` times half the squared norm of the gradient of log phi_y by the image, averaged over the batch.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1]: a leaf that requires a gradient.
        labels: `(N,)` int64.
        random: unused.
        progress: unused.
        base: what the objective evaluated.
        strength: lambda of equation (11); a variance on the [0, 1] scale of pixels.
        at: where the gradient is taken.
        gradient_by: by the `pixels` in [0, 1], or by what the network standardises them to (at the price of a pass).
    """
    view = seen(base, at, model, images)
    gradient = gradient_of_log_likelihood(view if gradient_by == "pixels" else standardized(model, view.images), labels)
    loss = strength * 0.5 * gradient.square().flatten(1).sum(1).mean()
    return LossParts(loss, {"gn_loss": loss.detach()})


def gradient_of_log_likelihood(view: View, labels: Tensor) -> Tensor:
    """Return the gradient of log phi_y(x) by each image, `(N, C, H, W)`, through which the weights can be reached.

    phi is the softmax of the logits. The batch's *sum* is differentiated: an image's gradient does not shrink with the
    size of the batch.
    """
    log_likelihood = torch.log_softmax(view.logits, dim=1).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_likelihood, view.images, create_graph=True)
    return gradient


def standardized(model: nn.Module, images: Tensor) -> View:
    """Evaluate `images` once more; return them as the network's last standardising layer hands them on.

    Raises UserError where the network has none.
    """
    handed_on: list[Tensor] = []
    layers = [layer for layer in model.modules() if getattr(layer, "standardizes", False)]
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, output: handed_on.append(output)) for layer in layers]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not handed_on:
        raise UserError(
            "gradient_by = standardized, but the network standardises nothing; give the recipe a normalization, take "
            "architecture sgr_cnn, or gradient_by=pixels"
        )
    return View(handed_on[-1], logits)


ENTRY = DefenseEntry(
    name="gn",
    objective=gn,
    summary="penalty on the squared norm of the loss's gradient by the image",
    source="Roth, Lucchi, Nowozin, Hofmann, 2018, arXiv:1805.08736, section 4.1: equation (11) with the identity",
    role="regularizer",
    differentiates_images=True,
    passes="2",
)

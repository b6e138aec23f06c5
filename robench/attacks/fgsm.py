"""Fast gradient sign method (Goodfellow et al., arXiv:1412.6572) and its L2 form, the fast gradient method."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import AttackEntry
from robench.losses import TOP_1, Criterion, loss_named
from robench.lp_geometry import project, steepest
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    loss: Literal["ce", "margin", "dlr"] = "ce",
) -> Tensor:
    """Take one step of length epsilon along the steepest ascent of the loss, from the image itself.

    Linf: ``x + epsilon sign(grad)``; L2: ``x + epsilon grad / |grad|``; then clamped to [0, 1] (section 4).

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: unused, the method is deterministic.
        criterion: what counts as broken (it enters the margin).
        loss: `ce` cross-entropy, `margin` Carlini and Wagner's, `dlr` the difference of logits ratio.

    Returns:
        `(N, C, H, W)` in the ball and the box.
    """
    del random
    start = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_named(loss, criterion, model)(model(start), labels).sum(), start)
    return project(images + threat.radius * steepest(gradient, threat.norm), images, threat)


ENTRY = AttackEntry(
    name="fgsm",
    attack=fgsm,
    summary="one step of length epsilon along the gradient's sign (Linf) or direction (L2: FGM)",
    source="Goodfellow, Shlens, Szegedy, arXiv:1412.6572, section 4",
    version=1,
    norms=("Linf", "L2"),
)

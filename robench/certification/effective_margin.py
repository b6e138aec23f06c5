"""Effective margins: the linearised L2 distance to the nearest decision boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from robench.catalog import CertificateEntry
from robench.certification import Certified, NoisyModel
from robench.lp_geometry import distance


def effective_margin(model: NoisyModel, images: Tensor, labels: Tensor) -> Certified:
    """Return the smallest over the other classes of logit gap over the L2 norm of the gap's gradient: equation (3).

    The gradients of all K logits take K backward passes; those of the gaps are their differences.

    Args:
        model: the network; no noise is used.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64; the margin is the predicted class's, whether or not it is the label.
    """
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logits = model.logits(leaf)
        top = logits.argmax(1)
        gradients = [
            torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=k + 1 < model.num_classes)[0]
            for k in range(model.num_classes)
        ]
    model.passes += model.num_classes * len(images)
    logits = logits.detach()
    own = torch.zeros_like(images)
    for k, gradient in enumerate(gradients):
        own[top == k] = gradient[top == k]
    margin = torch.full_like(logits[:, 0], torch.inf, dtype=torch.float64)
    gap = logits.gather(1, top[:, None]) - logits
    for k, gradient in enumerate(gradients):
        slope = distance((own - gradient).double(), "L2")
        far = torch.where(slope > 0, gap[:, k].double() / slope, torch.inf)
        margin = torch.where(top == k, margin, torch.minimum(margin, far))
    return Certified(
        prediction=top.cpu().numpy(),
        correct=(top == labels.to(top.device)).cpu().numpy(),
        radius=margin.cpu().numpy(),
    )


ENTRY = CertificateEntry(
    name="effective-margin",
    certify=effective_margin,
    summary="linearised L2 distance to the nearest decision boundary",
    source="EMR, arXiv:2210.05118, equation (3)",
    version=1,
    guarantee="No guarantee: the distance to the boundary of the network's linearisation at the image, exact only "
    "where the network is linear on the way there.",
    passes="classes + 1",
)

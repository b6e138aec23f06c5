"""Losses that attacks ascend and defenses descend, one value per example: `(N, K)` logits, `(N,)` labels -> `(N,)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label]."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the label's: positive exactly where the prediction is wrong.

    The loss f of Carlini and Wagner, arXiv:1608.04644, section V (f_6 without the clamp), as ascended by "CW-PGD".
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margin over the gap between the largest and the third largest logit (DLR).

    Croce and Hein, arXiv:2003.01690, equation (6). Raises ValueError below 3 classes, where there is no third logit.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}; use loss=margin"
        )
    ordered = logits.topk(3, dim=1).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


#: By the names that attacks take.
LOSSES: Mapping[str, PerExampleLoss] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": difference_of_logits_ratio,
}

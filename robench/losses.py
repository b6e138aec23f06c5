"""Losses that attacks ascend and defenses descend, one value per example: `(N, K)` logits, `(N,)` labels -> `(N,)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.target import remark

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


def soft_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log sum exp of the other logits minus the label's: an upper bound of the margin that has no kinks.

    The soft logit margin loss of Ding et al., arXiv:1812.02637, section 2.2; the margin itself for two classes.
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(1) - true


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margin over the gap between the largest and the third largest logit (DLR).

    Croce and Hein, arXiv:2003.01690, equation (6). Raises ValueError below 3 classes, where there is no third logit.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}; use loss=margin")
    ordered = logits.topk(3, dim=1).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def kl_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Return KL(softmax(logits) || softmax(others)) per example, `(N,)`, in nats: summed over the classes.

    Both `(N, K)`; gradients flow into both.
    """
    of_first, of_second = logits.log_softmax(1), others.log_softmax(1)
    return (of_first.exp() * (of_first - of_second)).sum(1)


@dataclass(frozen=True)
class Criterion:
    """What counts as broken: the label is not among the `top_k` largest logits."""

    top_k: int = 1

    def broken(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `(N,)` bool. Of equal logits the lower class comes first, as argmax has it."""
        if self.top_k == 1:
            return logits.argmax(1) != labels
        return rank_of(logits, labels) >= self.top_k

    def margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the k-th largest other logit minus the label's `(N,)`: positive exactly where it is broken.

        With as many classes as `top_k` nothing can be broken, and the margin is minus infinity.
        """
        if self.top_k == 1:
            return margin(logits, labels)
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return (
            others.topk(min(self.top_k, logits.shape[1]), dim=1).values[:, -1] - logits.gather(1, labels[:, None])[:, 0]
        )


TOP_1 = Criterion()


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the label, `(N,)`: 0 is the prediction; ties go to the lower class."""
    true = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > true) | ((logits == true) & (classes < labels[:, None]))
    return before.sum(1)


#: By the names that attacks take.
LOSSES: Mapping[str, PerExampleLoss] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": difference_of_logits_ratio,
}


def loss_named(name: str, criterion: Criterion, model: nn.Module) -> PerExampleLoss:
    """Return the loss of that name under a criterion; the margin becomes the criterion's own.

    Where the DLR has no form (fewer than 3 classes, or beyond top-1) the margin takes its place, and the record of
    `model`'s evaluation says so.
    """
    if name == "margin":
        return criterion.margin
    if name != "dlr":
        return LOSSES[name]

    def ratio_or_margin(logits: Tensor, labels: Tensor) -> Tensor:
        if criterion.top_k == 1 and logits.shape[1] >= 3:
            return difference_of_logits_ratio(logits, labels)
        remark(model, "the DLR loss was replaced by the margin: it has no form below 3 classes or beyond top-1")
        return criterion.margin(logits, labels)

    return ratio_or_margin

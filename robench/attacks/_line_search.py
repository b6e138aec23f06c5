"""The last step of minimum-norm attacks: back along the straight line from what was found to the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robench.losses import Criterion
from robench.lp_geometry import per_example

#: A point is taken only if its margin is at least this share of the image's: another computation of the same logits
#: (batch norms folded or not, another batch) must agree that it is broken. It costs as large a share of the distance.
_SAFETY = 1e-4

#: Where the margin is interpolated to vanish, so much of the rest of the way is added, or else every other
#: evaluation would fall just short.
_BEYOND = 0.05


@torch.no_grad()
def nearest_on_segment(
    model: nn.Module, images: Tensor, found: Tensor, labels: Tensor, *, criterion: Criterion, evaluations: int
) -> Tensor:
    """Return broken points on the segments from `found`, which is broken, towards `images`, which stand.

    A bracket around the last boundary on the way is shrunk by interpolating the margin (FAB, arXiv:1907.02044, section
    3.3, "final search"), each time by an evaluation of the model; the two ends cost one more each. The answer is never
    farther from the image than `found`.

    Args:
        model: images -> logits, in front of these examples.
        images: `(N, ...)` in [0, 1].
        found: `(N, ...)` in [0, 1].
        labels: `(N,)` int64.
        criterion: what counts as broken.
        evaluations: points tried between the ends; 0 returns `found`.
    """
    if evaluations == 0 or len(images) == 0:
        return found
    low_margin = criterion.margin(model(images), labels)
    needed = -_SAFETY * low_margin
    low_margin, high_margin = low_margin - needed, criterion.margin(model(found), labels) - needed
    low, high = torch.zeros_like(low_margin), torch.ones_like(low_margin)
    stayed = torch.zeros((2, *low.shape), dtype=torch.bool, device=low.device)
    for _ in range(evaluations):
        share = (low_margin / (low_margin - high_margin).clamp_max(-torch.finfo(low.dtype).tiny)).nan_to_num(0.5)
        share = (share + _BEYOND * (1 - share)).clamp(0.1, 1.0)
        tried = low + share * (high - low)
        margin = criterion.margin(model(_between(images, found, tried)), labels) - needed
        broken = margin >= 0
        # An end that stays a second time counts half (the Illinois rule): where the margin is curved it would for ever.
        low_margin = torch.where(broken, torch.where(stayed[0], low_margin / 2, low_margin), margin)
        high_margin = torch.where(broken, margin, torch.where(stayed[1], high_margin / 2, high_margin))
        low, high = torch.where(broken, low, tried), torch.where(broken, tried, high)
        stayed = torch.stack([broken, ~broken])
    return _between(images, found, high)


def _between(images: Tensor, found: Tensor, share: Tensor) -> Tensor:
    weight = per_example(share, images)
    return torch.where(weight == 1, found, images + weight * (found - images)).clamp(0.0, 1.0)

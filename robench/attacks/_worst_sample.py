"""Attacks that do not search: of many random candidates the worst one for the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robench.losses import Criterion
from robench.lp_geometry import per_example
from robench.random_streams import RandomStream
from robench.target import narrowed

#: On an accelerator looking at which examples are broken makes the host wait, so it is done at intervals of calls.
_CALLS_BETWEEN_COMPACTIONS = 5


@torch.no_grad()
def worst_sample(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    samples: int,
    draw: Callable[[Tensor, RandomStream], Tensor],
    random: RandomStream,
    criterion: Criterion,
) -> Tensor:
    """Return each example's first broken candidate, or the one with the largest margin where all of them stand.

    Whoever is broken leaves; the candidates of the others then share a call, of no more images than the first call.

    Args:
        model: `(M, C, H, W)` -> logits `(M, K)`.
        images: `(N, C, H, W)`.
        labels: `(N,)` int64.
        samples: candidates per example.
        draw: from some of the images and their random numbers for one candidate to the candidates.
        random: the examples' random numbers; candidate i has those at ("sample", i).
        criterion: what counts as broken.
    """
    call_size = len(images)
    interval = 1 if images.device.type == "cpu" else _CALLS_BETWEEN_COMPACTIONS
    result = images.detach().clone()
    worst = torch.full(labels.shape, -torch.inf, dtype=torch.float64, device=labels.device)
    rows = torch.arange(len(images), device=images.device)
    sample = calls = 0
    while sample < samples and len(rows):
        together = min(samples - sample, call_size // len(rows))
        candidates = torch.stack([draw(images, random.at("sample", sample + i)) for i in range(together)])
        margin = _margins(model(candidates.flatten(0, 1)), labels, criterion)
        value, chosen = _first_largest(margin)
        candidate = candidates[chosen, torch.arange(len(rows), device=rows.device)]
        better = value > worst[rows]
        result[rows] = torch.where(per_example(better, candidate), candidate, result[rows])
        worst[rows] = torch.maximum(value, worst[rows])
        sample, calls = sample + together, calls + 1
        if calls % interval == 0:
            kept = (worst[rows] < torch.inf).nonzero().squeeze(1)
            images, labels, random = images[kept], labels[kept], random[kept]
            rows, model = rows[kept], narrowed(model, kept)
    return result


def _margins(logits: Tensor, labels: Tensor, criterion: Criterion) -> Tensor:
    """Return the margins `(S, N)` float64 of S candidates for each of N examples, infinite where broken."""
    repeated = labels.repeat(len(logits) // len(labels))
    margin = criterion.margin(logits, repeated).double().nan_to_num(nan=-torch.inf)
    return torch.where(criterion.broken(logits, repeated), torch.inf, margin).view(-1, len(labels))


def _first_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each column of `(S, N)` and where it is first, both `(N,)`; argmax promises no order."""
    largest = values.amax(0)
    order = torch.arange(len(values), device=values.device)[:, None]
    return largest, torch.where(values == largest, order, len(values)).amin(0)

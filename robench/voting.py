"""Decisions of a model that is asked several times: smoothed by Gaussian noise, or random itself.

Of a single pass through such a model luck is a part. A *decision* is the majority of several votes, each for the
largest logit of one pass with its own noise; repeated decisions on the same image show how much luck is left. Memory
does not grow with the number of votes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.losses import Criterion
from robench.random_streams import RandomStream


@dataclass(frozen=True)
class Votes:
    """What several passes say of each image."""

    counts: Tensor
    """(N, K) int64: passes in which the class had the largest logit."""
    probabilities: Tensor
    """(N, K) float64: softmax outputs, summed over the passes."""

    @classmethod
    def none(cls, images: int, num_classes: int, device: torch.device | str = "cpu") -> Votes:
        """Return an empty ballot."""
        counts = torch.zeros(images, num_classes, dtype=torch.int64, device=device)
        return cls(counts, counts.double())

    def __add__(self, logits: Tensor) -> Votes:
        """Return the votes with those of more passes, `(V, N, K)` logits."""
        chosen = logits.argmax(2).T
        more = torch.zeros_like(self.counts).scatter_add(1, chosen, torch.ones_like(chosen))
        return Votes(self.counts + more, self.probabilities + logits.double().softmax(2).sum(0))

    @property
    def ranking(self) -> Tensor:
        """Return `(N, K)` float64 by which classes rank: the counts, and of equal ones the mean probability.

        So the ranking of a single vote is the logits'. Give it to a :class:`~robench.losses.Criterion`.
        """
        total = self.counts.sum(1, keepdim=True).clamp_min(1)
        return self.counts + 0.5 * self.probabilities / total


@torch.no_grad()
def majority(
    model: nn.Module,
    images: Tensor,
    *,
    sigma: float,
    votes: int,
    random: RandomStream,
    num_classes: int,
    chunk: int,
) -> Votes:
    """Let the model vote `votes` times on every image.

    The noise belongs to the example and the vote, so neither the batch nor `chunk` changes it. A model's own randomness
    (dropout that is on) is drawn by the model, and belongs to nobody.

    Args:
        model: images `(M, C, H, W)` -> logits `(M, K)`; noisy images leave [0, 1], as in randomized smoothing.
        images: `(N, C, H, W)` in [0, 1].
        sigma: standard deviation of the noise that is added before each vote; 0 adds none.
        votes: passes per image.
        random: the examples' random numbers for this decision.
        num_classes: K.
        chunk: images per call of the model, at least 1; votes of one image share a call.

    Raises:
        FloatingPointError: the model returns NaN or infinity; no class can be read from that.
    """
    parts = []
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for rows in torch.arange(len(images), device=images.device).split(chunk):
        some, stream = images[rows], random[rows]
        cast = Votes.none(len(rows), num_classes, images.device)
        together = max(1, chunk // max(1, len(rows)))
        for first in range(0, votes, together):
            noisy = _noisy(some, sigma, range(first, min(first + together, votes)), stream)
            logits = model(noisy.flatten(0, 1))
            finite &= torch.isfinite(logits).all()
            cast += logits.view(len(noisy), len(rows), num_classes)
        parts.append(cast)
    if not bool(finite):
        raise FloatingPointError("the model returns NaN or infinity for a noisy image")
    return Votes(torch.cat([p.counts for p in parts]), torch.cat([p.probabilities for p in parts]))


def _noisy(images: Tensor, sigma: float, votes: range, random: RandomStream) -> Tensor:
    """Return a copy of `(N, C, H, W)` images for each of the `votes`, with its noise: `(V, N, C, H, W)`."""
    if sigma == 0:
        return images.expand(len(votes), *images.shape)
    return torch.stack([images + sigma * random.at("vote", vote).normal(images) for vote in votes])


def repeated_decisions(
    decide: Callable[[RandomStream], Votes],
    labels: Tensor,
    *,
    repeats: int,
    random: RandomStream,
    criterion: Criterion,
) -> Tensor:
    """Return which of `repeats` independent decisions on each image are wrong, `(N, repeats)` bool.

    Args:
        decide: from the examples' random numbers for one decision to its votes: :func:`majority` with the rest fixed.
        labels: `(N,)` int64.
        repeats: how many decisions.
        random: the examples' random numbers; decision i has those at ("decision", i).
        criterion: what counts as wrong.
    """
    decisions = [criterion.broken(decide(random.at("decision", i)).ranking, labels) for i in range(repeats)]
    return torch.stack(decisions, dim=1)


def share_wrong(wrong: Tensor) -> Tensor:
    """Return the share of each example's repeated decisions that are wrong: `(N, repeats)` bool -> `(N,)` float64.

    It estimates the probability that one decision is wrong; where it is 0 or 1 the randomness decided nothing.
    """
    return wrong.double().mean(1)


def decision_bits(wrong: Tensor) -> Tensor:
    """Pack `(N, repeats)` bool into `(N,)` int64, bit i for decision i; raise ValueError for more than 62 decisions."""
    if wrong.shape[1] > 62:
        raise ValueError(f"{wrong.shape[1]} repeated decisions do not fit in 64 bits; at most 62 do")
    return (wrong * 2 ** torch.arange(wrong.shape[1], device=wrong.device)).sum(1)

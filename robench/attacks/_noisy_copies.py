"""The gradient that attacks a smoothed or random model: averaged over several noisy copies of every image.

With standard deviation 0 the copies differ by the model's own randomness alone (dropout that is on): expectation over
transformation (Athalye et al., arXiv:1802.00420, section 4.2). One copy without noise is the plain gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.losses import Criterion
from robench.lp_geometry import distance, per_example
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.voting import Votes

Average = Literal["log_mean_prob", "mean_loss"]

#: Noise that stays the same for all steps is kept while it takes no more memory than this, else drawn again.
_KEPT_BYTES = 2**28


class Look(NamedTuple):
    """What the copies say of some points."""

    majority: Tensor
    """(N,) bool: broken by the votes of the copies."""
    sure: Tensor
    """(N,) bool: and the copies that get it wrong outnumber the others by two standard deviations of a fair coin,
    2 sqrt(n), or are all n."""
    unanimous: Tensor
    """(N,) bool: and all copies get it wrong."""
    gradient: Tensor
    """(N, C, H, W): of the loss, averaged over the copies."""


@dataclass(frozen=True, kw_only=True)
class NoisyCopies:
    """A model behind noisy copies of some examples; take rows of it when examples leave."""

    model: nn.Module
    random: RandomStream
    copies: int
    sigma: float
    average: Average
    resample: bool
    """New noise at every step."""
    criterion: Criterion
    call_size: int
    """Images per call of the model: as many as the attack was given, so that copies cost time and no memory."""
    kept: Tensor
    """(m, N, C, H, W): the noise of the first m copies."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Tensor,
        *,
        random: RandomStream,
        copies: int,
        sigma: float,
        average: Average,
        resample: bool,
        criterion: Criterion,
    ) -> NoisyCopies:
        """Put `model` behind copies of `(N, C, H, W)` images."""
        noisy = cls(
            model=model,
            random=random.at("noise"),
            copies=copies,
            sigma=sigma,
            average=average,
            resample=resample,
            criterion=criterion,
            call_size=len(images),
            kept=images.new_empty(0, *images.shape),
        )
        if resample or sigma == 0 or len(images) == 0:
            return noisy
        keep = min(copies, _KEPT_BYTES // (images.numel() * images.element_size()))
        drawn = [noisy.noise(copy, images, step=0) for copy in range(keep)]
        return replace(noisy, kept=torch.stack(drawn)) if drawn else noisy

    def __getitem__(self, rows: Tensor) -> NoisyCopies:
        """Return the same in front of some of the examples, by row numbers."""
        return replace(self, model=narrowed(self.model, rows), random=self.random[rows], kept=self.kept[:, rows])

    def noise(self, copy: int, like: Tensor, *, step: int) -> Tensor:
        """Return the noise of one copy `(N, C, H, W)`; the step matters only where it is drawn anew."""
        if copy < len(self.kept):
            return self.kept[copy]
        stream = self.random.at("step", step) if self.resample else self.random
        return self.sigma * stream.at("copy", copy).normal(like)

    def look(self, points: Tensor, labels: Tensor, *, step: int) -> Look:
        """Return which of `(N, C, H, W)` points are broken, and the loss's gradient there.

        The loss is averaged over the copies: `log_mean_prob` is -log of the label's mean probability (Salman et al.,
        arXiv:1906.04584, section 2.2), `mean_loss` the mean cross-entropy (Campbell et al., arXiv:2010.02508,
        equation 9). Each call of the model is one forward and one backward pass of its copies.
        """
        together = max(1, self.call_size // max(1, len(points)))
        votes: Votes | None = None
        wrong = torch.zeros_like(labels)
        mean = WeightedMean.of(points, by_probability=self.average == "log_mean_prob")
        for first in range(0, self.copies, together):
            base = points.detach().requires_grad_()
            copies = range(first, min(first + together, self.copies))
            noisy = [base + self.noise(copy, points, step=step) if self.sigma > 0 else base for copy in copies]
            logits = self.model(torch.cat(noisy))
            repeated = labels.repeat(len(copies))
            cross_entropy = F.cross_entropy(logits, repeated, reduction="none")
            mean = mean.with_copies(base, cross_entropy.view(len(copies), -1))
            wrong += self.criterion.broken(logits.detach(), repeated).view(len(copies), -1).sum(0)
            passes = logits.detach().view(len(copies), len(points), -1)
            votes = (votes or Votes.none(len(points), logits.shape[1], points.device)) + passes
        assert votes is not None, "there is at least one copy"
        majority = self.criterion.broken(votes.ranking, labels)
        all_of_them = majority & (wrong == self.copies)
        sure = majority & (2 * wrong - self.copies >= 2 * math.sqrt(self.copies))
        return Look(majority, sure | all_of_them, all_of_them, mean.gradient)


@dataclass(frozen=True)
class WeightedMean:
    """The mean of the copies' gradients of the cross-entropy, weighted by the label's probability or equally.

    The gradient of -log(mean p) is the mean of the gradients of -log p, weighted by p. The weights are kept relative to
    the largest p so far: p itself may be too small for float32.
    """

    sum: Tensor
    """(N, C, H, W)."""
    weights: Tensor
    """(N,)."""
    smallest: Tensor
    """(N,): the smallest cross-entropy so far, whose weight is 1."""
    by_probability: bool

    @classmethod
    def of(cls, points: Tensor, *, by_probability: bool) -> WeightedMean:
        """Return the mean of no copies of `(N, C, H, W)` points."""
        zeros = points.new_zeros(len(points))
        return cls(torch.zeros_like(points), zeros, zeros + torch.inf, by_probability)

    def with_copies(self, base: Tensor, cross_entropy: Tensor) -> WeightedMean:
        """Return the mean with more copies: their `(V, N)` cross-entropies, as functions of `base`."""
        if not self.by_probability:
            (gradient,) = torch.autograd.grad(cross_entropy.sum(), base)
            return replace(self, sum=self.sum + gradient, weights=self.weights + len(cross_entropy))
        now = cross_entropy.detach().to(self.smallest.dtype)
        smallest = torch.minimum(self.smallest, now.amin(0))
        shrink, weight = torch.exp(smallest - self.smallest), torch.exp(smallest - now)
        (gradient,) = torch.autograd.grad((weight * cross_entropy).sum(), base)
        return replace(
            self,
            sum=self.sum * per_example(shrink, base) + gradient,
            weights=self.weights * shrink + weight.sum(0),
            smallest=smallest,
        )

    @property
    def gradient(self) -> Tensor:
        """Return the averaged loss's gradient `(N, C, H, W)`."""
        return self.sum / per_example(self.weights, self.sum)


def or_normal(gradient: Tensor, random: RandomStream) -> Tensor:
    """Return the gradient, and a normal vector in place of one that vanishes."""
    vanishes = distance(gradient, "Linf") == 0
    if gradient.device.type == "cpu" and not bool(vanishes.any()):
        return gradient  # elsewhere looking would make the host wait
    return torch.where(per_example(vanishes, gradient), random.normal(gradient), gradient)

"""Decoupled direction and norm (Rony et al., arXiv:1811.09600) on smoothed and on random models, as HeatSmoothing uses
it (Campbell, Finlay, Oberman, arXiv:2010.02508, section 3.4).

The norm of the perturbation shrinks while an image's noisy copies are wrong and grows while they are right; the
direction follows the gradient of a loss averaged over the copies.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._noisy_copies import NoisyCopies, or_normal
from robench.catalog import AttackEntry, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance, per_example, steepest
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: Of the gradient steps, which shrink from 1 along a cosine.
_LAST_STEP_SIZE = 0.01


def smoothed_ddn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 100,
    gamma: Probability = 0.05,
    init_norm: PositiveFloat = 1.0,
    levels: PositiveInt | None = None,
    copies: PositiveInt = 1,
    sigma: NonNegativeFloat = 0.0,
    average: Literal["log_mean_prob", "mean_loss"] = "log_mean_prob",
    resample_noise: bool = False,
    agreement: Literal["sure", "majority"] = "sure",
) -> Tensor:
    """Return the nearest image found that its copies get wrong; algorithm 1 of Rony et al.

    The authors of HeatSmoothing finally shorten what they found to their largest norm, 4, broken or not; here the
    answer stays where it was found, and the engine counts it at its distance. Where noise is added, the image itself is
    never a success, whatever its copies say. The direction is the cross-entropy's: a mixture of the directions to all
    other classes, which need not be that of the nearest one.

    Args:
        model: images `(N, C, H, W)` in [0, 1], with noise also beyond -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: its epsilon is not used.
        random: the examples' random numbers (noise).
        criterion: what counts as broken, of the classes ranked by votes.
        steps: gradient steps; the papers' 20 cannot shrink the norm below 0.36 of `init_norm`.
        gamma: share by which the norm shrinks where the image is broken and grows where it stands.
        init_norm: the norm at the start, on the [0, 1] scale.
        levels: quantise every iterate to so many values per pixel (the papers: 256); None does not.
        copies: noisy copies per image, n; HeatSmoothing takes 100 on CIFAR-10 and 25 on ImageNet.
        sigma: standard deviation of their noise, on the [0, 1] scale; what the smoothed model is smoothed with.
        average: over the copies: `log_mean_prob` is -log of the label's mean probability (SmoothAdv), `mean_loss` the
            mean cross-entropy (equation 9 of HeatSmoothing).
        resample_noise: draw the noise anew at every step; else an image keeps its noises, as in the authors' code, and
            the attack fits itself to them: resampling is stronger against the judge's noise.
        agreement: of the copies on what is broken. At a bare `majority`, as in the authors' code, the nearest broken
            image is a coin toss for other noise, and the judge's is other; `sure` wants the wrong copies to outnumber
            the others by 2 sqrt(n) (with one copy that is the same).

    Returns:
        `(N, C, H, W)` in the box; the image itself where nothing was found.
    """
    del threat
    best = images.detach().clone()
    best_norm = torch.full_like(labels, torch.inf, dtype=images.dtype)
    # No image of the box is farther away than this.
    farthest = distance(torch.maximum(images, 1 - images), "L2")
    norm = torch.full_like(best_norm, init_norm)
    current = images
    noisy = NoisyCopies.of(
        model,
        images,
        random=random,
        copies=copies,
        sigma=sigma,
        average=average,
        resample=resample_noise,
        criterion=criterion,
    )
    for step in range(steps if len(images) else 0):
        seen = noisy.look(current, labels, step=step)
        broken = seen.majority if agreement == "majority" else seen.sure
        if step == 0 and sigma > 0:
            # The image itself: that this noise fools the model says nothing of a perturbation.
            broken = torch.zeros_like(broken)
        offset = current - images
        length = distance(offset, "L2")
        nearer = broken & (length < best_norm)
        best = torch.where(per_example(nearer, images), current, best)
        best_norm = torch.where(nearer, length, best_norm)
        share = _LAST_STEP_SIZE + (1 - _LAST_STEP_SIZE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        offset = offset + share * steepest(or_normal(seen.gradient, noisy.random.at("zero", step)), "L2")
        norm = torch.minimum(norm * torch.where(broken, 1 - gamma, 1 + gamma), farthest)
        current = quantised(images + per_example(norm, images) * steepest(offset, "L2"), levels).clamp(0.0, 1.0)
    return best


def quantised(images: Tensor, levels: int | None) -> Tensor:
    """Return the nearest images whose pixels are multiples of 1 / (levels - 1); None: as they are."""
    return images if levels is None else (images * (levels - 1)).round() / (levels - 1)


ENTRY = AttackEntry(
    name="smoothed-ddn",
    attack=smoothed_ddn,
    summary="the nearest broken image along the gradient averaged over noisy copies; their majority predicts",
    source="Rony et al., arXiv:1811.09600, algorithm 1; Campbell, Finlay, Oberman, arXiv:2010.02508, section 3.4",
    version=2,
    passes="steps * copies",
    norms=("L2",),
    minimum_norm=True,
    presets={"smoothed-ddn-20": {"steps": 20, "levels": 256}},
)

"""Randomised smoothing: the certificate of Cohen, Rosenfeld and Kolter, and that of a deterministic model.

The smoothed classifier g(x) is the class that a model gives most often under Gaussian noise. With a lower bound of that
class's probability (:mod:`robench.smoothing_bounds`) the radius sigma * Phi^-1(bound) follows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from robench.catalog import CertificateEntry, PositiveFloat, PositiveInt
from robench.certification import Certified, NoisyModel, hits_of, most_frequent
from robench.errors import UserError
from robench.smoothing_bounds import clopper_pearson_lower, fewest_samples, radius_of, randomized_lower


def certify(
    model: NoisyModel,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: PositiveFloat,
    n0: PositiveInt = 100,
    n: PositiveInt = 10_000,
    alpha: PositiveFloat = 0.001,
    alpha_shared_by: PositiveInt = 1,
    guess: Literal["noise", "plain"] = "noise",
    top_k: PositiveInt = 1,
    bound: Literal["clopper-pearson", "randomized"] = "clopper-pearson",
) -> Certified:
    """Return predictions and radii of the smoothed classifier: CERTIFY of the paper.

    Any guess of the top class is valid, because the samples that bound its probability are drawn afresh. HeatSmoothing
    (arXiv:2010.02508) guesses by one forward pass without noise: its prediction is deterministic, its certificate still
    is one of the smoothed classifier.

    Args:
        model: the base classifier.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        sigma: standard deviation of the noise, on the [0, 1] scale.
        n0: noisy copies that choose the class.
        n: fresh ones that bound its probability.
        alpha: probability of a wrong certificate, of each image.
        alpha_shared_by: divide alpha by so many (Bonferroni): the number of images, for a table that is right in all
            its rows together with probability 1 - alpha.
        guess: the class that comes most often (`noise`), or that of one forward pass (`plain`).
        top_k: guess a set of so many classes. No certificate of the top-k accuracy: the radius bounds how far the noisy
            top-1 surely stays in the set more often than not.
        bound: `randomized` is tighter and uses one random number for each image, drawn before it is looked at.

    Raises:
        UserError: alpha is no probability, or n certifies nothing at this alpha.
    """
    level = alpha / alpha_shared_by
    if level >= 1 or n < fewest_samples(level):
        needed = f"the smallest that can is {fewest_samples(level)}" if level < 1 else "alpha lies between 0 and 1"
        raise UserError(f"certificate cohen: n = {n} samples certify nothing at alpha = {level:g}; {needed}")
    if top_k >= model.num_classes:
        raise UserError(
            f"certificate cohen: top_k = {top_k} of {model.num_classes} classes certifies nothing; take fewer"
        )
    if guess == "plain":
        chosen = model.logits(images).topk(top_k, dim=1).indices.cpu().numpy()
    else:
        chosen = most_frequent(model.counts(images, sigma=sigma, samples=n0, purpose="selection"), top_k)
    hits = hits_of(model.counts(images, sigma=sigma, samples=n, purpose="estimation"), chosen)
    samples = np.full(len(hits), n)
    if bound == "randomized":
        lower = randomized_lower(hits, samples, level, model.uniform("randomized bound"))
    else:
        lower = clopper_pearson_lower(hits, samples, level)
    radius = radius_of(lower, sigma)
    certain = lower > 0.5
    truth = labels.cpu().numpy()[:, None]
    return Certified(
        prediction=np.where(certain, chosen[:, 0], -1),
        correct=certain & (chosen == truth).any(1),
        radius=radius,
        hits=hits,
    )


ENTRY = CertificateEntry(
    name="cohen",
    certify=certify,
    summary="randomised smoothing: the class that comes most often under noise, and its L2 radius",
    source="Cohen et al., arXiv:1902.02918, theorem 1 and CERTIFY; deterministic guess: arXiv:2010.02508, section 3.3",
    version=1,
    guarantee="Within the L2 radius the model smoothed by Gaussian noise (sigma {sigma}) keeps its answer; each radius "
    "is wrong with probability {alpha} / {alpha_shared_by} at most. Nothing is guaranteed for one forward pass.",
    passes="(1 if guess == 'plain' else n0) + n + 1",
    presets={"cohen-deterministic": {"guess": "plain"}},
)

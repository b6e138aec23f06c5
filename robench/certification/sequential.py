"""Randomised smoothing that stops when it is enough: a certificate at one radius, and an anytime radius.

A fixed number of samples is spent on easy images as on hard ones. Bounds that hold at every moment together
(:mod:`robench.smoothing_bounds`) let each image stop by itself; the probability of a wrong certificate stays alpha.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robench.catalog import CertificateEntry, PositiveFloat, PositiveInt, Probability
from robench.certification import NOISE_CHUNK, Certified, NoisyModel, hits_of, most_frequent
from robench.errors import UserError
from robench.smoothing_bounds import (
    anytime_lower,
    anytime_upper,
    clopper_pearson_lower,
    fewest_samples,
    radius_of,
    refutes_at_least,
    refutes_at_most,
    share_needed,
)

#: Level at which "there is nothing more to be had" is believed.
_DOUBT = 0.05


def certify_anytime(
    model: NoisyModel,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: PositiveFloat,
    goal: Literal["radius", "decision"] = "radius",
    at: PositiveFloat | None = None,
    radii: tuple[float, ...] = (),
    within: Probability = 0.05,
    n0: PositiveInt = 100,
    n: PositiveInt = 100_000,
    alpha: PositiveFloat = 0.001,
    alpha_shared_by: PositiveInt = 1,
    guess: Literal["noise", "plain"] = "noise",
) -> Certified:
    """Return predictions and radii, each image with as many samples as it takes.

    Args:
        model: the base classifier.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        sigma: standard deviation of the noise, on the [0, 1] scale.
        goal: `decision`: certify the radius `at`, or not. An image stops when "the probability is above
            Phi(at / sigma)" or its contrary is proved, each wrong with probability alpha at most; its radius is `at` or
            0, and it abstains where it is not certified. `radius`: a radius as large as pays, see `within` and `radii`.
        at: the radius of a decision.
        radii: of a table. An image stops as soon as its radius can no longer reach the next larger one of these with
            any number of samples up to n, as far as is known with 95 % confidence; nothing else is looked at.
        within: without `radii`: an image stops when its radius is at least 1 - within of the largest that n samples can
            give it, as far as is known with 95 % confidence. That confidence says when to stop; the guarantee does not
            rest on it.
        n0: noisy copies that choose the class.
        n: most of them that are spent on an image.
        alpha: probability of a wrong certificate, of each image.
        alpha_shared_by: divide alpha by so many (Bonferroni); see `cohen`.
        guess: the class that comes most often (`noise`), or that of one forward pass (`plain`).

    Raises:
        UserError: alpha is no probability, n certifies nothing, `at` is missing or belongs to the other goal.
    """
    level = alpha / alpha_shared_by
    if not 0 < level < 1 or n < fewest_samples(level):
        raise UserError(
            f"certificate anytime: n = {n} samples certify nothing at alpha = {level:g}; give 0 < alpha < 1 and more"
        )
    if goal == "decision" and at is None:
        raise UserError("certificate anytime: goal=decision needs at=RADIUS; write anytime:goal=decision,at=0.5")
    if goal == "radius" and at is not None:
        raise UserError(f"certificate anytime: at={at:g} is of another goal; write anytime:goal=decision,at={at:g}")
    if guess == "plain":
        chosen = model.logits(images).argmax(1, keepdim=True).cpu().numpy()
    else:
        chosen = most_frequent(model.counts(images, sigma=sigma, samples=n0, purpose="selection"), 1)
    hits, samples = np.zeros(len(chosen), np.int64), np.zeros(len(chosen), np.int64)
    radius = np.zeros(len(chosen))
    standing = np.arange(len(chosen))
    for first, more in looks(n):
        counts = model.counts(images, sigma=sigma, samples=more, purpose="estimation", first=first, rows=standing)
        hits[standing] += hits_of(counts, chosen[standing])
        samples[standing] += more
        k, t = hits[standing], samples[standing]
        if at is not None:
            needed = float(share_needed(at, sigma))
            proved = refutes_at_most(k, t, needed, level)
            radius[standing] = np.where(proved, at, 0.0)
            enough = proved | refutes_at_least(k, t, needed, level)
        else:
            # The largest lower bound of all looks holds, because all of them hold together.
            radius[standing] = np.maximum(radius[standing], radius_of(anytime_lower(k, t, level), sigma))
            hope = radius_of(_best_to_come(k, t, n, alpha=level), sigma)
            enough = _settled(radius[standing], hope, radii) if radii else radius[standing] >= (1 - within) * hope
        standing = standing[~enough]
        if len(standing) == 0:
            break
    certain = radius > 0
    return Certified(
        prediction=np.where(certain, chosen[:, 0], -1),
        correct=certain & (chosen[:, 0] == labels.cpu().numpy()),
        radius=radius,
        hits=hits,
    )


def looks(n: int) -> Iterator[tuple[int, int]]:
    """Yield (samples before, samples until the next look): after 100, 200, 400, ... up to n samples."""
    done = 0
    while done < n:
        more = min(max(NOISE_CHUNK, done), n - done)
        yield done, more
        done += more


def _best_to_come(hits: NDArray[np.int64], samples: NDArray[np.int64], n: int, *, alpha: float) -> NDArray[np.float64]:
    """Return the lower bound that n samples would give if the share were the largest that is not refuted."""
    upper = anytime_upper(hits, samples, _DOUBT)
    return clopper_pearson_lower(np.minimum(n, np.ceil(upper * n)).astype(np.int64), n, alpha)


def _settled(radius: NDArray[np.float64], hope: NDArray[np.float64], radii: tuple[float, ...]) -> NDArray[np.bool_]:
    """Tell where no radius of the table lies above the one that is certified and below the one that is hoped for."""
    table = np.array([*sorted(radii), np.inf])
    # A certificate counts in a table where its radius exceeds the table's.
    following = table[np.searchsorted(table, radius, side="left")]
    return hope <= following


ENTRY = CertificateEntry(
    name="anytime",
    certify=certify_anytime,
    summary="randomised smoothing that stops, image by image, when more samples would change little",
    source="bounds valid at any time: Robbins' mixtures, after Voracek, arXiv:2406.17830; radius: Cohen et al., "
    "arXiv:1902.02918, theorem 1",
    version=1,
    guarantee="Within the L2 radius the model smoothed by Gaussian noise (sigma {sigma}) keeps its answer; each radius "
    "is wrong with probability {alpha} / {alpha_shared_by} at most, whenever the sampling stopped. Nothing is "
    "guaranteed for one forward pass.",
    passes="(1 if guess == 'plain' else n0) + n + 1",
    presets={"anytime-deterministic": {"guess": "plain"}},
)

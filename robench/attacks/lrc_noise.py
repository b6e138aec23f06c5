"""Long-range correlated Gaussian noise (Roth et al., "Adversarially robust training through structured gradient
regularization", arXiv:1805.08736, section 4.3): no gradient, no bound, only neighbouring pixels that move together.

The covariance of channel c at pixel i and channel c' at pixel j is ``M[c, c'] exp(-|i - j| / zeta)`` with the Euclidean
distance of the pixels, M = 1 on the diagonal and 1/2 beside it. Epsilon is the noise's standard deviation, no radius:
most of the samples lie outside every ball of that size, so the attack has no budget and its numbers stand apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._worst_sample import worst_sample
from robench.catalog import AttackEntry, PositiveFloat, PositiveInt
from robench.errors import UserError
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import per_example
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: Correlation of two channels at the same pixel.
_BETWEEN_CHANNELS = 0.5
#: Up to so many pixels the covariance matrix (128 MiB) is factorised; larger images are filtered on a torus.
_FACTORISED_PIXELS = 4096
#: Sides of the torus in sides of the image that are tried, until the torus' covariance has no negative eigenvalue.
_TORUS_SIDES = (2, 3, 4, 6, 8, 12, 16)
#: Eigenvalues above minus this share of the largest are zeros with rounding.
_ROUNDING = 1e-12


def lrc_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    training_moments: Callable[[], tuple[str, Tensor]] | None = None,
    covariance: str = "lrc",
    decay_length: PositiveFloat = 8.0,
    samples: PositiveInt = 100,
    eps_unit: Literal["pixel", "image_std"] = "pixel",
    clip: bool = True,
) -> Tensor:
    """Return the worst of `samples` images with correlated noise of standard deviation epsilon.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: its epsilon is the noise's standard deviation; its norm says nothing here.
        random: the examples' random numbers.
        criterion: what counts as broken, and by whose margin the worst is chosen where nothing is.
        training_moments: gives the hash of the training split and a factor `(d, d)` of its second moments, scaled to a
            mean diagonal of 1; called only if the covariance is the data's.
        covariance: `lrc`, the exponential one; or `training:HASH`, the second moments of the training split whose
            SHA-256 begins so (at least 8 digits): the name of the data is part of the question that is recorded.
        decay_length: zeta in pixels of `lrc`; the paper takes 1, 2, 4, 8 and 16.
        samples: noises per example.
        eps_unit: epsilon is on the [0, 1] scale of a `pixel`, or in units of each image's own standard deviation
            (`image_std`), as behind a layer that standardises every image.
        clip: clamp to [0, 1], as appendix 7.2 of the paper clips its attacks. False leaves the range of pixels: then a
            constant shift is not cut off, and cancels in a network that standardises every image.

    Returns:
        `(N, C, H, W)`, in the box if `clip`.

    Raises:
        UserError: another covariance, or another training split than the one that was named; says which it is.
    """
    factor = None if covariance == "lrc" else _factor_of(covariance, training_moments)

    def draw(some: Tensor, stream: RandomStream) -> Tensor:
        noise = long_range_noise(some, decay_length, stream) if factor is None else factor_noise(some, factor, stream)
        return with_noise(some, noise, sigma=threat.radius, eps_unit=eps_unit, clip=clip)

    return worst_sample(model, images, labels, samples=samples, draw=draw, random=random, criterion=criterion)


def with_noise(
    images: Tensor, noise: Tensor, *, sigma: float, eps_unit: Literal["pixel", "image_std"], clip: bool
) -> Tensor:
    """Return images `(N, C, H, W)` plus noise of unit variance, scaled to standard deviation sigma."""
    scale = torch.full_like(images[:, 0, 0, 0], sigma)
    if eps_unit == "image_std":
        scale = scale * images.flatten(1).std(1, correction=0)
    noisy = images + per_example(scale, images) * noise
    return noisy.clamp(0.0, 1.0) if clip else noisy


def _factor_of(covariance: str, training_moments: Callable[[], tuple[str, Tensor]] | None) -> Tensor:
    """Return the factor of the training split that `covariance` names."""
    source, _, digest = covariance.partition(":")
    if source != "training":
        raise UserError(f"lrc-noise: covariance={covariance!r} is unknown; write lrc or training:HASH")
    if training_moments is None:
        raise UserError(f"lrc-noise: covariance={covariance!r} needs an evaluation that has a training split")
    found, factor = training_moments()
    if len(digest) < 8 or not found.startswith(digest):
        raise UserError(f"lrc-noise: the training split is not {covariance!r}; write covariance=training:{found[:16]}")
    return factor


def factor_noise(like: Tensor, factor: Tensor, random: RandomStream) -> Tensor:
    """Return Gaussian noise of covariance F F^T, in the shape and type of `like` `(N, C, H, W)`; F is `(d, d)`."""
    white = random.normal(torch.empty(len(like), len(factor), dtype=torch.float64, device=like.device))
    return (white @ factor.to(like.device).T).reshape(like.shape).to(like.dtype)


def long_range_noise(like: Tensor, decay_length: float, random: RandomStream) -> Tensor:
    """Return Gaussian noise of unit variance with the long-range covariance, in the shape and type of `like`.

    `like` is `(N, C, H, W)`, `decay_length` in pixels. Computed in float64. Images of up to 4,096 pixels are multiplied
    by Cholesky factors of the pixels' and the channels' covariance (it is their Kronecker product); larger ones are
    cut from a field on a torus, filtered by Fourier transforms, which has exactly the same covariance inside the image.
    Raises ValueError for a decay length so long that no torus of 16 image sides has such a field.
    """
    count, channels, height, width = like.shape
    if count == 0:
        return torch.zeros_like(like)
    if height * width <= _FACTORISED_PIXELS:
        white = random.normal(torch.empty(count, channels, height * width, dtype=torch.float64, device=like.device))
        field = white @ _pixel_factor(height, width, decay_length, like.device).T
    else:
        field = torch.cat([_field_on_torus(random[row], like[0], decay_length) for row in torch.arange(count).split(1)])
    mixed = torch.einsum("cd,ndp->ncp", _channel_factor(channels, like.device), field)
    return mixed.reshape(like.shape).to(like.dtype)


def pixel_covariance(height: int, width: int, decay_length: float) -> Tensor:
    """Return `exp(-|i - j| / decay_length)` for all pairs of pixels, `(H W, H W)` float64.

    Distances are exact: rounded to whole pixels, as covariance functions are tabulated, the matrix is indefinite.
    """
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    distances: Tensor = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-distances / decay_length)


def channel_covariance(channels: int) -> Tensor:
    """Return `(C, C)` float64: 1 on the diagonal, 1/2 beside it."""
    return torch.full((channels, channels), _BETWEEN_CHANNELS, dtype=torch.float64).fill_diagonal_(1.0)


@functools.lru_cache(maxsize=4)
def _pixel_factor(height: int, width: int, decay_length: float, device: torch.device) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(pixel_covariance(height, width, decay_length))
    return factor.to(device)


@functools.lru_cache(maxsize=4)
def _channel_factor(channels: int, device: torch.device) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(channel_covariance(channels))
    return factor.to(device)


def _field_on_torus(random: RandomStream, like: Tensor, decay_length: float) -> Tensor:
    """Return `(1, C, H W)` independent fields for one image `(C, H, W)`, a channel at a time to bound the memory."""
    channels, height, width = like.shape
    gain = _torus_gain(height, width, decay_length, like.device)
    torus = torch.empty(1, *gain.shape, dtype=torch.float64, device=like.device)
    fields = []
    for channel in range(channels):
        white = random.at("channel", channel).normal(torus)
        fields.append(torch.fft.ifft2(torch.fft.fft2(white) * gain).real[:, :height, :width].reshape(1, -1))
    return torch.stack(fields, dim=1)


@functools.lru_cache(maxsize=4)
def _torus_gain(height: int, width: int, decay_length: float, device: torch.device) -> Tensor:
    """Return the square roots of the eigenvalues of the covariance on the smallest torus that has one.

    Circulant embedding (Dietrich and Newsam, "Fast and exact simulation of stationary Gaussian processes through
    circulant embedding of the covariance matrix", SIAM J. Sci. Comput. 18, 1997).
    """
    for sides in _TORUS_SIDES:
        down, across = (
            torch.minimum(torch.arange(sides * side), sides * side - torch.arange(sides * side)).double()
            for side in (height, width)
        )
        covariance = torch.exp(-torch.hypot(down[:, None], across[None]) / decay_length)
        eigenvalues: Tensor = torch.fft.fft2(covariance).real
        if float(eigenvalues.min()) >= -_ROUNDING * float(eigenvalues.max()):
            return eigenvalues.clamp_min(0.0).sqrt().to(device)
    raise ValueError(
        f"long-range noise: decay_length={decay_length} is too long for images of {height} x {width} pixels"
    )


ENTRY = AttackEntry(
    name="lrc-noise",
    attack=lrc_noise,
    summary="the worst of 100 long-range correlated Gaussian noises of standard deviation epsilon, not bounded",
    source="Roth, Lucchi, Nowozin, Hofmann, arXiv:1805.08736, section 4.3",
    version=1,
    passes="0",
    queries="samples",
    norms=("Linf", "L2"),
    budget="none",
    presets={
        "lrc-noise-1": {"decay_length": 1.0},
        "lrc-noise-2": {"decay_length": 2.0},
        "lrc-noise-4": {"decay_length": 4.0},
        "lrc-noise-8": {"decay_length": 8.0},
        "lrc-noise-16": {"decay_length": 16.0},
    },
)

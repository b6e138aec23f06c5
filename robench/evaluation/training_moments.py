"""The second moments of a training split, for attacks that draw noise with the covariance of the data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from robench.datasets import ImageSet
from robench.errors import UserError

#: Numbers per image up to which the matrix (512 MiB in float64) and its eigenvectors are computed.
_LARGEST_DIMENSION = 8192
_CHUNK = 1024


class TrainingMoments:
    """Tells the hash of a training split and a factor of its second moments; both are made when first asked for."""

    def __init__(self, open_training: Callable[[], ImageSet] | None, device: torch.device) -> None:
        """Take the way to open the split, None where there is none."""
        self._open = open_training
        self._device = device
        self._answer: tuple[str, Tensor] | None = None

    def __call__(self) -> tuple[str, Tensor]:
        """Return the split's hash and the factor; raise UserError where there is no training split."""
        if self._answer is None:
            if self._open is None:
                raise UserError("this evaluation has no training split; choose another covariance of the noise")
            images = self._open()
            self._answer = images.sha256, second_moment_factor(images, self._device)
        return self._answer


def second_moment_factor(images: ImageSet, device: torch.device) -> Tensor:
    """Return `(d, d)` float64 F with F F^T = mean of x x^T over the images, scaled to a mean diagonal of 1.

    Images `(C, H, W)` are read as vectors of d = C H W pixels, not centred. The root is by eigenvectors, because pixels
    that are always black make the matrix singular. Raises UserError where d is above 8,192.
    """
    dimension = int(np.prod(images.image_shape))
    if dimension > _LARGEST_DIMENSION:
        raise UserError(
            f"images of {dimension} numbers have a covariance of {dimension}^2; at most {_LARGEST_DIMENSION} can be had"
        )
    total = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
    for start in range(0, len(images), _CHUNK):
        pixels = images.read(np.arange(start, min(start + _CHUNK, len(images))))
        # Sums of products of whole numbers below 256 are exact in float64.
        flat = torch.from_numpy(pixels).to(device).flatten(1).double()
        total += flat.T @ flat
    values, vectors = torch.linalg.eigh(total / total.diagonal().mean().clamp_min(torch.finfo(total.dtype).tiny))
    factor: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return factor

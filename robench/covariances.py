"""The covariance that structured gradient regularisation leaves beside a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from robench.errors import UnsafeFile, UserError
from robench.records import ModelCard


@dataclass(frozen=True)
class Covariance:
    """What a model's defense has learned."""

    model: str
    image_shape: tuple[int, int, int]
    values: NDArray[np.float64]
    """`(d, d)` over the flattened pixels `(C, H, W)`, or the function `(C, C, R + 1)` of the displacement in pixels."""


def read_covariance(card: ModelCard, folder: Path) -> Covariance:
    """Return the covariance that stands beside a card.

    Raises UserError for a model that has none, UnsafeFile for a file that is not the one its card names.
    """
    described = card.defense_state
    if described is None:
        raise UserError(_none_in(card))
    path = folder / described.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; train {card.id} again with --replace") from None
    if hashlib.sha256(data).hexdigest() != described.sha256:
        raise UnsafeFile(f"{path} is not the file that its card names; restore it or train again")
    state = safetensors.numpy.load(data)
    name = next((name for name in sorted(state) if name.endswith("/covariance")), None)
    if name is None:
        raise UserError(_none_in(card))
    return Covariance(card.id, card.input_shape, state[name].astype(np.float64))


def _none_in(card: ModelCard) -> str:
    return f"model {card.id} was trained without a covariance; SGR learns one, such as robench train digits-sgr"


def displacements(height: int, width: int) -> NDArray[np.float64]:
    """Return the distances in pixels of all pairs of an image's pixels: `(height width, height width)`."""
    rows, columns = np.divmod(np.arange(height * width), width)
    found: NDArray[np.float64] = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    return found


def inner_pixels(shape: tuple[int, int, int], trimmed: float) -> NDArray[np.int64]:
    """Return the flattened places `(C, H, W)` that are left when a share of the image is cut off on each side."""
    channels, height, width = shape
    places = np.arange(channels * height * width).reshape(shape)
    top, left = int(trimmed * height), int(trimmed * width)
    return places[:, top : height - top, left : width - left].ravel()


def as_matrix(covariance: Covariance) -> NDArray[np.float64]:
    """Return the matrix `(d, d)` of a covariance in either form."""
    if covariance.values.ndim == 2:
        return covariance.values
    channels, height, width = covariance.image_shape
    steps = np.minimum(displacements(height, width).round().astype(int), covariance.values.shape[-1] - 1)
    blocks = [[covariance.values[a, b][steps] for b in range(channels)] for a in range(channels)]
    return np.block(blocks)


def as_function(covariance: Covariance) -> NDArray[np.float64]:
    """Return the function `(C, C, R + 1)` of a covariance in either form: of a matrix the means over the pairs of
    pixels whose displacement rounds to each number.
    """
    if covariance.values.ndim == 3:
        return covariance.values
    channels, height, width = covariance.image_shape
    steps = displacements(height, width).round().astype(int).ravel()
    pairs = np.bincount(steps)
    pixels = height * width
    cells = covariance.values.reshape(channels, pixels, channels, pixels)
    sums = [
        [np.bincount(steps, cells[a, :, b, :].ravel(), minlength=len(pairs)) for b in range(channels)]
        for a in range(channels)
    ]
    return np.array(sums) / pairs


def block_means(matrix: NDArray[np.float64], largest: int) -> tuple[NDArray[np.float64], int]:
    """Return a matrix averaged over square blocks so that it has at most `largest` rows, and the blocks' side."""
    side = -(-len(matrix) // largest)
    starts = np.arange(0, len(matrix), side)
    sizes = np.diff([*starts, len(matrix)])
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    return sums / np.outer(sizes, sizes), side

"""What a data set gives the rest of the package: labelled 8-bit images in a stated order, and their hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from robench.errors import UserError

Pixels = NDArray[np.uint8]
Positions = NDArray[np.int64]


class ImageSet(Protocol):
    """The images of one split in their stated order; an example's id is its position in it."""

    @property
    def labels(self) -> Positions:
        """Return the classes of all images as `(N,)` int64 in [0, K)."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the K classes."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""

    @property
    def in_memory(self) -> bool:
        """Return whether reading costs a copy only; else every read decodes files."""

    @property
    def sha256(self) -> str:
        """Return the hash that identifies the images and labels, in hexadecimal."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, positions: Positions) -> Pixels:
        """Return the images at `positions` (n,), each in [0, N), as (n, C, H, W) uint8, in that order."""

    def part(self, start: int, stop: int) -> Self:
        """Return the images from position `start` up to, not including, `stop`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ArrayImages:
    """Images held in memory. Raises UserError, which names `origin`, for arrays that do not fit together."""

    images: Pixels
    """(N, C, H, W) uint8."""
    labels: Positions
    """(N,) int64 in [0, K)."""
    classes: tuple[str, ...]
    origin: str
    """What the arrays were read from."""

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UserError(
                f"{self.origin}: images are {self.images.dtype} {self.images.shape}, not uint8 (N, C, H, W)"
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"{self.origin}: labels are {self.labels.dtype} {self.labels.shape}, "
                f"not one int64 for each of {len(self.images)} images"
            )
        wrong = (self.labels < 0) | (self.labels >= len(self.classes))
        if wrong.any():
            first = int(wrong.argmax())
            highest = len(self.classes) - 1
            raise UserError(f"{self.origin}: label {self.labels[first]} of image {first} is not in 0..{highest}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def in_memory(self) -> bool:
        """Return True."""
        return True

    @cached_property
    def sha256(self) -> str:
        """Return the hash of the shape, the pixels (NCHW) and the labels (little-endian 64-bit)."""
        digest = hashlib.sha256(f"arrays {self.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i8").data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions: Positions) -> Pixels:
        """Return a copy of the images at `positions` (n,) as (n, C, H, W) uint8."""
        return self.images[positions]

    def part(self, start: int, stop: int) -> Self:
        """Return the images from `start` up to, not including, `stop`; they share this set's memory."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])


def fixed_shuffle(count: int) -> Positions:
    """Return the positions 0..count-1 in a random-looking order that is the same everywhere and for ever.

    They are sorted by SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014, figure 17) of the
    position. It is a bijection, so there are no ties, and no library's generator is asked.
    """
    word = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(word ^ (word >> np.uint64(31))).astype(np.int64)


def scale_problem(low: float, high: float) -> str | None:
    """Return what is wrong with float images whose values go from `low` to `high`, and the remedy; None if nothing is.

    NaN in either says that the images hold some.
    """
    if low >= 0 and high <= 1:
        return None
    if not (np.isfinite(low) and np.isfinite(high)):
        return "hold NaN or infinite values; give finite ones in [0, 1]"
    if low < 0 and low >= -1 and high <= 1:
        remedy = "take (x + 1) / 2"
    elif low >= 0 and 2 < high <= 255:
        remedy = "divide by 255"
    else:
        remedy = "undo their normalisation, or rescale them"
    return f"go from {low:g} to {high:g}; float images are in [0, 1], {remedy}"

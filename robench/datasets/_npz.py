"""Labelled images in an `.npz` file: `x_train`, `y_train`, `x_test`, `y_test`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from robench.datasets._image_set import ArrayImages, Pixels, Positions, fixed_shuffle, scale_problem
from robench.errors import MissingData, UnsafeFile, UserError

SPLITS = ("train", "test")
KEYS = ("x_train", "y_train", "x_test", "y_test")
#: Images whose values are converted at once: a few megabytes instead of several copies of the
#: file.
CHUNK = 1000


def load(path: Path, split: str) -> ArrayImages:
    """Return the `train` or `test` split of an `.npz` file.

    Images are uint8, or float in [0, 1] (rounded to 8 bits), as (N, H, W, C), (N, C, H, W) or grey (N, H, W);
    labels are integers 0..K-1, each of which has a training image. Test images keep the file's order.
    Training images take a fixed shuffle of it, so that the validation split holds all classes of a file that
    is sorted by class.

    Raises MissingData, UnsafeFile for a file that is damaged or holds pickled objects, UserError for arrays
    that are no labelled images.
    """
    images, labels = read_split(path, split)
    with _opened(path) as arrays:
        classes = _classes(arrays["y_train"], path)
    if split == "train":
        order = fixed_shuffle(len(labels))
        images, labels = images[order], labels[order]
    return ArrayImages(images=images, labels=labels, classes=classes, origin=str(path))


def read_split(path: Path, split: str) -> tuple[Pixels, Positions]:
    """Return a split's images as (N, C, H, W) uint8 and its labels as (N,) int64, in the file's order.

    Raises what :func:`load` raises; the labels' range is not looked at.
    """
    with _opened(path) as arrays:
        images = _eight_bits(arrays[f"x_{split}"], f"{path}: x_{split}")
        labels = arrays[f"y_{split}"].astype(np.int64)
    axis = _channel_axis(images.shape)
    channels_first = images[:, None] if axis is None else np.moveaxis(images, axis, 1)
    return np.ascontiguousarray(channels_first), labels


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Give the file's arrays, once the headers of all four fit together; pickled objects are never read."""
    if not path.is_file():
        raise MissingData(f"{path} does not exist; name an .npz file that holds {', '.join(KEYS)}")
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {key: _header(archive, key, path) for key in KEYS}
        for split in SPLITS:
            _check(split, headers[f"x_{split}"], labels=headers[f"y_{split}"], path=path)
        train, test = (headers[f"x_{split}"].shape[1:] for split in SPLITS)
        if train != test:
            raise UserError(f"{path}: training images are {train}, test images {test}; they must be alike")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UnsafeFile(f"{path} is damaged or no .npz file: {error}") from None


class _Header(NamedTuple):
    """What an array's header says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _header(archive: zipfile.ZipFile, key: str, path: Path) -> _Header:
    """Read an array's header, not its values."""
    if f"{key}.npy" not in archive.namelist():
        raise UserError(f"{path} has no array {key}; it needs {', '.join(KEYS)}")
    with archive.open(f"{key}.npy") as file:
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise UnsafeFile(f"{path}: {key} holds pickled objects, which could run code; save it as numbers")
    return _Header(shape, dtype)


def _check(split: str, images: _Header, *, labels: _Header, path: Path) -> None:
    """Raise UserError for images or labels of a wrong type or shape."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise UserError(f"{path}: x_{split} is {images.dtype}; images are uint8, or float in [0, 1]")
    if 0 in images.shape:
        raise UserError(f"{path}: x_{split} is empty (shape {images.shape}); give it images")
    if len(images.shape) not in (3, 4) or _channel_axis(images.shape) == 0:
        raise UserError(
            f"{path}: x_{split} has shape {images.shape}; images are (N, H, W), "
            f"or (N, H, W, C) or (N, C, H, W) with 1 or 3 channels on one of the two axes"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: y_{split} is {labels.dtype} {labels.shape}; "
            f"labels are one integer for each of the {images.shape[0]} images"
        )


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Return where the channels are: 1, 3, None for grey images without them, 0 where it cannot be told."""
    if len(shape) == 3:
        return None
    candidates = [axis for axis in (1, 3) if shape[axis] in (1, 3)]
    return candidates[0] if len(candidates) == 1 else 0


def _eight_bits(images: NDArray[Any], origin: str) -> Pixels:
    """Return uint8 images as they are, and float ones on the scale 0..255."""
    if images.dtype == np.uint8:
        return images
    # The minimum and maximum of values with a NaN among them are NaN.
    if problem := scale_problem(float(images.min()), float(images.max())):
        raise UserError(f"{origin}: its images {problem}")
    rounded = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        rounded[start : start + CHUNK] = np.rint(part.astype(np.float64) * 255)
    return rounded


def _classes(labels: NDArray[Any], path: Path) -> tuple[str, ...]:
    """Return the names "0".."K-1" of the classes that the training labels use, all of which must occur."""
    used = np.unique(labels)
    if used[0] < 0 or used[-1] != len(used) - 1:
        absent = next((k for k in range(len(used)) if k not in used), 0)
        raise UserError(
            f"{path}: y_train goes from {used[0]} to {used[-1]} without {absent}; "
            f"labels are 0..K-1, each with training images"
        )
    return tuple(str(k) for k in used)

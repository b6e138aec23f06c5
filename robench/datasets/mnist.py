"""MNIST, from the original idx files as torchvision keeps them."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from robench.catalog import DatasetEntry
from robench.datasets import ArrayImages, Pixels
from robench.datasets._download import missing
from robench.errors import UnsafeFile


def load(root: Path, split: str) -> ArrayImages:
    """Return the 60,000 training or the 10,000 test images of `root/MNIST/raw`, in the files' order."""
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(root, f"{prefix}-images-idx3-ubyte", item_shape=(28, 28))
    labels = read_idx(root, f"{prefix}-labels-idx1-ubyte", item_shape=())
    return ArrayImages(
        images=images[:, None],
        labels=labels.astype(np.int64),
        classes=ENTRY.classes,
        origin=f"{root / 'MNIST' / 'raw' / prefix}-*",
    )


def read_idx(root: Path, name: str, *, item_shape: tuple[int, ...]) -> Pixels:
    """Return the bytes of an idx file, plain or `.gz`, as (N, *item_shape) uint8.

    The format (yann.lecun.com/exdb/mnist): two zero bytes, the type (8: unsigned byte), the number of axes,
    their sizes as big-endian 32-bit integers, the values. Raises MissingData; UnsafeFile for anything else
    than that.
    """
    plain = root / "MNIST" / "raw" / name
    path = next((p for p in (plain, plain.with_name(f"{name}.gz")) if p.is_file()), None)
    if path is None:
        raise missing("mnist", root, f"MNIST/raw/{name} or {name}.gz")
    try:
        content = path.read_bytes()
        data = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UnsafeFile(f"{path} is damaged: {error}; delete it and fetch it again") from None
    axes = 1 + len(item_shape)
    sizes = tuple(int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, axes + 1))
    start = 4 * (axes + 1)
    if data[:4] != bytes([0, 0, 8, axes]) or sizes[1:] != item_shape or len(data) != start + math.prod(sizes):
        raise UnsafeFile(f"{path} is damaged or no idx file of {item_shape} items; delete it and fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


ENTRY = DatasetEntry(
    name="mnist",
    load=load,
    summary="70,000 handwritten digits, grey, 28 x 28",
    source="LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998",
    licence="CC BY-SA 3.0, as commonly stated",
    classes=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    image_shape=(1, 28, 28),
    held_out=2000,
    images={"train": 60000, "test": 10000},
    threats=("Linf@0.3", "L2@2"),
)

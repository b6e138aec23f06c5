"""CIFAR-10, from `cifar10.npz` or from the "python version" files as torchvision keeps them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from robench.catalog import DatasetEntry
from robench.datasets import ArrayImages, Pixels, Positions
from robench.datasets._download import missing
from robench.datasets._npz import read_split
from robench.datasets._pickled_batches import read_batch
from robench.errors import UserError

BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def load(root: Path, split: str) -> ArrayImages:
    """Return the 50,000 training or 10,000 test images, in an order that does not depend on the files'.

    `root/cifar10.npz` is read where there is one, else `root/cifar-10-batches-py/`. Both come to the same
    order, hence the same hash and the same example ids: :func:`canonical_order`.
    """
    archive, folder = root / "cifar10.npz", root / "cifar-10-batches-py"
    if archive.is_file():
        images, labels = read_split(archive, split)
        if images.shape[1:] != ENTRY.image_shape:
            raise UserError(f"{archive} has images of shape {images.shape[1:]}; CIFAR-10's are {ENTRY.image_shape}")
    else:
        paths = [folder / name for name in BATCHES[split]]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise missing("cifar10", root, f"cifar10.npz or cifar-10-batches-py/{absent[0].name}")
        batches = [read_batch(path) for path in paths]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    origin = str(archive if archive.is_file() else folder)
    if len(images) != len(labels):
        raise UserError(f"{origin} has {len(labels)} labels for {len(images)} images; fetch the data set again")
    order = canonical_order(images, labels)
    return ArrayImages(images=images[order], labels=labels[order], classes=ENTRY.classes, origin=origin)


def canonical_order(images: Pixels, labels: Positions) -> Positions:
    """Return the positions in the stated order, which is the same for any permutation of the images.

    Inside a class images are sorted by the SHA-256 of their pixels (CHW); then the classes take turns, 0, 1,
    ..., 9, 0, ..., those that run out being left out. Every prefix is as balanced as the classes allow.
    """
    hashes = [hashlib.sha256(image.data).digest() for image in np.ascontiguousarray(images)]
    by_hash = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.int64)
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = by_hash[labels[by_hash] == label]
        turn[members] = np.arange(len(members))
    return np.lexsort((labels, turn)).astype(np.int64)


ENTRY = DatasetEntry(
    name="cifar10",
    load=load,
    summary="60,000 photographs of animals and vehicles, RGB, 32 x 32",
    source="Krizhevsky: Learning multiple layers of features from tiny images, 2009",
    licence="none stated by the authors, who ask to be cited",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    image_shape=(3, 32, 32),
    held_out=2000,
    images={"train": 50000, "test": 10000},
    threats=("Linf@8/255", "L2@0.5"),
)

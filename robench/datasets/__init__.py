"""Data sets: labelled 8-bit images in fixed train, validation and test splits, without torch.

A data set is a catalog name (`mnist`), an image folder (`folder:PATH`) or arrays in a file (`npz:PATH`).
Every split has a stated order and a hash; an example's id is its position in that order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from robench import catalog
from robench.datasets import _folder, _npz
from robench.datasets._download import download
from robench.datasets._image_set import ArrayImages, ImageSet, Pixels, Positions, fixed_shuffle, scale_problem
from robench.errors import UnknownName, UserError
from robench.records import Examples
from robench.workspace import Workspace

__all__ = [
    "RESIZED",
    "ArrayImages",
    "DatasetFacts",
    "ImageSet",
    "Pixels",
    "Positions",
    "Split",
    "dataset_facts",
    "download",
    "fixed_shuffle",
    "open_split",
    "scale_problem",
    "select_examples",
]

Split = Literal["train", "validation", "test"]

#: Readers of the user's own data, by the prefix that is typed: `(path, split) -> ImageSet`.
READERS: dict[str, Callable[[Path, str], ImageSet]] = {"folder": _folder.load, "npz": _npz.load}
OWN_HELD_OUT = 2000
#: The shape that all images of a folder get if their sizes differ.
RESIZED = (3, _folder.CROP, _folder.CROP)
OWN_THREATS = ("Linf@8/255", "L2@0.5")


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is said of a data set in cards and tables."""

    name: str
    """As it is recorded: the catalog name, `folder:NAME` or `npz:NAME`, without the machine's path."""
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width)."""
    licence: str
    threats: tuple[str, ...]
    """Threat models it is usually reported under; the first is the default."""


def open_split(dataset: str, split: Split, workspace: Workspace) -> ImageSet:
    """Return one split of a data set.

    The validation split is the end of the training images' stated order: as many as the catalog entry holds
    out, at most a fifth of them; a tenth, at most 2,000, of the user's own data. The train split is the rest.

    Raises UnknownName for a name that is not in the catalog, MissingData (says how to get it) for files that
    are not there, UnsafeFile for damaged ones, UserError for ones that are no labelled images.
    """
    if split not in get_args(Split):
        raise UnknownName("split", split, get_args(Split))
    prefix, path = _own(dataset)
    if path is not None:
        load, held_out, share = functools.partial(READERS[prefix], path), OWN_HELD_OUT, 10
    else:
        plugin = catalog.find("datasets", dataset)
        entry = plugin.load()
        load = functools.partial(entry.load, workspace.data_root, **plugin.settings())
        held_out, share = entry.held_out, 5
    if split == "test":
        return load("test")
    images = load("train")
    if len(images) < 2:
        raise UserError(f"{dataset} has {len(images)} training images; a train and a validation split need two")
    boundary = len(images) - max(1, min(held_out, len(images) // share))
    return images.part(0, boundary) if split == "train" else images.part(boundary, len(images))


def dataset_facts(dataset: str, workspace: Workspace) -> DatasetFacts:
    """Return what is known of a data set; files are read only where the catalog does not tell it.

    Raises what :func:`open_split` raises.
    """
    if _own(dataset)[1] is not None:
        images = open_split(dataset, "test", workspace)
        return DatasetFacts(
            name=recorded_name(dataset),
            classes=images.classes,
            image_shape=images.image_shape,
            licence="not stated (the user's own data)",
            threats=OWN_THREATS,
        )
    facts = catalog.find("datasets", dataset).facts
    return DatasetFacts(
        name=dataset,
        # Where the classes are the names of folders (ImageNet), only the folders know them.
        classes=facts["classes"] or open_split(dataset, "test", workspace).classes,
        image_shape=facts["image_shape"],
        licence=facts["licence"],
        threats=facts["threats"],
    )


def recorded_name(dataset: str) -> str:
    """Return the name a data set is recorded under: `npz:/home/me/faces.npz` is `npz:faces`."""
    prefix, path = _own(dataset)
    return dataset if path is None else f"{prefix}:{path.absolute().name.removesuffix('.npz')}"


def select_examples(
    image_set: ImageSet, *, dataset: str, split: Split, count: int | None
) -> tuple[Examples, Positions]:
    """Return which examples are evaluated, as it is recorded and as sorted positions (n,) int64.

    `count` None is all of them, else the first `count` of a fixed shuffle: a smaller selection is part of
    every larger one. Raises UserError for a count below 1 or above the split's size.
    """
    size = len(image_set)
    if count is not None and not 1 <= count <= size:
        raise UserError(f"{count} examples of {dataset} {split} cannot be chosen; it has {size}, ask for 1 to {size}")
    chosen = np.sort(fixed_shuffle(size)[:count])
    examples = Examples(
        dataset=recorded_name(dataset),
        split=split,
        split_sha256=image_set.sha256,
        split_size=size,
        count=len(chosen),
        ids_sha256=hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
    )
    return examples, chosen


def _own(dataset: str) -> tuple[str, Path | None]:
    """Split `npz:PATH` or `folder:PATH`; a catalog name has no path."""
    prefix, colon, path = dataset.partition(":")
    if not colon:
        return dataset, None
    if prefix not in READERS or not path:
        raise UserError(f"data set {dataset!r} is no catalog name; write folder:PATH or npz:PATH for your own data")
    return prefix, Path(path).expanduser()

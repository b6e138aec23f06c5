"""Fetching data sets into the data root, by torchvision's downloaders (their mirrors, their checksums)."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import NamedTuple

from robench import catalog
from robench.errors import MissingData, StorageError, UserError


class Source(NamedTuple):
    """How a data set gets into the data root."""

    downloader: str
    """torchvision's class that fetches it."""
    folders: tuple[str, ...]
    """The folders that it makes, innermost first."""
    by_hand: str
    """What to put where without a connection; `{root}` is the data root."""


SOURCES = {
    "mnist": Source(
        "MNIST",
        ("MNIST/raw", "MNIST"),
        "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz into {root}/MNIST/raw",
    ),
    "cifar10": Source(
        "CIFAR10",
        ("cifar-10-batches-py",),
        "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz) into {root}",
    ),
}
UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST})


def download(dataset: str, root: Path) -> None:
    """Fetch `dataset` into the data root `root`; files that are there, whole, are left alone.

    Raises UserError for a data set that cannot be fetched, StorageError where `root` cannot be written,
    MissingData (says what to put where by hand) where the network or the mirrors fail; no empty folder is left then.
    """
    catalog.find("datasets", dataset)
    if dataset not in SOURCES:
        raise UserError(f"{dataset} is not for download; `robench show {dataset}` says where it comes from")
    source = SOURCES[dataset]
    new = [f for f in (*(root / name for name in source.folders), root, *root.parents) if not f.exists()]
    try:
        _fetch(source, root)
    except (OSError, RuntimeError) as error:
        for folder in new:
            with contextlib.suppress(OSError):  # it holds something, or was never made
                folder.rmdir()
        # No network is an OSError as well, but with another or no number.
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise StorageError(
                f"{root} cannot be written ({error.strerror}); name another folder with --data-root"
            ) from None
        reason = " ".join(str(error).split())
        raise MissingData(
            f"{dataset} could not be downloaded into {root}: {reason}; try again with a connection, "
            f"or put {source.by_hand.format(root=root)}"
        ) from None


def _fetch(source: Source, root: Path) -> None:
    import torchvision.datasets

    root.mkdir(parents=True, exist_ok=True)
    for train in (True, False):
        getattr(torchvision.datasets, source.downloader)(str(root), train=train, download=True)


def missing(dataset: str, root: Path, wanted: str) -> MissingData:
    """Return the error for a data set of which `wanted` (a path below the data root) is not there."""
    fetch = f"run `robench data {dataset}`, or " if dataset in SOURCES else ""
    return MissingData(
        f"{dataset} is not in {root} (no {wanted}); {fetch}name the folder that has it by --data-root or ROBENCH_DATA"
    )

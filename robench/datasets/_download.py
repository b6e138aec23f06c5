"""Fetching data sets into the data root, by torchvision's downloaders (their mirrors, their checksums)."""

from __future__ import annotations

import errno
from pathlib import Path

from robench import catalog
from robench.errors import MissingData, StorageError, UserError

#: torchvision's class for each data set that it can fetch.
DOWNLOADERS = {"mnist": "MNIST", "cifar10": "CIFAR10"}
UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST})


def download(dataset: str, root: Path) -> None:
    """Fetch `dataset` into the data root `root`; files that are there, whole, are left alone.

    Raises UserError for a data set that cannot be fetched, StorageError where `root` cannot be written,
    MissingData where the network or the mirrors fail.
    """
    catalog.find("datasets", dataset)
    if dataset not in DOWNLOADERS:
        raise UserError(f"{dataset} is not for download; `robench show {dataset}` says where it comes from")
    import torchvision.datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
        for train in (True, False):
            getattr(torchvision.datasets, DOWNLOADERS[dataset])(str(root), train=train, download=True)
    except OSError as error:
        # No network is an OSError as well, but with another or no number.
        if error.errno not in UNWRITABLE:
            raise MissingData(f"{dataset} could not be downloaded into {root}: {error}") from None
        raise StorageError(
            f"{root} cannot be written ({error.strerror}); name another folder with --data-root"
        ) from None
    except RuntimeError as error:
        raise MissingData(f"{dataset} could not be downloaded into {root}: {error}") from None


def missing(dataset: str, root: Path, wanted: str) -> MissingData:
    """Return the error for a data set of which `wanted` (a path below the data root) is not there."""
    fetch = f"run `robench data {dataset}`, or " if dataset in DOWNLOADERS else ""
    return MissingData(
        f"{dataset} is not in {root} (no {wanted}); {fetch}name the folder that has it by --data-root or ROBENCH_DATA"
    )

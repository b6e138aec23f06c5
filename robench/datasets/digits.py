"""Handwritten digits of 8 x 8 pixels, which come with scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from robench.catalog import DatasetEntry
from robench.datasets import ArrayImages
from robench.errors import MissingData, UnsafeFile


def load(_root: Path, split: str) -> ArrayImages:
    """Return every fourth image of the file, from position 3 (test), or the others (train), in its order.

    The file's values 0..16 become `round(value * 255 / 16)`. Its writers went through the digits in
    order: a step that divides ten would give some classes twice the images of others.
    """
    path = _file()
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    except (OSError, EOFError, ValueError) as error:
        raise UnsafeFile(f"{path} is damaged ({error}); install scikit-learn again") from None
    rows = table[(np.arange(len(table)) % 4 == 3) == (split == "test")]
    images = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return ArrayImages(images=images, labels=rows[:, -1].copy(), classes=ENTRY.classes, origin=str(path))


def _file() -> Path:
    """Find scikit-learn's copy without importing the package, which takes a second or two."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise MissingData("digits come with scikit-learn, which is not installed; run `pip install scikit-learn`")
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


ENTRY = DatasetEntry(
    name="digits",
    load=load,
    summary="1,797 handwritten digits, grey, 8 x 8; bundled with scikit-learn, nothing to fetch",
    source="Alpaydin and Kaynak: Optical Recognition of Handwritten Digits, test part, doi:10.24432/C50P49",
    licence="CC BY 4.0 (UCI Machine Learning Repository)",
    classes=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    image_shape=(1, 8, 8),
    held_out=200,
    threats=("Linf@0.15", "L2@1"),
)

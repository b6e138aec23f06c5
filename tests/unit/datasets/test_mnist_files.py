"""MNIST's idx files: plain, compressed, damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from robench.datasets.mnist import load
from robench.errors import MissingData, UnsafeFile, UserError


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


IMAGES = np.arange(7 * 28 * 28).reshape(7, 28, 28) % 251
LABELS = np.array([3, 1, 4, 1, 5, 9, 2])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return folder


def test_plain_and_compressed_files_are_the_same(raw: Path, tmp_path: Path) -> None:
    plain = load(tmp_path, "test")
    np.testing.assert_array_equal(plain.read(np.arange(7)), IMAGES[:, None])
    np.testing.assert_array_equal(plain.labels, LABELS)
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load(tmp_path, "test").sha256 == plain.sha256
    with pytest.raises(MissingData, match="no MNIST/raw/train-images-idx3-ubyte or"):
        load(tmp_path, "train")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes([0, 0, 9]) + data[3:],  # signed bytes
        lambda data: idx(IMAGES.reshape(7, 14, 56)),
        lambda data: idx(LABELS),
        lambda data: b"<html>no such page</html>",
    ],
)
def test_damaged_files_are_named(damage, raw: Path, tmp_path: Path) -> None:
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnsafeFile, match=r"t10k-images-idx3-ubyte is damaged .* fetch it again"):
        load(tmp_path, "test")


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no gzip", lambda data: data[:20]])
def test_damaged_compression_is_named(damage, raw: Path, tmp_path: Path) -> None:
    path = raw / "t10k-labels-idx1-ubyte"
    path.with_name(path.name + ".gz").write_bytes(damage(gzip.compress(path.read_bytes())))
    path.unlink()
    with pytest.raises(UnsafeFile, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        load(tmp_path, "test")


def test_files_that_do_not_belong_together(raw: Path, tmp_path: Path) -> None:
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([3, 1, 4, 1, 5, 10, 2])))
    with pytest.raises(UserError, match=r"t10k-\*: label 10 of image 5"):
        load(tmp_path, "test")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:5]))
    with pytest.raises(UserError, match="not one int64 for each of 7 images"):
        load(tmp_path, "test")

"""CIFAR-10's two file forms: one order, and pickles that cannot run anything."""

from __future__ import annotations

import pickle  # noqa: TID251 - writes the files that the package must read, and those it must refuse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robench.datasets.cifar10 import BATCHES, canonical_order, load
from robench.errors import MissingData, UnsafeFile, UserError

GENERATOR = np.random.Generator(np.random.PCG64(5))
IMAGES = GENERATOR.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
LABELS = np.concatenate([np.repeat(np.arange(10), 5), np.zeros(7, np.int64), np.full(3, 8)])


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Write a batch opcode by opcode as Python 2's cPickle did for the published files."""
    count = len(images).to_bytes(2, "little")
    raw = images.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01M" + count + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def python3_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({"data": images.reshape(-1, 3072), "labels": labels.tolist()}, protocol=2)


def write_batches(root: Path, write: Any) -> None:
    """Spread the images over the five training files; the test file has ten of them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate(BATCHES["train"]):
        (folder / name).write_bytes(write(IMAGES[i::5], LABELS[i::5]))
    (folder / "test_batch").write_bytes(write(IMAGES[:10], LABELS[:10]))


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_both_forms_come_to_the_same(write: Any, tmp_path: Path) -> None:
    write_batches(tmp_path / "batches", write)
    order = GENERATOR.permutation(60)
    (tmp_path / "archive").mkdir()
    np.savez(
        tmp_path / "archive" / "cifar10.npz",
        x_train=IMAGES[order].transpose(0, 2, 3, 1),
        y_train=LABELS[order],
        x_test=IMAGES[9::-1].transpose(0, 2, 3, 1),
        y_test=LABELS[9::-1],
    )
    for split, count in (("train", 60), ("test", 10)):
        one, other = (load(tmp_path / form, split) for form in ("batches", "archive"))
        assert one.sha256 == other.sha256
        np.testing.assert_array_equal(one.images, other.images)
        pairs = {(i.tobytes(), int(k)) for i, k in zip(IMAGES[:count], LABELS[:count], strict=True)}
        assert {(i.tobytes(), int(k)) for i, k in zip(one.images, one.labels, strict=True)} == pairs


def test_classes_take_turns() -> None:
    labels = LABELS[canonical_order(IMAGES, LABELS)]
    assert labels[:50].tolist() == list(range(10)) * 5
    assert labels[50:].tolist() == [0, 8, 0, 8, 0, 8, 0, 0, 0, 0]


class RunsCode:
    mark = Path()

    def __reduce__(self) -> Any:
        return Path.touch, (RunsCode.mark,)


def codes(mark: Path) -> dict[str, bytes]:
    """Pickles that would create the file `mark` in several ways."""
    RunsCode.mark = mark
    path = str(mark).encode()
    return {
        "reduce": pickle.dumps({"data": RunsCode(), "labels": []}),
        "system": b"cposix\nsystem\n(S'touch " + path + b"'\ntR.",
        "builtins": b"c__builtin__\nopen\n(S'" + path + b"'\nS'w'\ntR.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.",
        "instance": b"(S'" + path + b"'\nios\nmkdir\n.",
        "after a good start": python2_pickle(IMAGES[:2], LABELS[:2])[:-1] + b"0cos\nmkdir\n(S'" + path + b"'\ntR.",
    }


@pytest.mark.parametrize("way", codes(Path()).keys())
def test_code_in_a_pickle_does_not_run(way: str, tmp_path: Path) -> None:
    write_batches(tmp_path, python2_pickle)
    mark = tmp_path / "ran"
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(codes(mark)[way])
    with pytest.raises(UnsafeFile, match=r"test_batch asks for .*, which could run code"):
        load(tmp_path, "test")
    assert not mark.exists()


GOOD = python2_pickle(IMAGES[:10], LABELS[:10])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:-1],
        GOOD[:100],
        b"<html>",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": 3, "labels": [1]}, protocol=2),
        pickle.dumps({"labels": [1]}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 1]}, protocol=2),  # float64
        pickle.dumps({"data": np.zeros((2, 3000), np.uint8), "labels": [1, 1]}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8, order="F"), "labels": [1, 1]}, protocol=2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["one"]}, protocol=2),
        GOOD.replace(b"M\x0a\x00M\x00\x0c", b"M\x0b\x00M\x00\x0c"),  # a row more than there are bytes
        b"cnumpy\ndtype\n}b.",  # state for the class itself
    ],
)
def test_damaged_batches_are_named(content: bytes, tmp_path: Path) -> None:
    write_batches(tmp_path, python2_pickle)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(UnsafeFile, match="test_batch is damaged or no CIFAR batch") as error:
        load(tmp_path, "test")
    assert "\n" not in str(error.value)


def test_what_does_not_fit(tmp_path: Path) -> None:
    write_batches(tmp_path, python2_pickle)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(python2_pickle(IMAGES[:10], LABELS[:9]))
    with pytest.raises(UserError, match="9 labels for 10 images"):
        load(tmp_path, "test")
    (folder / "test_batch").write_bytes(python2_pickle(IMAGES[:10], np.full(10, 10)))
    with pytest.raises(UserError, match="label 10 of image 0"):
        load(tmp_path, "test")
    (folder / "data_batch_4").unlink()
    with pytest.raises(MissingData, match=r"no cifar10\.npz or cifar-10-batches-py/data_batch_4"):
        load(tmp_path, "train")
    small = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=small, y_train=np.arange(4), x_test=small, y_test=np.arange(4))
    with pytest.raises(UserError, match=r"images of shape \(3, 8, 8\); CIFAR-10's are \(3, 32, 32\)"):
        load(tmp_path, "test")

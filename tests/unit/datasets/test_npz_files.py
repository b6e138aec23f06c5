"""The user's own arrays: which layouts are read, and what is refused with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robench.datasets import dataset_facts, open_split
from robench.errors import MissingData, UnsafeFile, UserError
from robench.workspace import Workspace

GENERATOR = np.random.Generator(np.random.PCG64(3))
WORKSPACE = Workspace(root=Path(), data_root=Path(), user_zoo=Path())


def arrays(train: int = 60, test: int = 12, shape: tuple[int, ...] = (5, 4, 3)) -> dict[str, Any]:
    """Training images sorted by class, three classes."""
    return {
        "x_train": GENERATOR.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.sort(np.arange(train) % 3),
        "x_test": GENERATOR.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test, dtype=np.uint8) % 3,
    }


def spread(low: float, high: float) -> Any:
    images = np.full((12, 5, 4, 3), float(low))
    images[-1, -1] = high
    return images


def written(path: Path, content: dict[str, Any]) -> str:
    np.savez(path, **content)
    return f"npz:{path}"


def everything(dataset: str, split: Any) -> Any:
    images = open_split(dataset, split, WORKSPACE)
    return images.read(np.arange(len(images)))


def test_layouts_come_to_the_same(tmp_path: Path) -> None:
    nhwc = arrays()
    nchw = {k: np.moveaxis(v, 3, 1) if k[0] == "x" else v for k, v in nhwc.items()}
    floats = {k: v / np.float32(255) if k[0] == "x" else v for k, v in nhwc.items()}
    compressed = tmp_path / "compressed.npz"
    np.savez_compressed(compressed, **nhwc)
    names = [written(tmp_path / f"{i}.npz", a) for i, a in enumerate((nhwc, nchw, floats))] + [f"npz:{compressed}"]
    for split in ("train", "validation", "test"):
        assert len({open_split(name, split, WORKSPACE).sha256 for name in names}) == 1
    for name in names:
        np.testing.assert_array_equal(everything(name, "test"), nchw["x_test"])


def test_grey_images_without_a_channel_axis(tmp_path: Path) -> None:
    content = arrays(shape=(3, 3))
    name = written(tmp_path / "grey.npz", content)
    np.testing.assert_array_equal(everything(name, "test"), content["x_test"][:, None])


def test_floats_are_rounded_to_the_nearest_byte(tmp_path: Path) -> None:
    content = arrays(test=1, shape=(2, 3))
    values = np.array([[[0.0, 0.0019, 0.002], [0.499, 0.999, 1.0]]])
    name = written(tmp_path / "floats.npz", content | {"x_test": values})
    assert everything(name, "test").tolist() == [[[[0, 0, 1], [127, 255, 255]]]]


def test_splits_of_sorted_training_images(tmp_path: Path) -> None:
    content = arrays(train=300)
    name = written(tmp_path / "sorted.npz", content)
    train, validation = (open_split(name, split, WORKSPACE) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (270, 30)
    assert set(validation.labels.tolist()) == {0, 1, 2}
    pairs = {(image.tobytes(), int(label)) for image, label in zip(content["x_train"], content["y_train"], strict=True)}
    found = [
        (image.transpose(1, 2, 0).tobytes(), int(label))
        for part in (train, validation)
        for image, label in zip(part.read(np.arange(len(part))), part.labels, strict=True)
    ]
    assert set(found) == pairs
    assert len(found) == len(pairs)


def test_facts(tmp_path: Path) -> None:
    facts = dataset_facts(written(tmp_path / "faces.npz", arrays()), WORKSPACE)
    assert (facts.name, facts.image_shape, facts.classes) == ("npz:faces", (3, 5, 4), ("0", "1", "2"))
    assert facts.threats
    assert "user's own" in facts.licence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "has no array y_test; it needs x_train, y_train, x_test, y_test"),
        (
            {"x_test": np.zeros((12, 6, 4, 3), np.uint8)},
            r"training images are \(5, 4, 3\), test images \(6, 4, 3\)",
        ),
        ({"x_train": np.zeros((60, 5, 4, 3), np.int64)}, "x_train is int64; images are uint8, or float"),
        ({"x_train": np.zeros((60, 60), np.uint8)}, r"x_train has shape \(60, 60\)"),
        ({"x_train": np.zeros((60, 5, 4, 2), np.uint8)}, "1 or 3 channels"),
        ({"x_train": np.zeros((60, 3, 4, 3), np.uint8)}, "1 or 3 channels on one of the two"),
        ({"x_train": np.zeros((0, 5, 4, 3), np.uint8)}, r"x_train is empty \(shape \(0, 5, 4, 3\)\); give it images"),
        ({"x_test": np.zeros((0, 5, 4, 3))}, "x_test is empty"),
        ({"x_train": np.uint8(3)}, r"x_train has shape \(\)"),
        ({"x_test": spread(0, 254)}, r"x_test: its images go from 0 to 254; .*, divide by 255$"),
        ({"x_test": spread(-1, 1)}, r"x_test: its images go from -1 to 1; .* in \[0, 1\], take \(x \+ 1\) / 2$"),
        ({"x_test": spread(-2.5, 2.25)}, r"go from -2\.5 to 2\.25; .*, undo their normalisation, or rescale them$"),
        ({"x_test": spread(0, 1.5)}, r"go from 0 to 1\.5; .*, or rescale them$"),
        ({"x_test": spread(0, np.nan)}, r"x_test: its images hold NaN or infinite values; give finite ones"),
        ({"x_test": spread(0, np.inf)}, r"x_test: its images hold NaN or infinite values; give finite ones"),
        ({"y_test": np.zeros(11, np.int64)}, r"y_test is int64 \(11,\); .* each of the 12 images"),
        ({"y_test": np.zeros((12, 3), np.int64)}, r"y_test is int64 \(12, 3\)"),
        ({"y_test": np.zeros(12)}, "y_test is float64"),
        ({"y_test": np.full(12, 3)}, r"label 3 of image 0 is not in 0\.\.2"),
        ({"y_test": np.full(12, -1)}, "label -1 of image 0"),
        ({"y_train": np.arange(60) % 3 + 1}, "y_train goes from 1 to 3 without 0"),
        ({"y_train": np.arange(60) % 3 - 1}, "y_train goes from -1 to 1"),
        ({"y_train": np.arange(60) % 2 * 7}, "y_train goes from 0 to 7 without 1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {k: v for k, v in (arrays() | change).items() if v is not None}
    name = written(tmp_path / "wrong.npz", content)
    with pytest.raises(UserError, match=message) as error:
        open_split(name, "test", WORKSPACE)
    assert str(tmp_path / "wrong.npz") in str(error.value)
    assert "\n" not in str(error.value)


class RunsCode:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(RunsCode.mark),)

    mark = ""


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_pickled_objects_do_not_run(key: str, tmp_path: Path) -> None:
    RunsCode.mark = str(tmp_path / "ran")
    name = written(tmp_path / "evil.npz", arrays() | {key: np.array([RunsCode()], dtype=object)})
    with pytest.raises(UnsafeFile, match=f"{key} holds pickled objects"):
        open_split(name, "test", WORKSPACE)
    assert not (tmp_path / "ran").exists()


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "whole.npz"
    written(path, arrays())
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"x_test.npy") + 400] ^= 1  # a pixel: only the archive's checksum can tell
    for damaged in (content[: len(content) // 2], bytes(flipped), b"", b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(UnsafeFile, match=r"whole\.npz is damaged or no \.npz file"):
            open_split(f"npz:{path}", "test", WORKSPACE)
    with pytest.raises(MissingData, match=r"nowhere\.npz does not exist"):
        open_split(f"npz:{tmp_path / 'nowhere.npz'}", "test", WORKSPACE)


def test_one_training_image_is_not_enough(tmp_path: Path) -> None:
    content = arrays(train=1, test=1)
    with pytest.raises(UserError, match="1 training images"):
        open_split(written(tmp_path / "one.npz", content), "train", WORKSPACE)

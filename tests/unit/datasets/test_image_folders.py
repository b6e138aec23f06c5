"""Image folders: layouts, preparation, order, hash, damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robench.datasets import dataset_facts, open_split
from robench.datasets._folder import central
from robench.errors import MissingData, UnsafeFile, UserError
from robench.workspace import Workspace

WORKSPACE = Workspace(root=Path(), data_root=Path(), user_zoo=Path())


def save(path: Path, value: int = 0, *, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 1, 2)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 20 training and 2 test images; an image's red value tells its class and number."""
    for k, name in enumerate(("ant", "bee", "cat")):
        for i in range(20):
            save(tmp_path / "animals" / "train" / name / f"{i:02}.png", 80 * k + i)
        for i in range(2):
            save(tmp_path / "animals" / "test" / name / f"{i}.png", 80 * k + 40 + i)
    return tmp_path / "animals"


def opened(folder: Path, split: Any = "test") -> Any:
    return open_split(f"folder:{folder}", split, WORKSPACE)


def reds(images: Any) -> list[int]:
    return [int(red) for red in images.read(np.arange(len(images)))[:, 0, 0, 0]]


def test_images_of_one_size_are_taken_as_they_are(folder: Path) -> None:
    images = opened(folder)
    assert images.image_shape == (3, 4, 6)
    assert not images.in_memory
    assert images.classes == ("ant", "bee", "cat")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert reds(images) == [40, 41, 120, 121, 200, 201]
    pixels = images.read(np.array([4, 0]))
    assert pixels[:, :, 3, 5].tolist() == [[200, 1, 2], [40, 1, 2]]


def test_training_images_are_mixed_before_they_are_split(folder: Path) -> None:
    train, validation = opened(folder, "train"), opened(folder, "validation")
    assert (len(train), len(validation)) == (54, 6)
    assert set(validation.labels.tolist()) == {0, 1, 2}
    found = reds(train) + reds(validation)
    assert sorted(found) == sorted(80 * k + i for k in range(3) for i in range(20))
    for images in (train, validation):
        assert [red // 80 for red in reds(images)] == images.labels.tolist()


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "1.png", 7, mode="L")
    assert opened(tmp_path).image_shape == (1, 4, 6)
    assert reds(opened(tmp_path)) == [7, 7]
    save(tmp_path / "b" / "2.png", 9)
    assert opened(tmp_path).image_shape == (3, 4, 6)
    assert reds(opened(tmp_path)) == [7, 7, 9]


def test_images_of_several_sizes_are_resized_and_cropped(folder: Path) -> None:
    before = opened(folder).sha256
    save(folder / "train" / "bee" / "large.png", 5, size=(300, 290))
    images = opened(folder)
    assert images.image_shape == (3, 224, 224)
    assert images.sha256 != before  # the same files, seen otherwise
    assert reds(images) == [40, 41, 120, 121, 200, 201]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (257, 256), (100, 333), (224, 224), (301, 512)])
def test_preparation_is_torchvisions(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = transforms.CenterCrop(224)(transforms.Resize(256)(image))
    np.testing.assert_array_equal(np.asarray(central(image)), np.asarray(expected))


def test_hash_is_of_names_and_sizes(folder: Path) -> None:
    hashes = {opened(folder).sha256}
    (folder / "test" / "ant" / "0.png").rename(folder / "test" / "ant" / "00.png")
    hashes.add(opened(folder).sha256)
    with (folder / "test" / "ant" / "00.png").open("ab") as file:
        file.write(b"\0")
    hashes.add(opened(folder).sha256)
    (folder / "test" / "ant" / "00.png").rename(folder / "test" / "bee" / "00.png")
    hashes.add(opened(folder).sha256)
    assert len(hashes) == 4
    assert replace(opened(folder), resized=True).sha256 not in hashes
    (folder / "test" / "bee" / "notes.txt").write_text("no image")
    (folder / "test" / "bee" / "._1.png").write_text("a Macintosh's shadow file")
    assert opened(folder).sha256 in hashes


def test_layouts(folder: Path) -> None:
    expected = opened(folder).sha256
    (folder / "test").rename(folder / "val")
    assert opened(folder).sha256 == expected
    alone = opened(folder / "val")
    assert alone.sha256 == expected
    for split in ("train", "validation"):
        with pytest.raises(UserError, match="has no train images; put them at"):
            opened(folder / "val", split)
    (folder / "val").rename(folder.parent / "elsewhere")
    with pytest.raises(UserError, match="has no test images"):
        opened(folder)


def test_a_class_without_test_images_keeps_its_label(folder: Path) -> None:
    for path in (folder / "test" / "bee").iterdir():
        path.unlink()
    (folder / "test" / "bee").rmdir()
    assert opened(folder).labels.tolist() == [0, 0, 2, 2]
    assert len(opened(folder).classes) == 3


def test_facts(folder: Path) -> None:
    facts = dataset_facts(f"folder:{folder}/", WORKSPACE)
    assert (facts.name, facts.image_shape, facts.classes) == (
        "folder:animals",
        (3, 4, 6),
        ("ant", "bee", "cat"),
    )


def test_refusals(folder: Path) -> None:
    save(folder / "test" / "dog" / "1.png")
    with pytest.raises(UserError, match="dog is a class without training images"):
        opened(folder)
    (folder / "test" / "dog" / "1.png").unlink()
    with pytest.raises(UserError, match="dog has no images"):
        opened(folder)
    (folder / "test" / "dog").rmdir()
    save(folder / "test" / "cat" / "2.png", 60000, mode="I;16")
    with pytest.raises(UserError, match=r"2\.png has pixels of mode I"):
        opened(folder)
    with pytest.raises(UserError, match="has no class folders"):
        opened(folder / "train" / "cat")
    with pytest.raises(MissingData, match="nowhere is no folder"):
        opened(folder / "nowhere")


def test_damaged_images_are_named(folder: Path) -> None:
    images = opened(folder)
    path = folder / "test" / "bee" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(UnsafeFile, match=r"bee/1\.png is damaged or no image"):
        images.read(np.arange(6))
    assert len(images.read(np.array([0, 1, 2, 4]))) == 4
    path.write_bytes(b"text")
    with pytest.raises(UnsafeFile, match=r"bee/1\.png is damaged or no image"):
        opened(folder)
    save(path, size=(7, 4))
    with pytest.raises(UnsafeFile, match=r"bee/1\.png is 7 x 4 pixels now"):
        images.read(np.array([3]))


def test_small_imagenet(small_imagenet: Path) -> None:
    workspace = Workspace(root=small_imagenet, data_root=small_imagenet, user_zoo=small_imagenet)
    test = open_split("imagenet", "test", workspace)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.read(np.array([5]))[0, 2].mean() == pytest.approx(160, abs=2)  # JPEG
    assert dataset_facts("imagenet", workspace).classes == ("n01440764", "n01443537", "n01484850")
    sizes = [len(open_split("imagenet", split, workspace)) for split in ("train", "validation")]
    assert sizes == [24, 6]

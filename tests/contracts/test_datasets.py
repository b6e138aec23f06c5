"""What holds for every data set of the catalog; a new one is tested by being there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robench.catalog import find, plugins
from robench.datasets import ImageSet, dataset_facts, open_split, select_examples
from robench.errors import MissingData, UserError
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

SPLITS = ("train", "validation", "test")

#: A change here makes every stored result of the data set incomparable: never change it silently.
KNOWN_HASHES = {
    ("digits", "train"): "cf29dcacac129e8f68d8d679993bd88a63029f89c94d6b87f0c214f91106a7bb",
    ("digits", "validation"): "77a73ee01f9524abaca0ae273ab941454a8fa747151e64ae1de71b6bc5d8c96a",
    ("digits", "test"): "bb262245be2ac8c1a676a3ce1bec38ecd252b0ce691fe7f7ea70bf50a91cc006",
    ("mnist", "train"): "5745ed08d7f50cbfd43eaada184bac660180f0eaac6d92ff43b27347f5a6feef",
    ("mnist", "validation"): "4031aaeb9c5b436a5a7ee9918cd15835d3a7ad3a756d51a352ab7db88b290ccc",
    ("mnist", "test"): "b60837c73ad472f5ac9231a7f3190d471d59790899420a5ec9b1b6de6be8c9e4",
    ("cifar10", "train"): "c0202d215e6d66cb5310c22a190297f17c783cef86c10591a64d1f21de655113",
    ("cifar10", "validation"): "e4a151c7941f2c2b88b661f47d134137f96d5f8b59f6fa8d1dd3762c55392aef",
    ("cifar10", "test"): "64cfc1597086403828de5624bc8d4eb795648237d5b289e3b1131f40a913e378",
    ("mnist-5v8-tsne", "train"): "596fc0a32baa1d152fb72e42bf94ecdaea2a63bc565ba2475f1e9cee421df1b0",
    ("mnist-5v8-tsne", "validation"): "bc7b29e98c208e0fe06835813b947b827637f658a928654ff5e63c8187672ad0",
    ("mnist-5v8-tsne", "test"): "9ab2a0173c6e4188db1775984a7dd9fa50eedb0836fc6a572a257e99244258ed",
}
KNOWN_SIZES = {
    "digits": (1148, 200, 449),
    "mnist": (58000, 2000, 10000),
    "cifar10": (48000, 2000, 10000),
    "mnist-5v8-tsne": (1200, 107, 559),
}
BUNDLED = {"digits", "mnist-5v8-tsne"}

Splits = dict[str, ImageSet]

pytestmark = pytest.mark.parametrize("name", sorted(plugins("datasets")))


@pytest.fixture(scope="module")
def workspace_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Workspace]:
    """Where a data set's files are: bundled ones have none, ImageNet has a small stand-in."""
    empty = tmp_path_factory.mktemp("empty")

    def locate(name: str) -> Workspace:
        root: Path = empty
        if name not in BUNDLED:
            root = request.getfixturevalue("small_imagenet" if name == "imagenet" else "data_root")
        return Workspace(root=empty, data_root=root, user_zoo=empty)

    return locate


@pytest.fixture(scope="module")
def splits_of(workspace_of: Callable[[str], Workspace]) -> Callable[[str], Splits]:
    opened: dict[str, Splits] = {}

    def splits(name: str) -> Splits:
        if name not in opened:
            try:
                opened[name] = {split: open_split(name, split, workspace_of(name)) for split in SPLITS}
            except MissingData as error:
                pytest.skip(str(error))
        return opened[name]

    return splits


@pytest.fixture
def splits(name: str, splits_of: Callable[[str], Splits]) -> Splits:
    return splits_of(name)


def some(images: ImageSet, count: int = 24) -> Any:
    """Positions spread over the whole split, out of order."""
    spread = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    return np.concatenate([spread[1::2], spread[::2]])


def test_facts_are_those_of_the_images(name: str, splits: Splits, workspace_of: Any) -> None:
    facts = dataset_facts(name, workspace_of(name))
    assert facts.name == name
    assert facts.licence
    assert len(set(facts.classes)) == len(facts.classes) >= 2
    assert [str(ThreatModel.parse(threat)) for threat in facts.threats] == list(facts.threats) != []
    for images in splits.values():
        assert images.image_shape == facts.image_shape
        assert images.classes == facts.classes


def test_images_are_bytes_that_use_their_range(name: str, splits: Splits) -> None:
    for images in splits.values():
        positions = some(images, 240)  # of images of two pixels, too few would not use it
        pixels = images.read(positions)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(positions), *images.image_shape)
        assert pixels.max() > 200  # [0, 1] truncated to bytes would be 1 at most
        assert pixels.std() > 10


def test_labels_cover_the_classes(name: str, splits: Splits) -> None:
    for split in ("train", "test"):
        labels = splits[split].labels
        assert labels.dtype == np.int64
        assert labels.shape == (len(splits[split]),)
        assert set(labels.tolist()) == set(range(len(splits[split].classes)))


def test_reading_follows_the_positions(name: str, splits: Splits) -> None:
    for images in splits.values():
        positions = some(images)
        together = images.read(positions)
        for row in (0, 1, -1):
            np.testing.assert_array_equal(images.read(positions[row : row + 1 or None])[0], together[row])
        assert images.read(positions[:0]).shape == (0, *images.image_shape)


def test_opening_again_gives_the_same(name: str, splits: Splits, workspace_of: Any) -> None:
    again = open_split(name, "test", workspace_of(name))
    assert again.sha256 == splits["test"].sha256
    np.testing.assert_array_equal(again.labels, splits["test"].labels)
    np.testing.assert_array_equal(again.read(some(again)), splits["test"].read(some(again)))


def test_hashes_and_sizes_are_the_known_ones(name: str, splits: Splits) -> None:
    assert len({images.sha256 for images in splits.values()}) == len(SPLITS)
    if name in KNOWN_SIZES:
        assert tuple(len(splits[split]) for split in SPLITS) == KNOWN_SIZES[name]
        for split in SPLITS:
            assert splits[split].sha256 == KNOWN_HASHES[name, split], split


def test_train_and_validation_are_the_two_ends_of_the_training_images(
    name: str, splits: Splits, workspace_of: Any
) -> None:
    entry = find("datasets", name).load()
    whole = entry.load(workspace_of(name).data_root, "train")
    train, validation = splits["train"], splits["validation"]
    assert len(train) + len(validation) == len(whole)
    assert len(validation) == min(entry.held_out, len(whole) // 5)
    np.testing.assert_array_equal(np.concatenate([train.labels, validation.labels]), whole.labels)
    boundary = np.array([len(train) - 1, len(train)])
    np.testing.assert_array_equal(whole.read(boundary)[0], train.read(np.array([len(train) - 1]))[0])
    np.testing.assert_array_equal(whole.read(boundary)[1], validation.read(np.array([0]))[0])


def test_smaller_selections_are_part_of_larger_ones(name: str, splits: Splits) -> None:
    images = splits["test"]
    everything, positions = select_examples(images, dataset=name, split="test", count=None)
    assert everything.count == everything.split_size == len(images)
    np.testing.assert_array_equal(positions, np.arange(len(images)))
    for count in range(1, min(len(images), 30)):
        examples, fewer = select_examples(images, dataset=name, split="test", count=count)
        _, more = select_examples(images, dataset=name, split="test", count=count + 1)
        assert examples.count == len(fewer) == count
        assert examples.split_sha256 == images.sha256
        assert set(fewer) < set(more)
        assert fewer.tolist() == sorted(fewer)
    with pytest.raises(UserError, match=rf"has {len(images)}, ask for 1 to {len(images)}"):
        select_examples(images, dataset=name, split="test", count=len(images) + 1)

"""Names, splits, selections and arrays: what the data sets share."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from robench.datasets import ArrayImages, dataset_facts, download, open_split, select_examples
from robench.datasets._image_set import fixed_shuffle
from robench.errors import MissingData, StorageError, UnknownName, UserError
from robench.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, data_root=tmp_path / "data", user_zoo=tmp_path / "zoo")


def grey(count: int = 20) -> ArrayImages:
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 1, 2, 2)
    labels = np.arange(count, dtype=np.int64) % 2
    return ArrayImages(images=images, labels=labels, classes=("even", "odd"), origin="here")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from robench.datasets import open_split; from robench.workspace import Workspace;"
        "open_split('digits', 'test', Workspace.locate());"
        "sys.exit(','.join({'torch', 'torchvision', 'scipy', 'pandas', 'sklearn'} & set(sys.modules)) or "
        "None)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_told_apart(workspace: Workspace) -> None:
    with pytest.raises(UnknownName, match="did you mean 'cifar10'"):
        open_split("cifar100", "test", workspace)
    with pytest.raises(UnknownName, match="did you mean 'validation'"):
        open_split("digits", "valid", workspace)
    for name in ("zip:a.zip", "npz:", ":x"):
        with pytest.raises(UserError, match="write folder:PATH or npz:PATH"):
            open_split(name, "test", workspace)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
def test_missing_data_says_how_to_get_it(name: str, workspace: Workspace) -> None:
    for split in ("train", "validation", "test"):
        with pytest.raises(MissingData) as error:
            open_split(name, split, workspace)
        text = str(error.value)
        assert str(workspace.data_root) in text
        assert "--data-root or ROBENCH_DATA" in text
        assert (f"robench data {name}" in text) == (name != "imagenet")
        assert "\n" not in text


def test_digits_are_scikit_learns(workspace: Workspace) -> None:
    from sklearn.datasets import load_digits

    known = load_digits()
    test = np.arange(len(known.target)) % 4 == 3
    for split, rows in (("train", np.flatnonzero(~test)[:-200]), ("test", np.flatnonzero(test))):
        images = open_split("digits", split, workspace)
        pixels = images.read(np.arange(len(images)))
        np.testing.assert_array_equal(images.labels, known.target[rows])
        np.testing.assert_allclose(pixels[:, 0], known.images[rows] * 255 / 16, atol=0.5)
        np.testing.assert_array_equal(np.unique(pixels), np.rint(np.arange(17) * 255 / 16))


def test_fixed_shuffle_is_splitmix64() -> None:
    # The first outputs of the published generator for seed 0 are e220a8397b1dcdaf, 6e789e6aa1b965f4,
    # 06c45d188009454f and f88bb8a8724c81ec, so the third is the smallest, the second comes next, ...
    assert fixed_shuffle(4).tolist() == [2, 1, 0, 3]
    assert sorted(fixed_shuffle(5000).tolist()) == list(range(5000))
    assert abs(np.corrcoef(fixed_shuffle(5000), np.arange(5000))[0, 1]) < 0.05
    assert fixed_shuffle(0).tolist() == []


def test_hash_changes_with_every_part() -> None:
    one = grey()
    changed_pixel, changed_label = one.images.copy(), one.labels.copy()
    changed_pixel[7, 0, 1, 1] += 1
    changed_label[7] = 0
    variants = [
        one,
        one.part(0, 19),
        one.part(1, 20),
        ArrayImages(images=changed_pixel, labels=one.labels, classes=one.classes, origin="here"),
        ArrayImages(images=one.images, labels=changed_label, classes=one.classes, origin="here"),
        ArrayImages(images=one.images.reshape(20, 1, 1, 4), labels=one.labels, classes=one.classes, origin="here"),
    ]
    assert len({images.sha256 for images in variants}) == len(variants)
    strided = ArrayImages(
        images=np.asfortranarray(one.images), labels=one.labels, classes=one.classes, origin="elsewhere"
    )
    assert strided.sha256 == one.sha256


def test_parts_share_memory_and_readings_do_not() -> None:
    one = grey()
    assert np.shares_memory(one.part(3, 9).images, one.images)
    reading = one.read(np.array([3]))
    reading[:] = 0
    assert one.images[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((20, 1, 2, 2), np.float32)}, r"images are float32 \(20, 1, 2, 2\), not uint8"),
        ({"images": np.zeros((20, 2, 2), np.uint8)}, "not uint8"),
        ({"labels": np.zeros(19, np.int64)}, "not one int64 for each of 20 images"),
        ({"labels": np.zeros(20, np.int32)}, "labels are int32"),
        ({"labels": np.full(20, 2)}, r"here: label 2 of image 0 is not in 0\.\.1"),
        ({"labels": np.full(20, -1)}, "label -1"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    one = grey()
    fields = {"images": one.images, "labels": one.labels, "classes": one.classes, "origin": "here"}
    with pytest.raises(UserError, match=message):
        ArrayImages(**(fields | change))


def test_selection_is_recorded_without_paths() -> None:
    examples, positions = select_examples(grey(), dataset="npz:/home/me/faces.v2.npz", split="test", count=3)
    assert examples.dataset == "npz:faces.v2"
    assert examples.ids_sha256 == hashlib.sha256(b"".join(int(p).to_bytes(8, "little") for p in positions)).hexdigest()
    for count in (0, -1, 21):
        with pytest.raises(UserError, match=f"{count} examples of digits test cannot be chosen; it has 20"):
            select_examples(grey(), dataset="digits", split="test", count=count)


def test_selections_stay_what_they_are(workspace: Workspace) -> None:
    # Stored results of a selection are compared with new ones by these ids.
    images = open_split("digits", "test", workspace)
    _, positions = select_examples(images, dataset="digits", split="test", count=5)
    assert positions.tolist() == [203, 254, 319, 366, 410]


def test_facts_of_catalog_data_need_no_files(workspace: Workspace) -> None:
    facts = dataset_facts("cifar10", workspace)
    assert facts.classes[:2] == ("airplane", "automobile")
    assert facts.threats[0] == "Linf@8/255"


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for torchvision: records what is asked for, fails with `error` where one is set."""
    asked: list[tuple[str, str, bool, bool]] = []
    fake = SimpleNamespace(asked=asked, error=None)

    def downloader(name: str) -> Any:
        def fetch(root: str, *, train: bool, download: bool) -> None:
            if fake.error is not None:
                (Path(root) / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
                raise fake.error
            asked.append((name, root, train, download))

        return fetch

    datasets = ModuleType("torchvision.datasets")
    datasets.MNIST, datasets.CIFAR10 = downloader("MNIST"), downloader("CIFAR10")
    package = ModuleType("torchvision")
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return fake


@pytest.mark.parametrize(("name", "cls"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_download_asks_torchvision(name: str, cls: str, tmp_path: Path, torchvision: SimpleNamespace) -> None:
    root = tmp_path / "new" / "root"
    download(name, root)
    assert torchvision.asked == [(cls, str(root), train, True) for train in (True, False)]
    assert root.is_dir()


def test_an_offline_download_says_in_one_line_what_to_put_where(tmp_path: Path, torchvision: SimpleNamespace) -> None:
    torchvision.error = RuntimeError("Error downloading x.gz:\nTried http://a/, got:\n<urlopen error>\n")
    root = tmp_path / "new" / "root"
    with pytest.raises(MissingData) as caught:
        download("mnist", root)
    message = str(caught.value)
    assert "\n" not in message
    assert "Tried http://a/, got: <urlopen error>; try again" in message
    assert message.endswith(f"t10k-labels-idx1-ubyte.gz into {root}/MNIST/raw")
    assert list(tmp_path.iterdir()) == []
    (root / "MNIST" / "raw").mkdir(parents=True)
    with pytest.raises(MissingData):
        download("mnist", root)
    assert (root / "MNIST" / "raw").is_dir()
    with pytest.raises(MissingData, match=rf"or put the folder cifar-10-batches-py .* into {root}$"):
        download("cifar10", root)


def test_download_failures(tmp_path: Path, torchvision: SimpleNamespace) -> None:
    torchvision.error = RuntimeError("Error downloading train-images")
    with pytest.raises(MissingData, match=r"mnist could not be downloaded into .*: Error downloading"):
        download("mnist", tmp_path)
    torchvision.error = URLError("no route to host")
    with pytest.raises(MissingData, match="no route to host"):
        download("mnist", tmp_path)
    for number in (errno.EACCES, errno.EROFS, errno.ENOSPC):
        torchvision.error = OSError(number, os.strerror(number))
        with pytest.raises(StorageError, match=rf"cannot be written \({os.strerror(number)}\)"):
            download("mnist", tmp_path)
    with pytest.raises(UserError, match="imagenet is not for download"):
        download("imagenet", tmp_path)
    with pytest.raises(UnknownName, match="did you mean 'mnist'"):
        download("mnst", tmp_path)

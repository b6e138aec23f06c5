"""ImageNet (ILSVRC 2012) in torchvision's folder layout, decoded while it is read."""

from __future__ import annotations

from pathlib import Path

from robench.catalog import DatasetEntry
from robench.datasets._download import missing
from robench.datasets._folder import CROP, FileImages, listed


def load(root: Path, split: str) -> FileImages:
    """Return the images of `root/imagenet/train/WNID/` (train) or `root/imagenet/val/WNID/` (test).

    Classes are the sorted WordNet ids. Test images are ordered by class, then file name; training images take
    a fixed shuffle of that order. Each is resized to a shorter side of 256 and cropped to the central 224 x
    224.
    """
    places = {"train": root / "imagenet" / "train", "test": root / "imagenet" / "val"}
    folders = {name: folder for name, folder in places.items() if folder.is_dir()}
    if split not in folders:
        raise missing("imagenet", root, f"imagenet/{places[split].name}/WNID/*.JPEG")
    return listed(folders, split, image_shape=(3, CROP, CROP), resized=True)


ENTRY = DatasetEntry(
    name="imagenet",
    load=load,
    summary="ILSVRC 2012: 1.28 million photographs of 1,000 classes; the published validation split is test",
    source="Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge, 2015; image-net.org",
    licence="non-commercial research and education only (ImageNet's terms of access)",
    classes=(),  # the folders' names
    image_shape=(3, 224, 224),
    held_out=10000,
    images={"train": 1281167, "test": 50000},
    threats=("Linf@4/255", "L2@3"),
)

"""Image folders: one folder for each class, one file for each image, decoded when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from robench.datasets._image_set import Pixels, Positions, fixed_shuffle
from robench.errors import MissingData, UnsafeFile, UserError

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
#: ImageNet's usual preparation: the shorter side to 256 pixels, then the central 224 x 224.
SHORTER_SIDE, CROP = 256, 224
WORKERS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class FileImages:
    """Images decoded from files by a pool of threads whenever they are read; nothing is kept."""

    root: Path
    files: tuple[str, ...]
    """CLASS/FILE below `root`."""
    labels: Positions
    """(N,) int64 in [0, K)."""
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width); one channel is grey, three are RGB."""
    resized: bool
    """Whether images are resized and cropped; else all of them have `image_shape`."""

    @property
    def in_memory(self) -> bool:
        """Return False."""
        return False

    @cached_property
    def sha256(self) -> str:
        """Return the hash of the preparation, the classes, and every file's name and content, sorted by name."""
        digest = hashlib.sha256(f"files {self.image_shape} resized={self.resized} {self.classes}\n".encode())
        files = sorted(self.files)
        with ThreadPoolExecutor() as readers:
            for file, content in zip(files, readers.map(self._content_sha256, files), strict=True):
                digest.update(os.fsencode(f"{file} {content}\n"))
        return digest.hexdigest()

    def _content_sha256(self, file: str) -> str:
        with (self.root / file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, positions: Positions) -> Pixels:
        """Return the images at `positions` (n,) as (n, C, H, W) uint8; UnsafeFile names a damaged file."""
        images = np.empty((len(positions), *self.image_shape), np.uint8)
        with ThreadPoolExecutor(WORKERS) as pool:
            for row, image in enumerate(pool.map(self._decode, positions.tolist())):
                images[row] = image
        return images

    def part(self, start: int, stop: int) -> Self:
        """Return the images from `start` up to, not including, `stop`."""
        return replace(self, files=self.files[start:stop], labels=self.labels[start:stop])

    def _decode(self, position: int) -> Pixels:
        path = self.root / self.files[position]
        channels, *size = self.image_shape
        with _opened(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
        if self.resized:
            image = central(image)
        elif [image.height, image.width] != size:
            raise UnsafeFile(f"{path} is {image.width} x {image.height} pixels now; its folder changed while in use")
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def central(image: Image.Image) -> Image.Image:
    """Return the central 224 x 224 pixels of the image resized (bilinear) to a shorter side of 256.

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them, so that published models
    see the pixels they were measured on.
    """
    shorter = min(image.size)
    width, height = (SHORTER_SIDE * side // shorter for side in image.size)
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + CROP, top + CROP))


def load(path: Path, split: str) -> FileImages:
    """Return the `train` or `test` split of an image folder.

    The folder holds `train/CLASS/FILE` and `test/CLASS/FILE` (or `val/`), or just `CLASS/FILE`, all of it
    test images. Images of one size are taken as they are (grey if all are), others are resized and cropped as
    ImageNet's. Raises MissingData, UserError for a folder without that layout, UnsafeFile for files that are
    no images.
    """
    folders = split_folders(path)
    if split not in folders:
        raise UserError(f"{path} has no {split} images; put them at {path}/{split}/CLASS/FILE")
    shape = _common_shape(folders)
    return listed(folders, split, image_shape=shape or (3, CROP, CROP), resized=shape is None)


def split_folders(path: Path) -> Mapping[str, Path]:
    """Return the folders of the training and the test images that exist; `test/` goes before `val/`."""
    if not path.is_dir():
        raise MissingData(f"{path} is no folder; name one that holds train/CLASS/FILE and test/CLASS/FILE")
    places = {"train": [path / "train"], "test": [path / "test", path / "val"]}
    found = {split: next((f for f in options if f.is_dir()), None) for split, options in places.items()}
    return {split: folder for split, folder in found.items() if folder} or {"test": path}


def listed(folders: Mapping[str, Path], split: str, *, image_shape: tuple[int, int, int], resized: bool) -> FileImages:
    """Return a split's files without opening them.

    The classes are the names of the training folders (of the test folders, where there is no training split),
    sorted. Test images are ordered by class, then name; training images take a fixed shuffle of that order,
    so that the validation split holds all classes.
    """
    names = _files(folders[split])
    classes = tuple(_class_folders(folders.get("train", folders[split])))
    unknown = sorted(names.keys() - set(classes))
    if unknown:
        raise UserError(f"{folders[split] / unknown[0]} is a class without training images in {folders['train']}")
    files = [f"{name}/{file}" for name in classes for file in names.get(name, ())]
    labels = np.array([k for k, name in enumerate(classes) for _ in names.get(name, ())], np.int64)
    if split == "train":
        order = fixed_shuffle(len(files))
        files, labels = [files[p] for p in order], labels[order]
    return FileImages(
        root=folders[split],
        files=tuple(files),
        labels=labels,
        classes=classes,
        image_shape=image_shape,
        resized=resized,
    )


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; images belong at {folder}/CLASS/FILE")
    return names


def _files(folder: Path) -> dict[str, list[str]]:
    """Return the names of each class's image files, sorted."""
    found = {}
    for name in _class_folders(folder):
        files = (f for f in os.listdir(folder / name) if not f.startswith("."))
        found[name] = sorted(f for f in files if os.path.splitext(f)[1].lower() in SUFFIXES)
        if not found[name]:
            raise UserError(f"{folder / name} has no images ({', '.join(sorted(SUFFIXES))})")
    return found


def _common_shape(folders: Mapping[str, Path]) -> tuple[int, int, int] | None:
    """Return the shape that all images of all splits have, or None; only the files' headers are read."""
    sizes, modes = set(), set()
    for folder in folders.values():
        for name, files in _files(folder).items():
            for file in files:
                with _opened(folder / name / file) as image:
                    sizes.add(image.size)
                    modes.add(image.mode)
                if len(sizes) > 1:
                    return None
    ((width, height),) = sizes
    return (1 if modes <= {"1", "L"} else 3), height, width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Give an image of which only the header is read yet."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise UserError(f"{path} has pixels of mode {image.mode}; images have 8 bits a channel")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports damage in all of these ways.
        raise UnsafeFile(f"{path} is damaged or no image: {error}") from None

"""What tests of several parts share: real data where it can be had, and a small stand-in for ImageNet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXPAND = Path(__file__).parents[2] / "shared" / "data" / "expand.py"


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real MNIST and CIFAR-10."""
    given = os.environ.get("ROBENCH_DATA")
    if given and (Path(given) / "MNIST" / "raw").is_dir():
        return Path(given)
    if not EXPAND.is_file():
        pytest.skip(
            "no real data: ROBENCH_DATA names no folder with MNIST/raw, and ../shared/data is not there"
        )
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(EXPAND), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def small_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 30 + 6 images of 3 classes in ImageNet's layout, smooth and of several sizes."""
    root = tmp_path_factory.mktemp("small-imagenet")
    for split, count in (("train", 10), ("val", 2)):
        for k, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                across, down = np.meshgrid(
                    np.linspace(0, 255, 300 + 10 * i), np.linspace(0, 255, 260 + 30 * k)
                )
                pixels = np.stack([across, down, np.full_like(down, 80 * k)], axis=2).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")
    return root

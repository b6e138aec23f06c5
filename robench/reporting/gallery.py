"""Adversarial examples as pictures, from the images that `eval --save-adversarials` kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from PIL import Image

from robench.errors import UnsafeFile
from robench.records import EvalRecord
from robench.reporting.pictures import Pictures, address
from robench.store import Rows

#: Images of one evaluation.
_SHOWN = 8


@dataclass(frozen=True)
class Fallen:
    """One image that fell: addresses of pictures, and what the model says of it."""

    example: int
    label: str
    prediction: str
    distance: float
    clean: str | None
    adversarial: str
    change: str | None
    """What was added, grey where nothing was, scaled so that the largest change is black or white."""


@dataclass(frozen=True)
class Gallery:
    """The first images that fell in one evaluation."""

    record: EvalRecord
    images: tuple[Fallen, ...]
    missing: str | None


def saved_images(reports: Path, record: EvalRecord) -> Path | None:
    """Return the file of a record's images, where they were kept."""
    path = reports / "adversarials" / f"{record.spec.identity}.safetensors"
    return path if record.status == "complete" and path.is_file() else None


def gallery(path: Path, record: EvalRecord, rows: Rows, pictures: Pictures) -> Gallery | None:
    """Return pictures of the first images that fell, None where none did.

    Raises UnsafeFile for a file that is damaged or another record's.
    """
    ids = rows["example_id"]
    fell = np.flatnonzero(rows["attacked"] & ~rows["robust"])
    try:
        with safetensors.safe_open(path, framework="np") as file:
            facts, kept = file.metadata() or {}, file.get_tensor("example_ids")
            if (facts.get("identity"), facts.get("weights_sha256")) != (
                record.spec.identity,
                record.spec.model.weights_sha256,
            ):
                raise UnsafeFile(f"{path} holds images of another question; delete it")
            fell = fell[np.isin(ids[fell], kept)][:_SHOWN]
            places = np.searchsorted(kept, ids[fell])
            images = [file.get_slice("adversarial_images")[int(p) : int(p) + 1][0] for p in places]
    except (safetensors.SafetensorError, OSError) as error:
        raise UnsafeFile(f"{path} cannot be read ({error}); delete it and evaluate again") from None
    if not images:
        return None
    album = pictures.album(record.spec.examples, ids[fell].tolist())
    lengths = rows[record.spec.threat.norm.lower()]
    shown = []
    for place, image in zip(fell.tolist(), images, strict=True):
        example = int(ids[place])
        clean = album.pictures.get(example)
        shown.append(
            Fallen(
                example,
                _name(album.classes, int(rows["label"][place])),
                _name(album.classes, int(rows["adversarial_prediction"][place])),
                float(lengths[place]),
                clean,
                address((np.clip(image, 0, 1) * 255).round().astype(np.uint8)),
                _change(image, clean),
            )
        )
    return Gallery(record, tuple(shown), album.missing)


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _change(image: NDArray[Any], clean: str | None) -> str | None:
    """Return what was added to the clean picture; None where that is not at hand pixel by pixel."""
    if clean is None or not clean.startswith("data:image/png"):
        return None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(clean.partition(",")[2]))), np.float64) / 255
    before = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if before.shape != image.shape:
        return None
    added = image - before
    largest = max(float(np.abs(added).max()), 1e-12)
    return address((127.5 + 127.5 * added / largest).round().astype(np.uint8))

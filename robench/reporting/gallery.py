"""Adversarial examples as pictures, from the images that `eval --save-adversarials` kept.

Those images are large and stay where they were made. The few pictures that pages show of them are kept as all pictures
are (:mod:`robench.reporting.pictures`), so that a site comes out the same without the images.
"""

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
from robench.reporting.pictures import FallenPicture, Pictures, address, picture
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


def can_be_shown(record: EvalRecord, pictures: Pictures) -> bool:
    """Tell whether images of a record, or pictures of them, were kept."""
    return saved_images(pictures.root, record) is not None or pictures.fallen(record) is not None


def gallery(record: EvalRecord, rows: Rows, pictures: Pictures) -> Gallery | None:
    """Return pictures of the first images that fell, None where none did or none were kept.

    Raises UnsafeFile for images that are damaged or another record's, UserError for damaged pictures.
    """
    fell = fallen_rows(rows)
    path = saved_images(pictures.root, record)
    images = {} if path is None else _read(path, record, rows["example_id"][fell])
    known = pictures.fallen(record) or {}
    fell = fell[np.isin(rows["example_id"][fell], list(known if path is None else images))][:_SHOWN]
    if len(fell) == 0:
        return None
    ids = rows["example_id"][fell].tolist()
    album = pictures.album(record.spec.examples, ids)
    if path is not None:
        known = {i: _taken(images[i], album.pictures.get(i)) for i in ids}
        pictures.keep_fallen(record, known)
    lengths = rows[record.spec.threat.norm.lower()]
    shown = tuple(
        Fallen(
            example,
            _name(album.classes, int(rows["label"][place])),
            _name(album.classes, int(rows["adversarial_prediction"][place])),
            float(lengths[place]),
            album.pictures.get(example),
            address(known[example].adversarial),
            address(change) if (change := known[example].change) else None,
        )
        for place, example in zip(fell.tolist(), ids, strict=True)
    )
    return Gallery(record, shown, album.missing)


def fallen_rows(rows: Rows) -> NDArray[np.intp]:
    """Return the positions of the images that were right, and fell."""
    return np.flatnonzero(rows["attacked"] & ~rows["robust"])


def _read(path: Path, record: EvalRecord, ids: NDArray[np.int64]) -> dict[int, NDArray[Any]]:
    """Return the first of these examples' images that the file holds."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            facts, kept = file.metadata() or {}, file.get_tensor("example_ids")
            if (facts.get("identity"), facts.get("weights_sha256")) != (
                record.spec.identity,
                record.spec.model.weights_sha256,
            ):
                raise UnsafeFile(f"{path} holds images of another question; delete it")
            found = ids[np.isin(ids, kept)][:_SHOWN]
            places = np.searchsorted(kept, found)
            images = file.get_slice("adversarial_images")
            return {int(i): images[int(p) : int(p) + 1][0] for i, p in zip(found, places, strict=True)}
    except (safetensors.SafetensorError, OSError) as error:
        raise UnsafeFile(f"{path} cannot be read ({error}); delete it and evaluate again") from None


def _taken(image: NDArray[Any], clean: str | None) -> FallenPicture:
    return FallenPicture(picture((np.clip(image, 0, 1) * 255).round().astype(np.uint8)), _change(image, clean))


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _change(image: NDArray[Any], clean: str | None) -> str | None:
    """Return a picture of what was added to the clean one; None where that is not at hand pixel by pixel."""
    if clean is None or not clean.startswith("data:image/png"):
        return None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(clean.partition(",")[2]))), np.float64) / 255
    before = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if before.shape != image.shape:
        return None
    added = image - before
    largest = max(float(np.abs(added).max()), 1e-12)
    return picture((127.5 + 127.5 * added / largest).round().astype(np.uint8))

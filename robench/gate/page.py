"""One check as an HTML page that needs no other file, with pictures of the examples that newly fail."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from robench.datasets import ImageSet, Pixels, open_split
from robench.errors import UserError
from robench.gate import rendering
from robench.gate.verdicts import Check, Verdict
from robench.records import Examples
from robench.reporting.site import environment
from robench.workspace import Workspace

#: So many pictures show what kind of example fails; all ids are in the JSON.
_SHOWN = 40


@dataclass(frozen=True)
class Picture:
    """One example."""

    id: int
    label: str
    read_as: str | None
    source: str
    """As a data URL."""


@dataclass(frozen=True)
class Gallery:
    """The examples of one verdict that newly fail."""

    verdict: Verdict
    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    without: str
    """Why there are no pictures; empty where there are."""


def page(check: Check, workspace: Workspace) -> str:
    """Return the page; the images are those of the data set as far as it is on this machine."""
    splits: dict[Examples, ImageSet | str] = {}
    galleries = [_gallery(v, splits, workspace) for v in check.verdicts if v.kind == "worse" and v.lost is not None]
    return (
        environment()
        .get_template("check.html")
        .render(
            check=check,
            headline=rendering.headline(check),
            columns=rendering.COLUMNS,
            rows=[(verdict.kind, rendering.cells(verdict)) for verdict in check.verdicts],
            words=[rendering.line(verdict) for verdict in rendering.notable(check)],
            rule=rendering.rule(check),
            galleries=[gallery for gallery in galleries if gallery.ids],
            line=rendering.line,
            folder=Path(),
            link=lambda target: target.as_posix(),
        )
    )


def _gallery(verdict: Verdict, splits: dict[Examples, ImageSet | str], workspace: Workspace) -> Gallery:
    assert verdict.lost is not None
    assert verdict.spec is not None
    examples = verdict.spec.examples
    if examples not in splits:
        splits[examples] = _opened(examples, workspace)
    images, ids = splits[examples], tuple(verdict.lost.tolist())
    if isinstance(images, str):
        return Gallery(verdict, ids, (), images)
    shown = verdict.lost[:_SHOWN]
    read_as = [None] * len(shown) if verdict.read_as is None else [_name(images, i) for i in verdict.read_as[:_SHOWN]]
    pixels = images.read(shown)
    pictures = [
        Picture(int(i), _name(images, images.labels[i]), name, _data_url(own))
        for i, name, own in zip(shown, read_as, pixels, strict=True)
    ]
    return Gallery(verdict, ids, tuple(pictures), "")


def _name(images: ImageSet, index: int) -> str:
    return images.classes[index] if 0 <= index < len(images.classes) else "no answer"


def _opened(examples: Examples, workspace: Workspace) -> ImageSet | str:
    """Return the split, or why its pictures cannot be shown."""
    if ":" in examples.dataset:
        return f"no pictures: records do not say in which folder {examples.dataset} lies"
    try:
        images = open_split(examples.dataset, examples.split, workspace)
    except UserError as error:
        return f"no pictures: {error}"
    if images.sha256 != examples.split_sha256:
        return f"no pictures: {examples.dataset} on this machine has other {examples.split} images than were evaluated"
    return images


def _data_url(pixels: Pixels) -> str:
    """Return `(C, H, W)` uint8 as a PNG in a URL."""
    across = np.moveaxis(pixels, 0, -1)
    picture = Image.fromarray(across[..., 0] if across.shape[-1] == 1 else across)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""Small pictures of examples, for pages that show them: taken from the data where they are at hand, and kept.

::

    reports/pictures/<data set>-<split>-<sha256[:8]>.json    {"classes": [...], "pictures": {example id: picture}}
    reports/pictures/fallen-<identity>.json                  {"outcomes_sha256": ..., "pictures": {example id: [after
                                                             an evaluation's attack, what it added or null]}}

A picture is the base64 text of a PNG file with the very pixels, or, of images larger than 64 pixels, of a JPEG file
that is not larger. What was taken once is read from there, so that a site comes out the same on a machine without data.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robench.datasets import ImageSet
from robench.errors import UserError
from robench.records import EvalRecord, Examples
from robench.store import file_name

#: No side of a picture is longer.
_LARGEST = 64
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Album:
    """The pictures of one split that a page may show."""

    pictures: Mapping[int, str]
    """`data:` addresses by example id."""
    classes: Sequence[str]
    """Names by label; empty where they are not known."""
    missing: str | None
    """Why some are not there, as one sentence."""


class FallenPicture(NamedTuple):
    """An adversarial example."""

    adversarial: str
    change: str | None


@dataclass
class Pictures:
    """The pictures of one reports folder. Nothing is written until somebody asks for :meth:`files`."""

    root: Path
    open_images: Callable[[Examples], ImageSet] | None = None
    """Returns the images of a split, or raises UserError where they are not at hand; None: never at hand."""
    _known: dict[Path, dict[str, Any]] = field(default_factory=dict)
    _fallen: dict[Path, tuple[str, dict[int, FallenPicture]] | None] = field(default_factory=dict)
    _changed: set[Path] = field(default_factory=set)
    _opened: dict[str, ImageSet | str] = field(default_factory=dict)

    def album(self, examples: Examples, ids: Iterable[int]) -> Album:
        """Return the pictures of these examples, as far as they can be had; raise UserError for a damaged file."""
        path = self._path(examples)
        known, wanted = self._load(path), sorted(set(ids))
        absent, reason = [i for i in wanted if str(i) not in known["pictures"]], None
        if absent or not known["classes"]:
            images = self._images(examples)
            if isinstance(images, str):
                reason = images if absent else None
            else:
                known["classes"] = list(images.classes)
                for i, pixels in zip(absent, images.read(np.array(absent, np.int64)), strict=True):
                    known["pictures"][str(i)] = picture(pixels)
                self._changed.add(path)
        taken = {i: address(known["pictures"][str(i)]) for i in wanted if str(i) in known["pictures"]}
        return Album(taken, known["classes"], reason)

    def fallen(self, record: EvalRecord) -> dict[int, FallenPicture] | None:
        """Return the pictures of adversarial examples that were kept of just this answer, by example id.

        None where there are none; raises UserError for a damaged file.
        """
        path = self._path_of_fallen(record)
        if path not in self._fallen:
            self._fallen[path] = _read_fallen(path) if path.is_file() else None
        found = self._fallen[path]
        return found[1] if found and found[0] == record.outcomes_sha256 else None

    def keep_fallen(self, record: EvalRecord, pictures: Mapping[int, FallenPicture]) -> None:
        """Keep pictures of adversarial examples, in the place of earlier ones."""
        path, found = self._path_of_fallen(record), (str(record.outcomes_sha256), dict(pictures))
        if self.fallen(record) != found[1]:
            self._fallen[path] = found
            self._changed.add(path)

    def files(self) -> dict[Path, str]:
        """Return what is to be written so that the pictures are there next time."""
        return {
            path: _text(self._known[path]) if path in self._known else _text_of_fallen(self._fallen[path])
            for path in sorted(self._changed)
        }

    def _path_of_fallen(self, record: EvalRecord) -> Path:
        return self.root / "pictures" / f"fallen-{record.spec.identity}.json"

    def _path(self, examples: Examples) -> Path:
        name = f"{file_name(examples.dataset)}-{examples.split}-{examples.split_sha256[:8]}.json"
        return self.root / "pictures" / name

    def _load(self, path: Path) -> dict[str, Any]:
        if path not in self._known:
            found: dict[str, Any] = {"classes": [], "pictures": {}}
            if path.is_file():
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                    texts, classes = found["pictures"].values(), found["classes"]
                    sound = all(_BASE64.fullmatch(t) for t in texts) and all(isinstance(c, str) for c in classes)
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    sound = False
                if not sound:
                    raise UserError(f"{path} holds no pictures; delete it, it is made again where the data are at hand")
            self._known[path] = found
        return self._known[path]

    def _images(self, examples: Examples) -> ImageSet | str:
        """Return the split's images, or why they are not to be had."""
        if examples.split_sha256 not in self._opened:
            self._opened[examples.split_sha256] = self._open(examples)
        return self._opened[examples.split_sha256]

    def _open(self, examples: Examples) -> ImageSet | str:
        where = "on the machine that made this page"
        if self.open_images is None:
            return f"The images of {examples.dataset} were not looked for {where}."
        try:
            images = self.open_images(examples)
        except UserError:
            return f"The images of {examples.dataset} were not at hand {where}."
        if images.sha256 != examples.split_sha256:
            return f"The images of {examples.dataset} {where} are not those that were evaluated."
        return images


def picture(pixels: NDArray[np.uint8]) -> str:
    """Return an image `(C, H, W)` uint8 as the base64 text of a small file; the same pixels give the same text."""
    drawn = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels[:3], 0, -1))
    file = io.BytesIO()
    if max(drawn.size) > _LARGEST:
        drawn.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        drawn.save(file, format="JPEG", quality=80)
    else:
        drawn.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def address(text: str) -> str:
    """Return a picture as a `data:` address."""
    return f"data:image/{'jpeg' if text.startswith('/9j/') else 'png'};base64,{text}"


def _text(known: Mapping[str, Any]) -> str:
    """Return the file: a line for each picture, in order of id, so that changes are easy to see."""
    ordered = {
        "classes": known["classes"],
        "pictures": dict(sorted(known["pictures"].items(), key=lambda p: int(p[0]))),
    }
    return json.dumps(ordered, indent=0, ensure_ascii=False) + "\n"


def _read_fallen(path: Path) -> tuple[str, dict[int, FallenPicture]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pictures = {int(i): FallenPicture(*pair) for i, pair in found["pictures"].items()}
        texts = [text for pair in pictures.values() for text in pair if text is not None]
        if isinstance(found["outcomes_sha256"], str) and all(_BASE64.fullmatch(text) for text in texts):
            return found["outcomes_sha256"], pictures
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} holds no pictures; delete it, robench eval --save-adversarials makes it again")


def _text_of_fallen(found: tuple[str, Mapping[int, FallenPicture]] | None) -> str:
    assert found is not None
    outcomes, pictures = found
    ordered = {"outcomes_sha256": outcomes, "pictures": dict(sorted(pictures.items()))}
    return json.dumps(ordered, indent=0) + "\n"

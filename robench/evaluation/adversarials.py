"""Saved adversarial images: they stand beside their record, and are believed only after a second look.

::

    reports/adversarials/<identity>.safetensors                      the images of a record
    reports/.work/<identity>.<code>-<first id>-<rows>.safetensors    those of a finished shard of unfinished work

A file holds `example_ids` (N,) int64, ascending, and `adversarial_images` (N, C, H, W) in [0, 1], in the precision of
the judge (float32; float64 where the search was fp64), so that not even rounding stands between an image and its
verdict. Its metadata say of which question and which weights they are, and whether examples that are wrong without an
attack were attacked all the same (`misclassified`): a record needs no such images, a transfer to other models does.
:mod:`robench.evaluation.second_look` takes that look; here is only what a file is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from robench.errors import UnsafeFile, UserError
from robench.planning import journal_key
from robench.records import EvalRecord, EvalSpec
from robench.store import publish

Misclassified = Literal["left", "attacked"]
"""What stands for an example that is wrong without an attack: its clean image, or what the attack makes of it."""

_IDS, _IMAGES = "example_ids", "adversarial_images"


@dataclass(frozen=True)
class SavedAdversarials:
    """One file, opened; images are read when asked for."""

    path: Path
    identity: str
    """Of the question that they answer."""
    weights_sha256: str
    misclassified: Misclassified
    ids: NDArray[np.int64]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the images `(stop - start, C, H, W)` from one position of `ids` to another."""
        with safe_open(self.path, framework="np") as file:
            images: NDArray[Any] = file.get_slice(_IMAGES)[start:stop]
        return images


class AdversarialFiles:
    """The saved adversarial images in one reports folder."""

    def __init__(self, root: Path) -> None:
        """Look at `root` (a workspace's `reports/`)."""
        self.root = root

    def path(self, spec: EvalSpec) -> Path:
        """Return where the images of a question stand, or would stand."""
        return self.root / "adversarials" / f"{spec.identity}.safetensors"

    def has(self, spec: EvalSpec, misclassified: Misclassified) -> bool:
        """Tell whether there is a readable file; one with more attacked images than asked for will do."""
        with suppress(UserError):
            found = self._open(self.path(spec))
            return found.identity == spec.identity and misclassified in {"left", found.misclassified}
        return False

    def open(self, record: EvalRecord) -> SavedAdversarials:
        """Return the images of a record, of which nothing but whose they are is believed yet; raise UnsafeFile."""
        path = self.path(record.spec)
        if not path.exists():
            raise UnsafeFile(
                f"there are no saved images of record {record.spec.identity} ({path}); evaluate it again with "
                "--save-adversarials"
            )
        found = self._open(path)
        asked = record.spec.identity, record.spec.model.weights_sha256
        if (found.identity, found.weights_sha256) != asked:
            raise unfit(path, f"it holds images of question {found.identity}, not of {record.spec.identity}")
        return found

    def keep(self, spec: EvalSpec, ids: NDArray[np.int64], images: NDArray[Any], misclassified: Misclassified) -> None:
        """Keep the images of a finished shard until the record is complete."""
        path = self.root / ".work" / f"{journal_key(spec)}-{ids[0]}-{len(ids)}.safetensors"
        publish(path, _packed(spec, ids, images, misclassified))

    def kept(self, spec: EvalSpec, misclassified: Misclassified) -> NDArray[np.int64]:
        """Return the ids whose images are kept of an unfinished evaluation."""
        parts = [part.ids for part in self._parts(spec, misclassified)]
        return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))

    def publish(self, spec: EvalSpec, wanted: NDArray[np.int64], misclassified: Misclassified) -> None:
        """Put the kept images of the `wanted` examples together as the record's; nothing is kept from then on."""
        parts = list(self._parts(spec, misclassified))
        ids = np.concatenate([part.ids for part in parts])
        images = np.concatenate([part.read(0, len(part.ids)) for part in parts])
        ids, first = np.unique(ids, return_index=True)
        chosen = np.isin(ids, wanted)
        publish(self.path(spec), _packed(spec, ids[chosen], images[first[chosen]], misclassified))
        for path in self._unfinished(spec):
            path.unlink(missing_ok=True)

    def _parts(self, spec: EvalSpec, misclassified: Misclassified) -> Iterator[SavedAdversarials]:
        for path in self._unfinished(spec):
            with suppress(UserError):  # cut short by a full disk: computed again
                part = self._open(path)
                if part.misclassified == misclassified:
                    yield part

    def _unfinished(self, spec: EvalSpec) -> list[Path]:
        return sorted((self.root / ".work").glob(f"{journal_key(spec)}-*.safetensors"))

    def _open(self, path: Path) -> SavedAdversarials:
        try:
            with safe_open(path, framework="np") as file:
                facts = file.metadata() or {}
                ids = file.get_tensor(_IDS)
                fits = len(file.get_slice(_IMAGES).get_shape()) == 4
            if not fits or not (np.diff(ids) > 0).all() or facts["misclassified"] not in get_args(Misclassified):
                raise unfit(path, "its content is not what robench writes")
            misclassified: Any = facts["misclassified"]
            return SavedAdversarials(path, facts["identity"], facts["weights_sha256"], misclassified, ids)
        except (SafetensorError, OSError) as error:
            raise unfit(path, f"it cannot be read ({error})") from None
        except KeyError as error:
            raise unfit(path, f"it does not say its {error.args[0]}") from None


def _packed(spec: EvalSpec, ids: NDArray[np.int64], images: NDArray[Any], misclassified: Misclassified) -> bytes:
    facts = {
        "identity": spec.identity,
        "weights_sha256": spec.model.weights_sha256,
        "misclassified": misclassified,
    }
    order = np.argsort(ids)  # shards of a random drawing are not in order
    return save({_IDS: ids[order], _IMAGES: images[order]}, metadata=facts)


def unfit(path: Path, problem: str) -> UnsafeFile:
    """Return the error for a file of images that cannot be believed, with the remedy."""
    return UnsafeFile(f"{path}: {problem}; delete it and evaluate again with --save-adversarials")

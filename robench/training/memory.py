"""How much memory a computation holds at once, counted tensor by tensor: also where there is no accelerator to try."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that operations make on a device inside the `with` block, from birth to death.

    What a kernel takes for itself meanwhile, and what an allocator keeps back, is not seen: an accelerator needs
    somewhat more than the `peak`.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        """Bytes that are held now."""
        self.history: list[int] = []
        """Bytes that were held after each operation."""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def peak(self) -> int:
        """Return the most bytes that were held at once."""
        return max(self.history, default=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry an operation out and note the storages that come of it."""
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        result = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(result)):
            # A view, or an operation in place, makes nothing.
            if storage is None or storage.device.type != self.device.type:
                continue
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                self.live += (size := storage.nbytes())
                weakref.finalize(storage, self._gone, size)
        self.history.append(self.live)
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


def growth(fewer: Sequence[int], more: Sequence[int], *, batch: int) -> tuple[int, int]:
    """Return the bytes for each image, and besides, that a batch holds when it holds the most.

    `fewer` and `more` are histories of the same operations on two images and on three: after each of them what is held
    grows in proportion to the images. Small batches hold the most when the optimiser steps, large ones when all is
    evaluated.
    """
    if len(fewer) != len(more):
        fewer, more = [max(fewer)], [max(more)]
    slopes = [b - a for a, b in zip(fewer, more, strict=True)]
    held = [a + (batch - 2) * slope for a, slope in zip(fewer, slopes, strict=True)]
    fullest = held.index(max(held))
    return slopes[fullest], held[fullest] - batch * slopes[fullest]


def _storage(leaf: object) -> torch.UntypedStorage | None:
    return leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None

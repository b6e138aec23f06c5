"""The unit of retry, storage and resume: some examples of one question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robench.records import Cost, EvalSpec, ShardError

if TYPE_CHECKING:
    from torch import Tensor

Rows = Mapping[str, NDArray[Any]]


class Batch(NamedTuple):
    """Some examples on the device."""

    ids: NDArray[np.int64]
    images: Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: Tensor
    """(N,) int64."""

    def part(self, start: int, stop: int) -> Batch:
        """Return some neighbours of these examples."""
        return Batch(self.ids[start:stop], self.images[start:stop], self.labels[start:stop])


class InvalidAnswer(Exception):
    """An attack that crashed or whose answer breaks the threat model."""

    def __init__(self, kind: str, message: str) -> None:
        """Keep the kind of a ShardError and its text."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Shard:
    """Some examples of one question; travels by names and numbers, never with a model in it."""

    spec: EvalSpec
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class ShardResult:
    """A shard's answer: one row per example, or the error that kept it from having one.

    Where the time was up there are rows for some of the examples only, perhaps for none: then `rows` is empty.
    """

    shard: Shard
    rows: Rows
    cost: Cost
    error: ShardError | None = None
    adversarial_images: NDArray[Any] | None = None
    """(N, C, H, W) in the judge's precision, where they were asked for."""
    notes: frozenset[str] = frozenset()
    """What the attack did other than its parameters say."""


def split(spec: EvalSpec, ids: NDArray[np.int64], size: int) -> list[Shard]:
    """Cut the examples into shards of `size`; how they are cut changes no outcome."""
    return [Shard(spec, ids[i : i + size]) for i in range(0, len(ids), size)]

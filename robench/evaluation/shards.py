"""The unit of retry, storage and resume: some examples of one question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.records import Cost, EvalSpec, ShardError

Rows = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Shard:
    """Some examples of one question; travels by names and numbers, never with a model in it."""

    spec: EvalSpec
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class ShardResult:
    """A shard's answer: one row per example, or the error that kept it from having one."""

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

"""Where shards run. An executor knows no attack: it maps a task over items and yields the results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Anything that runs a task on each of many items; results may come in any order."""

    def __call__(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item."""


def in_this_process(task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Run one item after another, here: one device, already warm."""
    return map(task, items)

"""Evaluations that may take so long and no longer: what was answered by then is kept."""

from __future__ import annotations

import time
from collections.abc import Callable

from robench.errors import RobenchError

#: Examples of a question's first batch: nobody knows yet how long one takes, and what is not finished is lost.
_FIRST_BATCH = 1
#: A batch has at most so many times the examples of the last one: they may have been easier than the rest.
_GROWTH = 4
#: A batch is made as large as takes this share of the time that is left.
_CAUTION = 0.8


class OutOfTime(RobenchError):
    """The time is up in the middle of a batch."""


class Deadline:
    """A moment after which nothing is computed any more."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow `seconds`, which begin with the first call of :meth:`start`."""
        self.seconds, self.clock = seconds, clock
        self.answered = self.passes = 0
        """Examples that were answered in this time, and passes of the model that were begun."""
        self._end: float | None = None

    def start(self) -> None:
        """Let the time run; later calls change nothing."""
        if self._end is None:
            self._end = self.clock() + self.seconds

    @property
    def remaining(self) -> float:
        """Return the seconds that are left; 0 if none."""
        return self.seconds if self._end is None else max(0.0, self._end - self.clock())

    @property
    def passed(self) -> bool:
        """Tell whether the time is up."""
        return self.remaining == 0.0

    def give_up(self) -> None:
        """Let the time be up now: what is left of it is too short for anything."""
        self._end = self.clock()

    def check(self) -> None:
        """Count a pass; raise OutOfTime if the time is up."""
        if self.passed:
            raise OutOfTime(f"the {self.seconds:g} seconds are over")
        self.passes += 1


class Pace:
    """How many examples a question's next batch may have, so that it is finished in time."""

    def __init__(self, deadline: Deadline) -> None:
        """Begin with a question of which nothing is known."""
        self.deadline = deadline
        self._last, self._seconds, self._begun = 0, 0.0, 0.0

    def begin(self) -> None:
        """Say that a batch begins."""
        self._begun = self.deadline.clock()

    def end(self, examples: int) -> None:
        """Learn from the batch that began last and is finished."""
        self._last, self._seconds = examples, (self.deadline.clock() - self._begun) / examples
        self.deadline.answered += examples

    def largest(self, wanted: int) -> int:
        """Return at most `wanted`: one at first, then four times the last batch, and what the rest of the time is for.

        0: not even one example would be finished.
        """
        if self.deadline.passed:
            return 0
        if not self._last:
            return min(wanted, _FIRST_BATCH)
        affordable = int(_CAUTION * self.deadline.remaining / max(self._seconds, 1e-9))
        if affordable == 0:
            self.deadline.give_up()
        return min(wanted, _GROWTH * self._last, affordable)

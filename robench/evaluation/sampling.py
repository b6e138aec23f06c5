"""Sequential evaluation: examples are drawn in random order until their share is known well enough.

The stopping rule looks at the answers in the order of drawing, one after another, whatever order they were computed in:
it stops at the first example after which the confidence sequence is no wider than the question asks for. Answers beyond
that example do not count. So where it stops depends on the question alone, not on shards, batches, workers,
interruptions, or time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from robench.confidence_sequences import RunningBounds, draws_needed
from robench.evaluation.shards import Rows, Shard
from robench.records import ConfidenceSequence, EvalSpec

#: Fewer examples at a time would cost more in speed than in answers that do not count.
_SMALLEST_SHARD = 32


def drawing_order(ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the example ids in a random order that the seed decides: the same for every model and attack.

    They are sorted by their BLAKE2b hashes with the seed as the key, so that no library's generator is asked. With one
    seed a shorter drawing is the beginning of every longer one.
    """
    key = seed.to_bytes(16, "little", signed=True)

    def rank(example: int) -> bytes:
        return hashlib.blake2b(example.to_bytes(8, "little"), key=key, digest_size=16).digest()

    return np.array(sorted(ids.tolist(), key=rank), dtype=np.int64)


class Sampling:
    """Decides which examples are asked next, and when it is enough."""

    def __init__(self, spec: EvalSpec, ids: NDArray[np.int64]) -> None:
        """Begin a question whose `until` is given, on these examples."""
        assert spec.until is not None
        self.spec, self.width = spec, spec.until
        self.order = drawing_order(ids, spec.seed)
        self._bounds = RunningBounds(len(ids))
        self._answers: dict[int, bool] = {}
        self._asked: set[int] = set()
        self._closed = False

    @property
    def drawn(self) -> NDArray[np.int64]:
        """Return the ids of the examples that count so far, in the order of drawing."""
        return self.order[: self._bounds.drawn]

    @property
    def enough(self) -> bool:
        """Tell whether the interval is narrow enough, or every example was drawn."""
        return self._bounds.width <= self.width or self._bounds.drawn == len(self.order)

    @property
    def sequence(self) -> ConfidenceSequence:
        """Return what is guaranteed now."""
        now = self._bounds
        return ConfidenceSequence(
            level=now.level, width=self.width, low=now.low / now.of, high=now.high / now.of, of=now.of
        )

    def learn(self, rows: Rows) -> None:
        """Take answers in; they count from where all examples drawn before are answered, and up to the stop."""
        self._answers |= dict(zip(rows["example_id"].tolist(), rows["robust"].tolist(), strict=True))
        self._asked |= self._answers.keys()
        while not self.enough and int(self.order[self._bounds.drawn]) in self._answers:
            self._bounds.add(self._answers[int(self.order[self._bounds.drawn])])

    def close(self) -> None:
        """Ask for nothing more: an example will have no answer, and none after it can count."""
        self._closed = True

    def shards(self, largest: int) -> Iterator[Shard]:
        """Yield what is to be answered next, until it is enough or everything was asked.

        How many that is, is guessed from the share so far, and half of the guess is asked at a time: few answers are
        computed that do not count.
        """
        while not (self.enough or self._closed):
            rest = [i for i in self.order.tolist() if i not in self._asked]
            if not rest:
                return
            size = min(largest, max(_SMALLEST_SHARD, self._missing() // 2))
            self._asked |= set(rest[:size])
            yield Shard(self.spec, np.array(rest[:size], dtype=np.int64))

    def _missing(self) -> int:
        """Guess how many more draws it takes; before the first draw as few as it can take at all, twice."""
        now = self._bounds
        if not now.drawn:
            return 2 * draws_needed(0.0, now.of, width=self.width)
        return draws_needed(now.successes / now.drawn, now.of, width=self.width) - now.drawn

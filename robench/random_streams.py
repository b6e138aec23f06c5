"""Random numbers that belong to an example, not to its place in a batch.

A stream is keyed by (seed, example, a path of labels such as attack, restart, draw). The numbers come from
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator: it has
no state, so the same key gives the same numbers at any batch size, in any order, on any device, and the global
generators are not touched. One vectorised call serves the whole batch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four int64 tensors of random 32-bit words for four int64 tensors of 32-bit counter words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit words wraps correctly in a signed 64-bit integer; only its bits are used.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class RandomStream:
    """The random numbers of a batch of examples."""

    seed: int
    """Any integer of up to 64 bits."""
    ids: Tensor
    """(N,) int64: each example's position in its data set, on the device the numbers are wanted on."""
    path: tuple[str | int, ...] = ()
    """What the numbers are for."""

    def at(self, *labels: str | int) -> RandomStream:
        """Return the stream for a further purpose (`random.at("restart", 3)`): independent of this one."""
        return replace(self, path=(*self.path, *labels))

    def __getitem__(self, rows: Tensor) -> RandomStream:
        """Return the stream of some of the examples, by row numbers or a mask over the batch."""
        return replace(self, ids=self.ids[rows])

    def words(self, count: int) -> Tensor:
        """Return `(N, count)` int64 random words in [0, 2^32)."""
        digest = hashlib.blake2b(repr((self.seed, self.path)).encode(), digest_size=16).digest()
        key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
        # The counter holds the position inside the example, the example (62 bits) and more of the path's hash.
        salt = int.from_bytes(digest[8:12], "little")
        blocks = torch.arange(-(-count // 4), device=self.ids.device)
        ids = self.ids[:, None]
        counter = torch.broadcast_tensors(blocks[None], ids & _MASK, (ids >> 32) & _MASK, torch.full_like(ids, salt))
        return torch.stack(philox4x32(counter, key), dim=2).flatten(1)[:, :count]

    def uniform(self, like: Tensor) -> Tensor:
        """Return numbers uniform in [0, 1), in the shape `(N, ...)`, type and device of `like`.

        They are multiples of 2^-24, so that float32 and float64 agree exactly.
        """
        words = self.words(like[0].numel() if len(like) else 0)
        return ((words >> 8).to(like.dtype) * 2.0**-24).view(like.shape)

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers in the shape `(N, ...)`, type and device of `like` (Box-Muller)."""
        count = like[0].numel() if len(like) else 0
        pairs = -(-count // 2)
        words = self.words(2 * pairs).to(torch.float64)
        # (word + 1) / 2^32 lies in (0, 1], where the logarithm is finite.
        radius = torch.sqrt(-2.0 * torch.log((words[:, :pairs] + 1.0) * 2.0**-32))
        angle = words[:, pairs:] * (2.0 * math.pi * 2.0**-32)
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return both[:, :count].to(like.dtype).view(like.shape)

    def integers(self, high: int) -> Tensor:
        """Return one uniform integer in [0, high) per example, as `(N,)` int64; `high` at most 2^20."""
        if not 1 <= high <= 2**20:
            raise ValueError(f"integers(high={high}): high must be from 1 to 2^20")
        # A 52-bit number makes the bias of the modulus smaller than 2^-32.
        words = self.words(2)
        return (((words[:, 0] << 20) | (words[:, 1] >> 12)) % high).view(-1)

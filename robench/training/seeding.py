"""The one place where training touches torch's global generator: initial weights and dropout know no other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int, *labels: str | int) -> Iterator[None]:
    """Seed the global generators from (seed, labels) inside the block and put the caller's state back after it.

    Seeding each step from its own number makes a resumed training draw what an uninterrupted one draws.
    """
    digest = hashlib.blake2b(repr((seed, labels)).encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest, "little"))  # noqa: TID251  modules take no RandomStream
        yield

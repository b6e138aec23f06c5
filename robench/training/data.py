"""Training batches: which examples a step sees, and how their pixels get to the device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from robench.datasets import ImageSet, fixed_shuffle
from robench.errors import UserError
from robench.random_streams import RandomStream

#: Batches that are read ahead of the step that uses them, where reading decodes files.
_READ_AHEAD = 3


def as_floats(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32).div_(255.0)


def check_count(count: int | None, available: int) -> None:
    """Raise UserError if more images are to be learned from than there are."""
    if count is not None and count > available:
        raise UserError(
            f"train_examples = {count} is more than the {available} images that there are; "
            "set it to fewer, or to none for all of them"
        )


class Pixels:
    """The pixels of one split: small data sets live on the device as uint8, others are read as they are needed."""

    def __init__(self, image_set: ImageSet, device: torch.device, *, count: int | None = None) -> None:
        """Copy an in-memory set to `device` once; `count` keeps to the first of its fixed shuffle, None to all.

        Raises UserError for a count above the set's size.
        """
        check_count(count, len(image_set))
        self.chosen = None if count is None else torch.from_numpy(np.sort(fixed_shuffle(len(image_set))[:count]))
        self.image_set, self.device = image_set, device
        self.labels = torch.from_numpy(np.asarray(image_set.labels)).to(device)
        everything = np.arange(len(image_set), dtype=np.int64)
        self.resident = torch.from_numpy(image_set.read(everything)).to(device) if image_set.in_memory else None

    def __len__(self) -> int:
        return len(self.image_set if self.chosen is None else self.chosen)

    def batches(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, uint8 images) on the device for each tensor of positions (CPU, int64), in order.

        Positions count the images that are learned from; ids are the examples' own, whatever is chosen of them.
        """
        if self.chosen is not None:
            batches = [self.chosen[batch] for batch in batches]
        if self.resident is not None:
            for batch in batches:
                ids = batch.to(self.device, non_blocking=True)
                yield ids, self.resident[ids]
            return
        with ThreadPoolExecutor(1, thread_name_prefix="robench-read") as reader:
            waiting: list[Future[Tensor]] = []
            try:
                for position, batch in enumerate(batches):
                    missing = min(position + _READ_AHEAD, len(batches)) - position - len(waiting)
                    start = position + len(waiting)
                    waiting += [reader.submit(self._read, b) for b in batches[start : start + missing]]
                    yield batch.to(self.device), waiting.pop(0).result().to(self.device, non_blocking=True)
            finally:
                for future in waiting:
                    future.cancel()

    def _read(self, batch: Tensor) -> Tensor:
        images = torch.from_numpy(self.image_set.read(batch.numpy()))
        return images.pin_memory() if self.device.type == "cuda" else images


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of batches that hold all examples."""
    return -(-examples // batch_size)


def epoch_order(examples: int, batch_size: int, *, seed: int, epoch: int) -> list[Tensor]:
    """Return the ids of each batch of an epoch: a permutation keyed by (seed, epoch), cut into nearly equal batches.

    Sizes differ by one at most: a small last batch would weigh its examples more, and one of a single example has no
    batch statistics.
    """
    words = RandomStream(seed, torch.arange(examples), ("order", epoch)).words(2)
    order = torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)
    return list(order.tensor_split(steps_per_epoch(examples, batch_size)))

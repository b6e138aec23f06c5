"""How long a pass through a network takes on this device: each network is timed once, however many models have it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from robench.classifier import Classifier, random_images, tensor_float32
from robench.records import Configured

#: A pass that takes so long on a CPU is timed well, and a larger batch takes longer in proportion.
_ENOUGH_SECONDS = 0.5

_Network = tuple[str, tuple[int, int, int], int]
"""Architecture, shape of the images, classes: what two models of which a pass takes equally long have in common."""


class Stopwatch:
    """Times forward and backward passes on one device, and remembers them."""

    def __init__(
        self, device: torch.device, precision: str, *, announce: Callable[[Configured, int], None] | None = None
    ) -> None:
        """Begin with nothing; `announce` hears of each network and batch before it is timed."""
        self.device, self.precision = device, precision
        self._announce = announce or (lambda _, __: None)
        self._seconds: dict[tuple[_Network, int], float] = {}

    def of_batch(self, architecture: Configured, model: Classifier, count: int) -> float:
        """Return the seconds of a pass of `count` images through `model`, which has this architecture."""
        key = _network(architecture, model), count
        if key not in self._seconds:
            self._announce(architecture, count)
            model.to(self.device).to(memory_format=torch.channels_last)
            self._seconds[key] = seconds_of_a_pass(model.train(), count, device=self.device, precision=self.precision)
        return self._seconds[key]

    def of_image(self, architecture: Configured, model: Classifier, count: int) -> float:
        """Return the seconds of a pass per image: of whatever batch was timed already, else of `count` images."""
        network = _network(architecture, model)
        count = next((known for other, known in self._seconds if other == network), count)
        return self.of_batch(architecture, model, count) / count


def _network(architecture: Configured, model: Classifier) -> _Network:
    return architecture.model_dump_json(), model.input_shape, model.num_classes


def seconds_of_a_pass(model: Classifier, batch: int, *, device: torch.device, precision: str) -> float:
    """Return how long a forward and a backward pass of a batch take: on a CPU by what a part of it takes."""
    count = batch if device.type == "cuda" else min(batch, 2)
    while True:
        images = random_images(model.input_shape, count=count).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        seconds = min(_seconds_of(model, images, precision) for _ in range(3))
        if count == batch or seconds > _ENOUGH_SECONDS:
            return seconds * batch / count
        count = min(batch, 4 * count)


def _seconds_of(model: Classifier, images: Tensor, precision: str) -> float:
    started = time.perf_counter()
    with tensor_float32(allowed=precision == "tf32"):
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        logits.float().logsumexp(1).mean().backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started

"""The least time that PGD can take with this model on this machine: the gradients it needs, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Walk
from robench.classifier import SearchModel

Clock = Callable[[], float]
"""Seconds that have passed since some moment."""

_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_FORMATS = (torch.channels_last, torch.contiguous_format)


def gradient_passes(walk: Walk, steps: int) -> int:
    """Return the sum over the steps of the images that still stand when the step is taken."""
    return int(walk.first_broken.clamp_max(steps).sum())


@dataclass
class BestPass:
    """The best time per image of one forward and input-only backward pass, over batch sizes and memory formats."""

    model: SearchModel
    images: Tensor
    labels: Tensor
    clock: Clock = time.perf_counter
    seconds_per_image: float = float("inf")
    batch_size: int = 0
    memory_format: torch.memory_format = torch.contiguous_format

    def measure(self, *, repeats: int = 3) -> None:
        """Time every combination again and keep the best ever seen."""
        for memory_format in _FORMATS:
            network = self.model.network.to(memory_format=memory_format)
            for size in sorted({*(s for s in _SIZES if s < len(self.images)), len(self.images)}):
                images, labels = self.images[:size], self.labels[:size]
                images = torch.empty_like(images, memory_format=memory_format).copy_(images)
                seconds = min(_pass(network, images, labels, self.clock) for _ in range(repeats)) / size
                if seconds < self.seconds_per_image:
                    self.seconds_per_image, self.batch_size = seconds, size
                    self.memory_format = memory_format

    def measure_best(self, *, repeats: int = 5) -> None:
        """Time the best combination again."""
        network = self.model.network.to(memory_format=self.memory_format)
        images, labels = self.images[: self.batch_size], self.labels[: self.batch_size]
        images = torch.empty_like(images, memory_format=self.memory_format).copy_(images)
        seconds = min(_pass(network, images, labels, self.clock) for _ in range(repeats))
        self.seconds_per_image = min(self.seconds_per_image, seconds / self.batch_size)


def _pass(network: torch.nn.Module, images: Tensor, labels: Tensor, clock: Clock) -> float:
    started = clock()
    current = images.detach().requires_grad_()
    torch.autograd.grad(F.cross_entropy(network(current), labels, reduction="sum"), current)
    return clock() - started

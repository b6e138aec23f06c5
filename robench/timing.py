"""How long it takes to classify one image: by one forward pass, or by a vote of noisy copies.

The comparison of HeatSmoothing (arXiv:2010.02508, table 2): a deterministic model answers in one pass, a stochastic one
(Cohen et al., arXiv:1902.02918) puts many noisy copies of the image through the network. Images come one at a time, and
the clock runs from the image on the device to its class on the host, so that noise, counting and the way back count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robench.classifier import Classifier, random_images
from robench.statistics import median_ranks

#: Queries before those that count: libraries choose their kernels, memory is taken.
_WARM_UP = 3


@torch.inference_mode()
def time_queries(
    model: Classifier, *, copies: int, sigma: float, queries: int, device: torch.device
) -> Mapping[int, NDArray[np.float64]]:
    """Return the seconds that each of `queries` images took, by one pass (1) and by `copies` noisy copies.

    The two take turns, so that what else the machine does meets both alike. Images are random: a time does not depend
    on them. Noise of deviation `sigma` is drawn on the device by torch's generator, as those who use such models do.
    """
    model = model.to(device).eval()
    images = random_images(model.input_shape, count=16).to(device)
    taken: dict[int, list[float]] = {1: [], copies: []}
    for turn in range(_WARM_UP + queries):
        for count, seconds in taken.items():
            _wait(device)
            started = time.perf_counter()
            _classify(model, images[turn % len(images)], copies=count, sigma=sigma)
            seconds.append(time.perf_counter() - started)
    return {count: np.array(seconds[_WARM_UP:]) for count, seconds in taken.items()}


def _classify(model: Classifier, image: Tensor, *, copies: int, sigma: float) -> int:
    """Return the class of one image, on the host."""
    if copies == 1:
        return int(model(image[None]).argmax())
    batch = image.expand(copies, *image.shape)
    votes = model(batch + sigma * torch.randn_like(batch)).argmax(1)
    return int(votes.bincount(minlength=model.num_classes).argmax())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_interval(seconds: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the median and its 95 % interval, between two of the values; of at least six."""
    ordered = np.sort(seconds)
    ranks = median_ranks(len(ordered))
    if ranks is None:
        raise ValueError(f"a median of {len(ordered)} values has no 95 % interval; it takes 6")
    return float(np.median(ordered)), float(ordered[ranks[0]]), float(ordered[ranks[1]])

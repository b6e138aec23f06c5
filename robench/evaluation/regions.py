"""What a model answers everywhere, where images are points of a plane: all images of two pixels that there are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

LEVELS = 256


@torch.no_grad()
def answers_everywhere(
    model: nn.Module, *, image_shape: tuple[int, int, int], device: torch.device
) -> NDArray[np.int64]:
    """Return the class of every 8-bit image of two pixels as `(256, 256)`: [second pixel, first pixel].

    The model is in eval mode and takes images in [0, 1] of `image_shape`, which has two values.
    """
    levels = torch.arange(LEVELS, device=device, dtype=torch.float32) / (LEVELS - 1)
    rows = []
    for second in levels:
        images = torch.stack([levels, second.expand(LEVELS)], dim=1).view(LEVELS, *image_shape)
        rows.append(model(images).argmax(1).cpu().numpy())
    return np.stack(rows)

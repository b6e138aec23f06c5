"""Augmentation of whole batches on the device they live on, by random numbers that belong to the example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.random_streams import RandomStream
from robench.recipe import CropFlip, NoAugmentation


def augmented(images: Tensor, augmentation: NoAugmentation | CropFlip, random: RandomStream) -> Tensor:
    """Return uint8 images `(N, C, H, W)` cropped and mirrored as the recipe says, each the same in any batch."""
    if isinstance(augmentation, NoAugmentation):
        return images
    pad = augmentation.pad
    count, _, height, width = images.shape
    top = random.at("crop", "top").integers(2 * pad + 1)
    left = random.at("crop", "left").integers(2 * pad + 1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    if augmentation.flip:
        mirrored = random.at("flip").integers(2).bool()
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    example = torch.arange(count, device=images.device)[:, None, None]
    # Indexing around the channels moves them last.
    return padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

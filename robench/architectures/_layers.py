"""What several families share: sizes of feature maps, convolutions without bias, He's initialisation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import nn

from robench.errors import UserError


def last_feature_map(
    architecture: str, input_shape: tuple[int, int, int], remaining: Callable[[int], int]
) -> tuple[int, int]:
    """Return height and width of the last feature map, where `remaining` maps an image's side to the map's.

    Raises UserError if nothing would remain; it names the image's size and the smallest that works.
    """
    _, height, width = input_shape
    if min(remaining(height), remaining(width)) < 1:
        smallest = next(side for side in count(1) if remaining(side) >= 1)
        raise UserError(
            f"{architecture} needs images of at least {smallest}x{smallest} pixels, not {height}x{width};"
            " choose an architecture for smaller images, such as digits_cnn or resnet20"
        )
    return remaining(height), remaining(width)


def convolution(in_channels: int, out_channels: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution with "same" padding and no bias: the batch norm that goes with it has one."""
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


def initialise_like_he(module: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (k^2 * out_channels)).

    He et al., arXiv:1502.01852, section 2.2, the form that keeps the variance of gradients.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def keep_the_signal(module: nn.Module) -> None:
    """Draw weights from N(0, 2 / fan-in) and set biases to 0: the signal keeps its variance through layers with ReLU.

    He et al., arXiv:1502.01852, equation 10.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)

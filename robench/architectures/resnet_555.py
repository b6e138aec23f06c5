"""The network that HeatSmoothing's authors ran on CIFAR-10 as ResNet-34: three stages of five blocks.

Its logits are normalised like every other layer. That keeps the squared distances between the logits of a student and
its teacher small, without which HeatSmoothing's iterated form diverges at the published learning rate of 0.1.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from robench.architectures._layers import convolution, last_feature_map
from robench.catalog import ArchitectureEntry, PositiveInt


class NormalizedLayer(nn.Module):
    """A linear map, a batch norm without scale and shift, then a bias: `(N, C, ...)` to `(N, C', ...)`.

    The map starts at torch's default, U(-b, b) with b = 1 / sqrt(inputs of one unit); the bias starts so too.
    """

    def __init__(self, linear: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        units, inputs = len(linear.weight), linear.weight[0].numel()
        self.linear = linear
        if isinstance(linear, nn.Conv2d):
            self.bn: nn.Module = nn.BatchNorm2d(units, affine=False)
            self.bias = nn.Parameter(torch.empty(units, 1, 1))
        else:
            self.bn = nn.BatchNorm1d(units, affine=False)
            self.bias = nn.Parameter(torch.empty(units))
        nn.init.uniform_(self.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, features: Tensor) -> Tensor:
        """Return the layer's output, before any activation."""
        result: Tensor = self.bn(self.linear(features)) + self.bias
        return result


class BasicBlock(nn.Module):
    """Two normalised 3x3 convolutions around an identity shortcut; the shape stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = NormalizedLayer(convolution(channels, channels))
        self.conv1 = NormalizedLayer(convolution(channels, channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to the same shape."""
        result: Tensor = self.relu(features + self.conv1(self.relu(self.conv0(features))))
        return result


def build(
    *, num_classes: int, input_shape: tuple[int, int, int], blocks: tuple[PositiveInt, ...] = (5, 5, 5)
) -> nn.Module:
    """Return the network with `blocks[i]` blocks in stage i, which has `16 * 2**i` channels.

    Raises UserError for images that its halvings leave without a pixel: below 4x4 for three stages. Between stages, a
    normalised 1x1 convolution with ReLU widens and average pooling halves. The logits are normalised too, so training
    needs at least two images per batch.
    """
    last_feature_map("resnet34_555", input_shape, lambda side: side // 2 ** (len(blocks) - 1))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        layer0=NormalizedLayer(convolution(input_shape[0], 16)), relu0=nn.ReLU(inplace=True)
    )
    incoming = 16
    for stage, depth in enumerate(blocks):
        channels = 16 * 2**stage
        if stage > 0:
            layers[f"transition{stage}"] = nn.Sequential(
                NormalizedLayer(convolution(incoming, channels, size=1)),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            )
        layers[f"stage{stage + 1}"] = nn.Sequential(*(BasicBlock(channels) for _ in range(depth)))
        incoming = channels
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = NormalizedLayer(nn.Linear(incoming, num_classes, bias=False))
    return nn.Sequential(layers)


ENTRY = ArchitectureEntry(
    name="resnet34_555",
    build=build,
    summary="HeatSmoothing's CIFAR-10 ResNet-34: 5-5-5 blocks of widths 16-32-64, batch norm without scale",
    source="Campbell et al., arXiv:2010.02508, cifar10/train_utils/cvmodels",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={"resnet34_555": 488_714, "resnet10_111": 100_746},
    presets={"resnet10_111": {"blocks": (1, 1, 1)}},
)

"""Residual networks for small images: 3x3 stem without max pooling, basic blocks, global average pooling."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from robench.architectures._layers import convolution, initialise_like_he
from robench.catalog import ArchitectureEntry, PositiveInt


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: a 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                convolution(in_channels, out_channels, size=1, stride=stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        change = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features)))))
        result: Tensor = self.relu(change + self.shortcut(features))
        return result


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    blocks: tuple[PositiveInt, ...] = (2, 2, 2, 2),
    width: PositiveInt = 64,
) -> nn.Module:
    """Return the network with `blocks[i]` basic blocks in stage i, which has `width * 2**i` channels.

    Each stage but the first halves the image. Convolutions start at He's normal, batch norms at the identity,
    the last layer at torch's default. Images may have any size.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=convolution(input_shape[0], width), bn1=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True)
    )
    incoming = width
    for stage, depth in enumerate(blocks):
        channels = width * 2**stage
        layers[f"layer{stage + 1}"] = nn.Sequential(
            BasicBlock(incoming, channels, stride=1 if stage == 0 else 2),
            *(BasicBlock(channels, channels, stride=1) for _ in range(depth - 1)),
        )
        incoming = channels
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(incoming, num_classes)
    network = nn.Sequential(layers)
    initialise_like_he(network)
    return network


ENTRY = ArchitectureEntry(
    name="resnet18",
    build=build,
    summary="Residual network with basic blocks and a stem for small images",
    source="He et al., arXiv:1512.03385: table 1 with a 3x3 stem (18 and 34 layers), section 4.2 (20 layers)",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={"resnet18": 11_173_962, "resnet34": 21_282_122, "resnet20": 272_474},
    presets={
        "resnet34": {"blocks": (3, 4, 6, 3)},
        "resnet20": {"blocks": (3, 3, 3), "width": 16},
    },
)

"""Wide residual networks for small images, in the two flavours of the adversarial-training literature."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robench.architectures._layers import convolution, initialise_like_he
from robench.catalog import ArchitectureEntry, PositiveInt
from robench.errors import UserError


class PooledPaddedShortcut(nn.Module):
    """Average pooling by `stride`, then zeros as new channels, half of them on either side of the old."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`."""
        pooled = F.avg_pool2d(features, self.stride)
        return F.pad(pooled, (0, 0, 0, 0, self.padding, self.padding))


def _activation(flavour: str) -> nn.Module:
    return nn.LeakyReLU(0.1, inplace=True) if flavour == "madry" else nn.ReLU(inplace=True)


class WideBlock(nn.Module):
    """Batch norm, activation and 3x3 convolution, twice, and a shortcut.

    Where the width changes, the shortcut starts after the first activation, else before the batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, flavour: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = _activation(flavour)
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = _activation(flavour)
        self.conv2 = convolution(out_channels, out_channels)
        # Named as in TRADES' release, whose weights have this key.
        self.convShortcut: nn.Module | None = None
        if in_channels != out_channels and flavour == "madry":
            self.convShortcut = PooledPaddedShortcut(in_channels, out_channels, stride=stride)
        elif in_channels != out_channels:
            self.convShortcut = convolution(in_channels, out_channels, size=1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`."""
        active = self.relu1(self.bn1(features))
        change: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return change + (features if self.convShortcut is None else self.convShortcut(active))


def _blocks_per_stage(depth: int) -> int:
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        nearest = 6 * max(1, round((depth - 4) / 6)) + 4
        raise UserError(f"a wide residual network has 6n + 4 layers, not {depth}; try depth={nearest}")
    return blocks


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    depth: PositiveInt = 34,
    width: PositiveInt = 10,
    flavour: Literal["trades", "madry"] = "trades",
) -> nn.Module:
    """Return the network of `depth` = 6n + 4 layers: stages of n blocks, 16, 32, 64 times `width` channels.

    Flavour "trades" has ReLU and 1x1 convolutions as shortcuts; "madry", which EMR trains, has LeakyReLU of
    slope 0.1 and :class:`PooledPaddedShortcut`. Convolutions start at He's normal, batch norms at the
    identity, the last weight at torch's default, its bias at 0. Raises UserError for another depth, and for
    images that flavour "madry" cannot halve twice.
    """
    channels, height, image_width = input_shape
    if flavour == "madry" and (height % 4 or image_width % 4):
        raise UserError(
            "flavour madry needs images whose sides are multiples of 4, such as 32x32,"
            f" not {height}x{image_width}; use flavour=trades"
        )
    blocks = _blocks_per_stage(depth)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=convolution(channels, 16))
    incoming = 16
    for stage, outgoing in enumerate((16 * width, 32 * width, 64 * width)):
        first = WideBlock(incoming, outgoing, stride=1 if stage == 0 else 2, flavour=flavour)
        others = (WideBlock(outgoing, outgoing, stride=1, flavour=flavour) for _ in range(blocks - 1))
        layers[f"block{stage + 1}"] = nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others)))
        incoming = outgoing
    last = nn.Linear(incoming, num_classes)
    nn.init.zeros_(last.bias)
    layers |= OrderedDict(
        bn1=nn.BatchNorm2d(incoming),
        relu=_activation(flavour),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=last,
    )
    network = nn.Sequential(layers)
    initialise_like_he(network)
    return network


ENTRY = ArchitectureEntry(
    name="wrn_34_10",
    build=build,
    summary="Wide residual network; the default is the one of TRADES, without its unused block",
    source="Zagoruyko and Komodakis, arXiv:1605.07146; TRADES, models/wideresnet.py; EMR, arXiv:2210.05118",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={
        "wrn_34_10": 46_160_474,
        "wrn_34_10_madry": 45_901_914,
        "wrn_28_10": 36_479_194,
        "wrn_28_4": 5_849_050,
    },
    presets={
        "wrn_34_10_madry": {"flavour": "madry"},
        "wrn_28_10": {"depth": 28},
        "wrn_28_4": {"depth": 28, "width": 4},
    },
)

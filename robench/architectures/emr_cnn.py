"""The four-layer convolutional network of the EMR paper."""

from __future__ import annotations

from torch import nn

from robench.architectures._layers import last_feature_map
from robench.catalog import ArchitectureEntry


def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return table 5's network at torch's default initialisation; raises UserError for images below 18x18."""
    last_feature_map("emr_cnn", input_shape, lambda side: (side - 8) // 2 - 4)
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 32, 5),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(64, 128, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(128, 128, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


ENTRY = ArchitectureEntry(
    name="emr_cnn",
    build=build,
    summary="EMR's CIFAR-10 network: 4 convolutions without padding, global average pooling",
    source="EMR, arXiv:2210.05118, table 5",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={"emr_cnn": 276_426},
)

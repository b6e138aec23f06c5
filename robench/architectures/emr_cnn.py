"""The four-layer convolutional network of the EMR paper."""

from __future__ import annotations

from typing import Literal

from torch import nn

from robench.architectures._layers import keep_the_signal, last_feature_map
from robench.catalog import ArchitectureEntry, PositiveInt


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    width: PositiveInt = 32,
    initialization: Literal["kaiming", "torch"] = "kaiming",
) -> nn.Module:
    """Return table 5's network; raises UserError for images below 18x18.

    `width` is how many filters the first layer has; the others have twice and four times as many. The paper does not
    say how it begins: `kaiming` draws normal weights with variance 2 / fan-in and sets biases to 0 (He et al.,
    arXiv:1502.01852, equation 10), as for the paper's MLP. At torch's default, `torch`, the signal shrinks at each
    layer, and with the paper's learning rate the loss hardly falls for hundreds of updates.
    """
    last_feature_map("emr_cnn", input_shape, lambda side: (side - 8) // 2 - 4)
    network = nn.Sequential(
        nn.Conv2d(input_shape[0], width, 5),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 5),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4 * width, 4 * width, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )
    if initialization == "kaiming":
        keep_the_signal(network)
    return network


ENTRY = ArchitectureEntry(
    name="emr_cnn",
    build=build,
    summary="EMR's CIFAR-10 network: 4 convolutions without padding, global average pooling",
    source="EMR, arXiv:2210.05118, table 5",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={"emr_cnn": 276_426, "emr_cnn_half": 70_122},
    presets={"emr_cnn_half": {"width": 16}},
)

"""The multilayer perceptron of the EMR paper: hidden layers of equal width with ReLU."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from robench.architectures._layers import keep_the_signal
from robench.catalog import ArchitectureEntry, PositiveInt


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    hidden_layers: PositiveInt = 4,
    width: PositiveInt = 1024,
    initialization: Literal["kaiming", "torch"] = "kaiming",
) -> nn.Module:
    """Return the network, for images of any size.

    `kaiming` draws normal weights with variance 2 / fan-in and sets biases to 0 (He et al., arXiv:1502.01852, equation
    10). The paper does not say how it begins. At torch's default, `torch`, the signal shrinks sixfold in variance at
    each layer, and with the weight decay of table 1's first row, 0.1, the network never leaves the constant; with this
    one it does, as the paper's did.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    incoming = math.prod(input_shape)
    for _ in range(hidden_layers):
        layers += [nn.Linear(incoming, width), nn.ReLU(inplace=True)]
        incoming = width
    network = nn.Sequential(*layers, nn.Linear(incoming, num_classes))
    if initialization == "kaiming":
        keep_the_signal(network)
    return network


ENTRY = ArchitectureEntry(
    name="mlp_4x1024",
    build=build,
    summary="Multilayer perceptron: 4 hidden layers of 1024 units",
    source="EMR, arXiv:2210.05118, section 3 and appendix A",
    input_shape=(1, 28, 28),
    num_classes=10,
    parameter_counts={"mlp_4x1024": 3_962_890, "mlp_4x256": 400_906},
    presets={"mlp_4x256": {"width": 256}},
)

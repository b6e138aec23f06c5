"""The multilayer perceptron of the EMR paper: hidden layers of equal width with ReLU."""

from __future__ import annotations

import math

from torch import nn

from robench.catalog import ArchitectureEntry, PositiveInt


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    hidden_layers: PositiveInt = 4,
    width: PositiveInt = 1024,
) -> nn.Module:
    """Return the network at torch's default initialisation, for images of any size."""
    layers: list[nn.Module] = [nn.Flatten()]
    incoming = math.prod(input_shape)
    for _ in range(hidden_layers):
        layers += [nn.Linear(incoming, width), nn.ReLU(inplace=True)]
        incoming = width
    return nn.Sequential(*layers, nn.Linear(incoming, num_classes))


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

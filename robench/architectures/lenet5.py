"""The LeNet-5 of Madry et al.: two convolutions with padding, two dense layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from robench.architectures._layers import last_feature_map
from robench.catalog import ArchitectureEntry


def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return the network at torch's default initialisation; raises UserError for images below 4x4."""
    height, width = last_feature_map("lenet5", input_shape, lambda side: side // 2 // 2)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(input_shape[0], 32, 5, padding=2),
            relu1=nn.ReLU(inplace=True),
            maxpool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(inplace=True),
            maxpool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(64 * height * width, 1024),
            relu3=nn.ReLU(inplace=True),
            linear2=nn.Linear(1024, num_classes),
        )
    )


ENTRY = ArchitectureEntry(
    name="lenet5",
    build=build,
    summary="Madry et al.'s MNIST network: 2 convolutions of 5x5, 2 dense layers",
    source="Madry et al., arXiv:1706.06083, mnist_challenge; advertorch, LeNet5Madry; ATENT, appendix A.1",
    input_shape=(1, 28, 28),
    num_classes=10,
    parameter_counts={"lenet5": 3_274_634},
)

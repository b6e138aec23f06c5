"""A network for scikit-learn's 8x8 handwritten digits that trains in seconds on a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from robench.architectures._layers import last_feature_map
from robench.catalog import ArchitectureEntry


def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return the network at torch's default initialisation; raises UserError for images below 2x2.

    All three convolutions keep the size of their input: of 8x8 pixels, none can be spared at the border.
    """
    height, width = last_feature_map("digits_cnn", input_shape, lambda side: side // 2)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(input_shape[0], 16, 3, padding=1),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 32, 3, padding=1),
            relu3=nn.ReLU(inplace=True),
            flatten=nn.Flatten(),
            linear1=nn.Linear(32 * height * width, 32),
            relu4=nn.ReLU(inplace=True),
            linear2=nn.Linear(32, num_classes),
        )
    )


ENTRY = ArchitectureEntry(
    name="digits_cnn",
    build=build,
    summary="Small network for 8x8 digits: 3 convolutions, 2 dense layers",
    source="robench",
    input_shape=(1, 8, 8),
    num_classes=10,
    parameter_counts={"digits_cnn": 30_794},
)

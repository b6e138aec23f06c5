"""TRADES' network for MNIST: four convolutions without padding, three dense layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from robench.architectures._layers import last_feature_map
from robench.catalog import ArchitectureEntry


def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return the network; its last layer starts at zero, so an untrained one answers 0 for every class.

    Convolutions start at N(0, 2 / (k^2 * in_channels)) with bias 0, the other dense layers at torch's
    default, as in TRADES' `models/small_cnn.py`. Raises UserError for images below 16x16.
    """
    height, width = last_feature_map("small_cnn", input_shape, lambda side: ((side - 4) // 2 - 4) // 2)
    features = OrderedDict(
        conv1=nn.Conv2d(input_shape[0], 32, 3),
        relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(32, 32, 3),
        relu2=nn.ReLU(inplace=True),
        maxpool1=nn.MaxPool2d(2),
        conv3=nn.Conv2d(32, 64, 3),
        relu3=nn.ReLU(inplace=True),
        conv4=nn.Conv2d(64, 64, 3),
        relu4=nn.ReLU(inplace=True),
        maxpool2=nn.MaxPool2d(2),
    )
    last = nn.Linear(200, num_classes)
    classifier = OrderedDict(
        fc1=nn.Linear(64 * height * width, 200),
        relu1=nn.ReLU(inplace=True),
        drop=nn.Dropout(0.5),
        fc2=nn.Linear(200, 200),
        relu2=nn.ReLU(inplace=True),
        fc3=last,
    )
    for layer in features.values():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        OrderedDict(
            feature_extractor=nn.Sequential(features),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(classifier),
        )
    )


ENTRY = ArchitectureEntry(
    name="small_cnn",
    build=build,
    summary="TRADES' MNIST network: 4 convolutions, 3 dense layers, dropout 0.5",
    source="Zhang et al., arXiv:1901.08573, models/small_cnn.py; ATENT, arXiv:2008.12338, appendix A.1",
    input_shape=(1, 28, 28),
    num_classes=10,
    parameter_counts={"small_cnn": 312_202},
)

"""The network of three layers for points of a plane: figure 1 of ATENT (arXiv:2008.12338)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from robench.catalog import ArchitectureEntry


def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return the network at torch's default initialisation: a convolution along the row, two dense layers.

    The authors' notebook has a one-dimensional convolution of 20 kernels of 2 with a padding of 2, which makes five
    windows of two coordinates, so it is one along an image's rows. The ReLUs between the layers are assumed.
    """
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, 20, (1, 2), padding=(0, 2)),
            relu1=nn.ReLU(inplace=True),
            flatten=nn.Flatten(),
            fc1=nn.Linear(20 * height * (width + 3), 150),
            relu2=nn.ReLU(inplace=True),
            fc2=nn.Linear(150, num_classes),
        )
    )


ENTRY = ArchitectureEntry(
    name="toy3layer",
    build=build,
    summary="Three layers for points of a plane: a convolution of 20 kernels, 150 hidden units",
    source="Jagatap et al., arXiv:2008.12338, figure 1; code StochAT, notebook of the decision boundaries",
    input_shape=(1, 1, 2),
    num_classes=2,
    parameter_counts={"toy3layer": 15_512},
)

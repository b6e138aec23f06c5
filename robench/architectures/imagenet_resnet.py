"""torchvision's ResNet-50, for ImageNet."""

from __future__ import annotations

from torch import nn

from robench.catalog import ArchitectureEntry
from robench.errors import UserError


def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return torchvision's network and initialisation; its blocks stride in their 3x3 convolution.

    Raises UserError for images that have not 3 channels; their size is free.
    """
    if input_shape[0] != 3:
        raise UserError(f"resnet50 needs images of 3 channels, these have {input_shape[0]}; use resnet18 or resnet34")
    # Importing torchvision takes seconds; nothing else here needs it.
    from torchvision.models import resnet50

    network: nn.Module = resnet50(weights=None, num_classes=num_classes)
    return network


ENTRY = ArchitectureEntry(
    name="resnet50",
    build=build,
    summary="torchvision's ResNet-50",
    source="He et al., arXiv:1512.03385, table 1; torchvision.models.resnet50",
    input_shape=(3, 224, 224),
    num_classes=1000,
    parameter_counts={"resnet50": 25_557_032},
)

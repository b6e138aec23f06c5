"""Any network that ends in a linear layer, with another last layer: what losses with margins are made for."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench import catalog
from robench.catalog import ArchitectureEntry, PositiveFloat
from robench.errors import UserError


class CosineHead(nn.Module):
    """Logits `scale` cos(theta_j), with theta_j the angle of the features and the j-th row of the weight.

    Features and rows have unit length, and there is no bias: the hypersphere embedding of Pang et al.,
    arXiv:2002.08619, section 3. The weight starts as torch's linear layers do.
    """

    def __init__(self, features: int, classes: int, *, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, F)` to `(N, K)` in [-scale, scale]."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    network: str = "wrn_34_10",
    head: Literal["cosine", "unbiased"] = "cosine",
    scale: PositiveFloat | None = None,
) -> nn.Module:
    """Return `network` (a name of the catalog of architectures) with its last layer replaced.

    `cosine` is :class:`CosineHead`, whose logits are `scale` (None: 15) times a cosine, when it is trained and when it
    is deployed; the authors evaluate the cosines alone, on which cross-entropies are flat and their gradients small.
    `unbiased` is a linear layer without bias, at torch's default initialisation. Raises UserError for a network that
    does not end in a linear layer, and for a scale of what is not scaled.
    """
    if head != "cosine" and scale is not None:
        raise UserError(f"with_head: scale = {scale:g} belongs to head=cosine, and head is {head}; leave it out")
    plugin = catalog.find("architectures", network)
    built: nn.Module = plugin.load().build(num_classes=num_classes, input_shape=input_shape, **plugin.settings())
    name, last = list(built.named_modules())[-1]
    if not isinstance(last, nn.Linear) or last.out_features != num_classes:
        raise UserError(
            f"with_head: network = {network} does not end in a linear layer that could be replaced; take another, such "
            "as resnet18"
        )
    fresh = (
        CosineHead(last.in_features, num_classes, scale=15.0 if scale is None else scale)
        if head == "cosine"
        else nn.Linear(last.in_features, num_classes, bias=False)
    )
    built.set_submodule(name, fresh)
    return built


ENTRY = ArchitectureEntry(
    name="with_head",
    build=build,
    summary="another network with its last layer replaced: by scaled cosines, or by one without bias",
    source="Pang et al., arXiv:2002.08619, section 3 (cosine); Liu et al., arXiv:1612.02295 (unbiased)",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={
        "with_head": 46_160_464,
        "wrn_34_10_cosine": 46_160_464,
        "resnet20_cosine": 272_464,
        "small_cnn_cosine": 312_192,
        "digits_cnn_cosine": 30_784,
        "small_cnn_unbiased": 312_192,
        "digits_cnn_unbiased": 30_784,
        "mlp_4x1024_unbiased": 3_962_880,
        "mlp_4x256_unbiased": 400_896,
        "emr_cnn_unbiased": 276_416,
        "emr_cnn_half_unbiased": 70_112,
    },
    presets={
        "wrn_34_10_cosine": {"network": "wrn_34_10"},
        "resnet20_cosine": {"network": "resnet20"},
        "small_cnn_cosine": {"network": "small_cnn"},
        "digits_cnn_cosine": {"network": "digits_cnn"},
        "small_cnn_unbiased": {"network": "small_cnn", "head": "unbiased"},
        "digits_cnn_unbiased": {"network": "digits_cnn", "head": "unbiased"},
        "mlp_4x1024_unbiased": {"network": "mlp_4x1024", "head": "unbiased"},
        "mlp_4x256_unbiased": {"network": "mlp_4x256", "head": "unbiased"},
        "emr_cnn_unbiased": {"network": "emr_cnn", "head": "unbiased"},
        "emr_cnn_half_unbiased": {"network": "emr_cnn_half", "head": "unbiased"},
    },
    preset_shapes={
        "small_cnn_cosine": (1, 28, 28),
        "digits_cnn_cosine": (1, 8, 8),
        "small_cnn_unbiased": (1, 28, 28),
        "digits_cnn_unbiased": (1, 8, 8),
        "mlp_4x1024_unbiased": (1, 28, 28),
        "mlp_4x256_unbiased": (1, 28, 28),
    },
)

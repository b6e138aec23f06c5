"""Layers of a search copy in the forms that are cheapest on a CPU.

Each computes what the plain layer computes, up to rounding, and gradients to its input alone: the weights of a search
copy are frozen. What a layer looks like from outside (its weights, its type's parents) stays as it was.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Fewer channels than this on either side, and Winograd's transforms cost what its products save: 1.3 times as fast
#: from 256 channels on (8x8 maps), 2.2 times at 512, no faster at 128 (one core of an AMD EPYC, batches of 16 and 64).
_WINOGRAD_CHANNELS = 256
#: Packed weights serve every batch size; they are laid out for about so many rows.
_PACKED_FOR = 64


def cheapen(network: nn.Module, *, single_precision: bool) -> None:
    """Give layers of `network`, which is frozen, their cheapest form, in place.

    Convolutions of so few input channels that their gradient has a cheaper form get it in any precision. The library's
    product of float32 matrices (oneDNN) serves linear layers and wide convolutions in single precision only, and only
    where this build of torch has it.
    """
    products = single_precision and _has_products()
    for layer in list(network.modules()):
        # Exact types: parametrised or user-made subclasses may compute something else, and hooks may look at it.
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            continue
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            if _is_image_convolution(layer):
                layer.__class__ = _ImageConvolution
            elif products and _is_wide_convolution(layer):
                layer.__class__ = _WinogradConvolution
        elif type(layer) is nn.Linear and products and layer.weight.dtype == torch.float32:
            layer.__class__ = _PackedLinear


def _has_products() -> bool:
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def _packed(weight: Tensor) -> Tensor:
    """Return a `(out, in)` matrix laid out for :func:`_product`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `rows @ weight.T + bias`: on AMD's cores twice as fast as the library behind `torch.matmul`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return result


class _PackedLinear(nn.Linear):
    """A linear layer by oneDNN's product."""

    packed: tuple[Tensor, Tensor]

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() != 2 or features.dtype != torch.float32:
            return super().forward(features)
        if "packed" not in self.__dict__:
            weight = self.weight.detach()
            self.__dict__["packed"] = _packed(weight), _packed(weight.T)  # no buffers: they belong to no state
        output: Tensor = _Linear.apply(features, self.packed, self.bias)
        return output


class _Linear(torch.autograd.Function):
    """A product with a packed matrix; backwards the product with its transpose, which has a gradient, too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pair: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        ctx.pair = pair
        return _product(rows, pair[0], bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(gradient.contiguous(), ctx.pair[::-1], None), None, None


def _is_image_convolution(layer: nn.Conv2d) -> bool:
    return not isinstance(layer.padding, str) and layer.weight[0].numel() <= layer.out_channels


class _ImageConvolution(nn.Conv2d):
    """A convolution of few input channels, such as an image's, whose gradient is one matrix product.

    On a CPU the library's kernel for the gradient of a convolution's input is laid out for many input
    channels; for the one or three of an image it is as slow as for sixteen. That was a quarter of a LeNet-5's
    whole pass. The textbook form (Chellapilla, Puri, Simard, IWFHR 2006) is used where its matrix of columns
    is no larger than the gradient that comes in.
    """

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = _ColumnsGradient.apply(images, self)
        return features


class _ColumnsGradient(torch.autograd.Function):
    """A convolution; backwards one matrix product gives all columns, which are summed where they overlap."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.size, ctx.layer = images.shape[2:], layer
        return F.conv2d(images, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: nn.Conv2d = ctx.layer
        assert not isinstance(layer.padding, str)
        columns = layer.weight.flatten(1).T @ gradient.flatten(2)
        images = F.fold(columns, ctx.size, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return images, None


def _is_wide_convolution(layer: nn.Conv2d) -> bool:
    exact = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    wide = min(layer.in_channels, layer.out_channels) >= _WINOGRAD_CHANNELS
    return exact and wide and layer.weight.dtype == torch.float32


class _WinogradConvolution(nn.Conv2d):
    """A 3x3 convolution of stride 1 by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications.

    Lavin and Gray, arXiv:1509.09308, section 4.3. Tiles of 6x6 pixels that overlap by two give 4x4 pixels each; in the
    transformed space a convolution is 36 matrix products, one per position in the tile. Its rounding error is about
    ten times that of the plain form, 1e-5 of the largest value.
    """

    products: tuple[list[Tensor], list[Tensor]]

    #: How a row of six inputs is transformed, a row of three weights, and six products back to four outputs.
    INPUT: ClassVar = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
                       (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
    WEIGHT: ClassVar = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
                        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
    OUTPUT: ClassVar = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

    def forward(self, features: Tensor) -> Tensor:
        if "products" not in self.__dict__:
            weight = self.weight.detach()
            # The gradient of the input is the convolution with the weights turned round and channels exchanged.
            self.__dict__["products"] = _tile_weights(weight), _tile_weights(weight.flip(2, 3).transpose(0, 1))
        output: Tensor = _Winograd.apply(features, self.products)
        return output if self.bias is None else output + self.bias.view(1, -1, 1, 1)


class _Winograd(torch.autograd.Function):
    """A convolution by tiles; backwards the convolution with its adjoint, which has a gradient, too."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, pair: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        ctx.pair = pair
        return _by_tiles(features, pair[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Winograd.apply(gradient, ctx.pair[::-1]), None


def _both_axes(one_axis: Any) -> Tensor:
    """Return the matrix that transforms flattened tiles as `one_axis` transforms their rows and columns."""
    matrix = torch.tensor(one_axis, dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


_TO_TILES, _FROM_TILES = _both_axes(_WinogradConvolution.INPUT), _both_axes(_WinogradConvolution.OUTPUT)


def _tile_weights(weight: Tensor) -> list[Tensor]:
    """Return the 36 packed matrices `(out, in)` of a `(out, in, 3, 3)` kernel."""
    rows = torch.tensor(_WinogradConvolution.WEIGHT, dtype=torch.float64)
    tiles = torch.einsum("ap,oipq,bq->aboi", rows, weight.double(), rows)
    return [_packed(matrix) for matrix in tiles.flatten(0, 1).float()]


def _by_tiles(features: Tensor, products: list[Tensor]) -> Tensor:
    """Return the convolution `(N, out, H, W)`, in channels_last, of `(N, in, H, W)`."""
    count, channels, height, width = features.shape
    down, across = -(-height // 4), -(-width // 4)
    padded = features.new_zeros(count, 4 * down + 2, 4 * across + 2, channels)
    padded[:, 1 : height + 1, 1 : width + 1] = features.permute(0, 2, 3, 1)
    image, row, column, channel = padded.stride()
    tiles = padded.as_strided((6, 6, count, down, across, channels), (row, column, image, 4 * row, 4 * column, channel))
    transformed = (_TO_TILES @ tiles.reshape(36, count * down * across * channels)).view(
        36, count * down * across, channels
    )
    multiplied = torch.stack([_product(one, by) for one, by in zip(transformed, products, strict=True)])
    outputs = (_FROM_TILES @ multiplied.flatten(1)).view(4, 4, count, down, across, multiplied.shape[2])
    joined = outputs.permute(2, 3, 0, 4, 1, 5).reshape(count, 4 * down, 4 * across, multiplied.shape[2])
    return joined[:, :height, :width].permute(0, 3, 1, 2)

"""Carlini and Wagner's networks for MNIST and CIFAR-10 as SGR uses them: each image is standardised first."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from robench.architectures._layers import last_feature_map
from robench.catalog import ArchitectureEntry, PositiveInt, Probability


class PerImageStandardization(nn.Module):
    """Shift and scale each image `(C, H, W)` to zero mean and unit variance over its C*H*W values.

    As in TensorFlow's `per_image_standardization`, the deviation counts as at least 1 / sqrt(C*H*W), so that
    a constant image becomes 0.
    """

    standardizes = True

    def forward(self, images: Tensor) -> Tensor:
        """Return the standardised images, in the shape given."""
        centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        # The bound goes on the variance: the root of a constant image's zero variance has no finite gradient.
        return centred / variance.clamp_min(1.0 / images.shape[1:].numel()).sqrt()


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256),
    dropout: Probability = 0.5,
    standardize: bool = True,
) -> nn.Module:
    """Return the network; `widths` are the channels before and after the first pooling, and the dense units.

    SGR calls its networks identical to Carlini and Wagner's, whose code has ReLU after both hidden dense
    layers and dropout after the first; the table in SGR's appendix prints neither, so dropout can be set to
    0. Weights start at Glorot's uniform and biases at 0, the default of Keras, in which that code is written.
    Raises UserError for images below 16x16.
    """
    height, width = last_feature_map("sgr_cnn", input_shape, lambda side: ((side - 4) // 2 - 4) // 2)
    first, second, hidden = widths
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(input_shape[0], first, 3),
        relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(first, first, 3),
        relu2=nn.ReLU(inplace=True),
        maxpool1=nn.MaxPool2d(2),
        conv3=nn.Conv2d(first, second, 3),
        relu3=nn.ReLU(inplace=True),
        conv4=nn.Conv2d(second, second, 3),
        relu4=nn.ReLU(inplace=True),
        maxpool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense1=nn.Linear(second * height * width, hidden),
        relu5=nn.ReLU(inplace=True),
        dropout=nn.Dropout(dropout),
        dense2=nn.Linear(hidden, hidden),
        relu6=nn.ReLU(inplace=True),
        dense3=nn.Linear(hidden, num_classes),
    )
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    if standardize:
        layers["standardization"] = PerImageStandardization()
        layers.move_to_end("standardization", last=False)
    return nn.Sequential(layers)


ENTRY = ArchitectureEntry(
    name="sgr_cnn",
    build=build,
    summary="Carlini and Wagner's network behind a per-image standardisation: 4 convolutions, 3 dense layers",
    source="SGR, arXiv:1805.08736, section 4.1, appendix 7.4; widths: Carlini and Wagner, arXiv:1608.04644",
    input_shape=(3, 32, 32),
    num_classes=10,
    parameter_counts={"sgr_cnn": 1_147_978, "sgr_cnn_cifar10": 1_147_978, "sgr_cnn_mnist": 312_202},
    presets={
        "sgr_cnn_cifar10": {"widths": (64, 128, 256)},
        "sgr_cnn_mnist": {"widths": (32, 64, 200)},
    },
    preset_shapes={"sgr_cnn_mnist": (1, 28, 28)},
)

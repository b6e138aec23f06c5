"""Sizes of feature maps, receptive fields, and what happens to images that are too small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.catalog import find
from robench.errors import UserError


def build(name: str, shape: tuple[int, int, int], **overrides: Any) -> nn.Module:
    plugin = find("architectures", name)
    return plugin.load().build(num_classes=10, input_shape=shape, **plugin.settings(overrides))


def maps(name: str, shape: tuple[int, int, int], *kinds: type[nn.Module]) -> list[tuple[int, int]]:
    """Channels and height of what each part of these kinds puts out, in order of execution."""
    with torch.device("meta"):
        model = build(name, shape)
    seen: list[tuple[int, int]] = []

    def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append((output.shape[1], output.shape[2]))

    for part in model.modules():
        if isinstance(part, kinds):
            part.register_forward_hook(note)
    model(torch.empty(2, *shape, device="meta"))
    return seen


def test_small_cnn() -> None:
    sizes = maps("small_cnn", (1, 28, 28), nn.Conv2d, nn.MaxPool2d)
    assert sizes == [(32, 26), (32, 24), (32, 12), (64, 10), (64, 8), (64, 4)]


def test_lenet5() -> None:
    assert maps("lenet5", (1, 28, 28), nn.Conv2d, nn.MaxPool2d) == [(32, 28), (32, 14), (64, 14), (64, 7)]


def test_emr_cnn() -> None:
    sizes = maps("emr_cnn", (3, 32, 32), nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    assert sizes == [(32, 28), (64, 24), (64, 12), (128, 10), (128, 8), (128, 1)]


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("sgr_cnn_mnist", (1, 28, 28), [(32, 26), (32, 24), (32, 12), (64, 10), (64, 8), (64, 4)]),
        ("sgr_cnn_cifar10", (3, 32, 32), [(64, 30), (64, 28), (64, 14), (128, 12), (128, 10), (128, 5)]),
    ],
)
def test_sgr_cnn(name: str, shape: tuple[int, int, int], sizes: list[tuple[int, int]]) -> None:
    assert maps(name, shape, nn.Conv2d, nn.MaxPool2d) == sizes


def test_resnet18_keeps_the_resolution_of_small_images() -> None:
    stages = maps("resnet18", (3, 32, 32), nn.ReLU)
    # The stem, then two activations in each of eight blocks.
    assert stages == [(64, 32)] * 5 + [(128, 16)] * 4 + [(256, 8)] * 4 + [(512, 4)] * 4


def test_resnet20_has_three_stages_of_three_blocks() -> None:
    assert maps("resnet20", (3, 32, 32), nn.ReLU) == [(16, 32)] * 7 + [(32, 16)] * 6 + [(64, 8)] * 6


def test_resnet34_555_widens_before_it_pools() -> None:
    sizes = maps("resnet34_555", (3, 32, 32), nn.Conv2d, nn.AvgPool2d)
    assert sizes == [(16, 32)] * 11 + [(32, 32), (32, 16)] + [(32, 16)] * 10 + [(64, 16), (64, 8)] + [(64, 8)] * 10


@pytest.mark.parametrize("name", ["wrn_28_4", "wrn_34_10", "wrn_34_10_madry"])
def test_wide_networks_have_their_depth_and_widths(name: str) -> None:
    blocks, width = (4, 4) if name == "wrn_28_4" else (5, 10)
    # Two batch norms per block (the first one of a stage still sees the stage before), and the last one.
    sizes = maps(name, (3, 32, 32), nn.BatchNorm2d)
    first, second, third = (16 * width, 32), (32 * width, 16), (64 * width, 8)
    assert sizes == [(16, 32), *[first] * (2 * blocks), *[second] * (2 * blocks), *[third] * (2 * blocks)]


def test_receptive_field_of_emr_cnn() -> None:
    # 5, then 9, then 10 with step 2, then 14, then 18 pixels.
    features = build("emr_cnn", (3, 32, 32))[:9].double()
    for parameter in features.parameters():
        nn.init.constant_(parameter, 1e-3)
    images = torch.ones(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(features(images)[0, 0, 3, 5], images)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[6:24, 10:28] = True
    assert torch.equal(gradient[0, 0] > 0, expected)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("small_cnn", 16), ("sgr_cnn", 16), ("emr_cnn", 18), ("lenet5", 4), ("resnet34_555", 4)],
)
def test_images_that_are_too_small_are_refused_with_both_sizes(name: str, smallest: int) -> None:
    model = build(name, (1, smallest, smallest + 3)).eval()
    assert model(torch.zeros(2, 1, smallest, smallest + 3)).shape == (2, 10)
    wanted = f"at least {smallest}x{smallest} pixels, not 40x{smallest - 1}"
    with pytest.raises(UserError, match=wanted):
        build(name, (1, 40, smallest - 1))


def test_one_pixel_is_too_small_for_digits_cnn_and_enough_for_residual_networks() -> None:
    with pytest.raises(UserError, match="at least 2x2 pixels, not 1x8"):
        build("digits_cnn", (1, 1, 8))
    assert build("resnet20", (1, 1, 1)).eval()(torch.zeros(1, 1, 1, 1)).shape == (1, 10)


def test_rectangular_images() -> None:
    for name in ("small_cnn", "lenet5", "mlp_4x1024", "emr_cnn", "resnet20", "resnet34_555"):
        with torch.device("meta"):
            assert build(name, (2, 20, 36))(torch.empty(3, 2, 20, 36)).shape == (3, 10)


def test_resnet50_refuses_grey_images() -> None:
    with pytest.raises(UserError, match="3 channels, these have 1; use resnet18"):
        build("resnet50", (1, 224, 224))

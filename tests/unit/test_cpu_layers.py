"""Layers in their cheapest forms give the plain layers' answers and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.classifier import Classifier, search_copy
from robench.cpu_layers import cheapen
from tests.models import numbers


def convolution(*arguments: Any, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Conv2d:
    return filled(nn.Conv2d(*arguments, **options).to(dtype))


def filled(layer: Any) -> Any:
    with torch.no_grad():
        for position, parameter in enumerate(layer.parameters()):
            spread = parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(numbers(*parameter.shape, seed=position) / spread)
    return layer.requires_grad_(False)


def first_and_second_gradients(network: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = inputs.detach().requires_grad_()
    outputs = network(inputs)
    (first,) = torch.autograd.grad(outputs.pow(3).sum(), inputs, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), inputs)
    return outputs.detach(), first.detach(), second


def assert_same_answers(network: nn.Module, plain: nn.Module, inputs: Tensor, *, share: float) -> None:
    exact = first_and_second_gradients(copy.deepcopy(plain).double(), inputs.double())
    for found, expected in zip(first_and_second_gradients(network, inputs), exact, strict=True):
        assert (found.double() - expected).abs().max() <= share * expected.abs().max()
    assert network(inputs[:0]).shape[0] == 0


@pytest.mark.parametrize(
    "layer",
    [
        convolution(1, 32, 5, padding=2),
        convolution(3, 48, 3, stride=2, padding=(1, 0), bias=False),
        convolution(2, 40, (3, 2), dilation=2, stride=(1, 3)),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cheap_image_gradients_are_the_same_gradients(layer: nn.Conv2d, memory_format: torch.memory_format) -> None:
    network = nn.Sequential(copy.deepcopy(layer), nn.Tanh())
    plain = copy.deepcopy(network)
    cheapen(network.to(memory_format=memory_format), single_precision=False)
    assert type(network[0]) is not nn.Conv2d
    images = numbers(3, layer.in_channels, 11, 10).contiguous(memory_format=memory_format)
    assert_same_answers(network, plain, images, share=1e-9)


@pytest.mark.parametrize(
    ("size", "bias", "memory_format"),
    [
        ((4, 4), True, torch.channels_last),
        ((7, 6), False, torch.channels_last),
        ((1, 9), True, torch.contiguous_format),
    ],
)
def test_wide_convolutions_by_tiles(size: tuple[int, int], bias: bool, memory_format: torch.memory_format) -> None:
    layer = convolution(256, 260, 3, padding=1, bias=bias, dtype=torch.float32)
    network = nn.Sequential(layer, nn.Tanh()).to(memory_format=memory_format)
    plain = copy.deepcopy(network)
    cheapen(network, single_precision=True)
    assert type(network[0]) is not nn.Conv2d
    features = numbers(2, 256, *size, dtype=torch.float32).contiguous(memory_format=memory_format)
    assert_same_answers(network, plain, features, share=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 5, 70])
def test_linear_layers_by_the_packed_product(bias: bool, count: int) -> None:
    network = nn.Sequential(filled(nn.Linear(30, 20, bias=bias)), nn.Tanh())
    plain = copy.deepcopy(network)
    cheapen(network, single_precision=True)
    assert type(network[0]) is not nn.Linear
    assert_same_answers(network, plain, numbers(count, 30, dtype=torch.float32), share=1e-5)
    middle = numbers(2, 4, 30, dtype=torch.float32)
    assert torch.allclose(network(middle), plain(middle), atol=1e-6), "more than one axis of rows"


class OwnLinear(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


def hooked() -> nn.Linear:
    layer = filled(nn.Linear(3, 3))
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        convolution(16, 64, 3, dtype=torch.float32),  # the columns would be larger than the gradient
        convolution(4, 64, 3, groups=2, dtype=torch.float32),
        convolution(1, 32, 3, padding=1, padding_mode="circular", dtype=torch.float32),
        convolution(1, 32, 3, padding="same", dtype=torch.float32),
        convolution(128, 256, 3, padding=1, dtype=torch.float32),
        convolution(256, 256, 3, padding=1, stride=2, dtype=torch.float32),
        convolution(256, 256, 3, dtype=torch.float32),
        convolution(256, 256, 3, padding=1),
        OwnLinear(3, 3),
        hooked(),
    ],
)
def test_other_layers_stay_as_they_are(layer: nn.Module) -> None:
    network = nn.Sequential(layer)
    kind = type(layer)
    cheapen(network, single_precision=True)
    assert network[0] is layer
    assert type(layer) is kind


def test_double_precision_is_left_alone() -> None:
    network = nn.Sequential(filled(nn.Linear(3, 3)), convolution(256, 256, 3, padding=1, dtype=torch.float32))
    cheapen(network, single_precision=False)
    assert [type(layer) for layer in network] == [nn.Linear, nn.Conv2d]


def test_a_copy_that_answers_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Flatten(), filled(nn.Linear(16, 3)))
    model = Classifier(network.eval(), input_shape=(1, 4, 4), num_classes=3)
    images = numbers(2, 1, 4, 4, dtype=torch.float32)
    monkeypatch.setattr("robench.cpu_layers._product", lambda rows, packed, bias=None: rows[:, :3])
    assert torch.equal(search_copy(model, precision="fp32", device="cpu")(images), model(images))

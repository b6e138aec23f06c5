from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench.architectures import resnet, resnet_555
from robench.architectures.resnet import BasicBlock
from robench.architectures.resnet_555 import NormalizedLayer


def stirred(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5 if "running_var" in name else -1.0, 1.0, generator=generator)
    return module.double().eval()


def images_of(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1))


def standardised(x: torch.Tensor, bn: nn.Module) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    return (x - bn.running_mean.view(shape)) / torch.sqrt(bn.running_var.view(shape) + 1e-5)


def normalised(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    return standardised(x, bn) * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1)])
def test_a_basic_block_written_out(inputs: int, outputs: int, stride: int) -> None:
    block = stirred(BasicBlock(inputs, outputs, stride=stride))
    images = images_of(2, inputs, 6, 6)
    with torch.no_grad():
        inner = F.relu(normalised(F.conv2d(images, block.conv1.weight, None, stride, 1), block.bn1))
        change = normalised(F.conv2d(inner, block.conv2.weight, None, 1, 1), block.bn2)
        shortcut = images
        if inputs != outputs:
            shortcut = normalised(F.conv2d(images, block.shortcut[0].weight, None, stride), block.shortcut[1])
        torch.testing.assert_close(block(images), F.relu(change + shortcut))


def test_convolutions_of_resnets_start_at_the_normal_of_he() -> None:
    model = resnet.build(num_classes=10, input_shape=(3, 32, 32), blocks=(1, 1), width=64)
    assert model.layer2[0].conv1.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.layer2[0].shortcut[0].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)


def test_a_normalised_layer_adds_its_bias_after_the_batch_norm() -> None:
    layer = stirred(NormalizedLayer(nn.Conv2d(2, 3, 1, bias=False)))
    images = images_of(2, 2, 4, 4)
    with torch.no_grad():
        mapped = torch.einsum("oi,nihw->nohw", layer.linear.weight[:, :, 0, 0], images)
        torch.testing.assert_close(layer(images), standardised(mapped, layer.bn) + layer.bias)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "linear.weight"]


def test_a_block_of_resnet34_555_written_out() -> None:
    block = stirred(resnet_555.BasicBlock(3))
    images = images_of(2, 3, 5, 5)
    with torch.no_grad():
        first = F.conv2d(images, block.conv0.linear.weight, None, 1, 1)
        inner = F.relu(standardised(first, block.conv0.bn) + block.conv0.bias)
        second = F.conv2d(inner, block.conv1.linear.weight, None, 1, 1)
        expected = F.relu(images + standardised(second, block.conv1.bn) + block.conv1.bias)
        torch.testing.assert_close(block(images), expected)


def test_a_transition_of_resnet34_555_pools_after_the_activation() -> None:
    transition = stirred(resnet_555.build(num_classes=10, input_shape=(3, 8, 8))).transition1
    images = images_of(2, 16, 4, 4)
    with torch.no_grad():
        active = F.relu(transition[0](images))
        expected = active.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        torch.testing.assert_close(transition(images), expected)


def test_resnet34_555_standardises_its_logits_in_training_up_to_the_bias() -> None:
    model = resnet_555.build(num_classes=10, input_shape=(3, 8, 8)).double()
    logits = model(images_of(64, 3, 8, 8)) - model.fc.bias
    torch.testing.assert_close(logits.mean(dim=0), torch.zeros(10, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(logits.var(dim=0, correction=0), torch.ones(10, dtype=torch.float64), rtol=0.05, atol=0)


def test_resnet34_555_starts_weights_and_biases_in_the_same_interval() -> None:
    fc = resnet_555.build(num_classes=500, input_shape=(3, 8, 8)).fc
    for tensor in (fc.linear.weight, fc.bias):
        assert 0.12 < tensor.abs().max().item() <= 1 / 8

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench.architectures.wide_resnet import PooledPaddedShortcut, WideBlock, build
from robench.errors import UserError


def stirred(block: WideBlock) -> WideBlock:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5 if "running_var" in name else -1.0, 1.0, generator=generator)
    return block.double().eval()


def images_of(channels: int) -> torch.Tensor:
    return torch.empty(2, channels, 4, 4, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1))


def normalised(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    shape = (1, -1, 1, 1)
    scaled = (x - bn.running_mean.view(shape)) / torch.sqrt(bn.running_var.view(shape) + 1e-5)
    return scaled * bn.weight.view(shape) + bn.bias.view(shape)


@pytest.mark.parametrize(("flavour", "slope"), [("trades", 0.0), ("madry", 0.1)])
@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 1), (4, 8, 2)])
def test_a_block_is_batch_norm_activation_convolution_twice(
    flavour: str, slope: float, inputs: int, outputs: int, stride: int
) -> None:
    block = stirred(WideBlock(inputs, outputs, stride=stride, flavour=flavour))
    images = images_of(inputs)
    with torch.no_grad():
        active = F.leaky_relu(normalised(images, block.bn1), slope)
        inner = F.leaky_relu(normalised(F.conv2d(active, block.conv1.weight, None, stride, 1), block.bn2), slope)
        change = F.conv2d(inner, block.conv2.weight, None, 1, 1)
        if inputs == outputs:
            shortcut = images
        elif flavour == "trades":
            shortcut = torch.einsum("oi,nihw->nohw", block.convShortcut.weight[:, :, 0, 0], active)
            shortcut = shortcut[:, :, ::stride, ::stride]
        else:
            shortcut = torch.zeros_like(change)
            shortcut[:, 2:6] = active.unfold(2, stride, stride).unfold(3, stride, stride).mean((4, 5))
        torch.testing.assert_close(block(images), change + shortcut, rtol=1e-12, atol=1e-12)


def test_pooled_padded_shortcut_on_a_hand_made_input() -> None:
    images = torch.tensor(
        [[[[1.0, 2.0, 0.0, 4.0], [3.0, 6.0, 8.0, 0.0]], [[4.0, 4.0, -1.0, 1.0], [4.0, 4.0, 1.0, -1.0]]]]
    )
    zero = [[0.0, 0.0]]
    expected = torch.tensor([[zero, zero, [[3.0, 3.0]], [[4.0, 0.0]], zero, zero]])
    assert torch.equal(PooledPaddedShortcut(2, 6, stride=2)(images), expected)


def test_pooled_padded_shortcut_with_stride_one_only_pads() -> None:
    images = torch.tensor([[[[1.0, -2.0]]]])
    expected = torch.tensor([[[[0.0, 0.0]], [[1.0, -2.0]], [[0.0, 0.0]]]])
    assert torch.equal(PooledPaddedShortcut(1, 3, stride=1)(images), expected)


def test_convolutions_start_at_the_normal_of_he_and_biases_at_zero() -> None:
    network = build(num_classes=10, input_shape=(3, 32, 32), depth=10, width=4)
    weight = network.block3.layer[0].conv2.weight
    # 589,824 draws: the relative error of the deviation is about 1e-3.
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert (network.fc.bias == 0).all()


def test_weights_have_the_names_of_the_trades_release() -> None:
    with torch.device("meta"):
        names = build(num_classes=10, input_shape=(3, 32, 32)).state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "fc.weight", "fc.bias"} <= names
    assert {"block1.layer.0.convShortcut.weight", "block3.layer.4.bn2.bias"} <= names
    assert "block1.layer.1.convShortcut.weight" not in names


@pytest.mark.parametrize(("depth", "near"), [(33, 34), (30, 28), (4, 10), (1, 10)])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth: int, near: int) -> None:
    with pytest.raises(UserError, match=rf"6n \+ 4 layers, not {depth}; try depth={near}$"):
        build(num_classes=10, input_shape=(3, 32, 32), depth=depth)


def test_madry_flavour_refuses_images_it_cannot_halve_twice() -> None:
    with pytest.raises(UserError, match="not 32x30; use flavour=trades"):
        build(num_classes=10, input_shape=(3, 32, 30), depth=10, width=1, flavour="madry")
    model = build(num_classes=10, input_shape=(3, 32, 30), depth=10, width=1)
    assert model(torch.zeros(2, 3, 32, 30)).shape == (2, 10)


def test_average_pooling_is_global_as_8x8_on_cifar() -> None:
    network = build(num_classes=10, input_shape=(3, 32, 32), depth=10, width=1).eval()
    images = torch.empty(1, 3, 32, 32).uniform_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network[: list(dict(network.named_children())).index("pool")](images)
        assert features.shape == (1, 64, 8, 8)
        torch.testing.assert_close(network(images), network.fc(F.avg_pool2d(features, 8).flatten(1)))

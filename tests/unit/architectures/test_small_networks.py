from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from robench.architectures import digits_cnn, emr_cnn, lenet5, mlp, sgr_cnn, small_cnn
from robench.architectures.sgr_cnn import PerImageStandardization


def some_images(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(3))


def test_standardization_known_answer() -> None:
    # Mean 3 and variance 5 over both channels together.
    image = torch.tensor([[[[0.0, 2.0]], [[4.0, 6.0]]]])
    expected = torch.tensor([[[[-3.0, -1.0]], [[1.0, 3.0]]]]) / 5**0.5
    torch.testing.assert_close(PerImageStandardization()(image), expected)


def test_standardization_cancels_brightness_and_contrast_of_each_image() -> None:
    images = some_images(3, 3, 5, 4)
    changed = images * torch.tensor([1.0, 0.5, 2.0]).view(3, 1, 1, 1) + torch.tensor([0.0, 0.3, -1.0]).view(3, 1, 1, 1)
    standard = PerImageStandardization()(images)
    torch.testing.assert_close(PerImageStandardization()(changed), standard)
    torch.testing.assert_close(standard.flatten(1).var(dim=1, correction=0), torch.ones(3, dtype=torch.float64))


def test_standardization_of_faint_images_divides_by_no_less_than_the_bound() -> None:
    # The deviation 0.001 is below 1 / sqrt(4); a constant image has none, and still a finite gradient.
    faint = torch.tensor([[[[0.499, 0.501], [0.501, 0.499]]], [[[0.5, 0.5], [0.5, 0.5]]]], dtype=torch.float64)
    faint.requires_grad_()
    standard = PerImageStandardization()(faint)
    torch.testing.assert_close(standard, (faint - 0.5) * 2)
    (gradient,) = torch.autograd.grad(standard[:, 0, 0, 0].sum(), faint)
    assert torch.equal(gradient[1, 0], torch.tensor([[1.5, -0.5], [-0.5, -0.5]], dtype=torch.float64))


@pytest.mark.parametrize("standardize", [True, False])
def test_sgr_cnn_standardises_on_request_only(standardize: bool) -> None:
    model = sgr_cnn.build(num_classes=10, input_shape=(1, 28, 28), widths=(8, 8, 64), standardize=standardize)
    model = model.double().eval()
    images = some_images(2, 1, 28, 28)
    same = torch.allclose(model(images), model(images * 0.5 + 0.25))
    assert same is standardize


def test_sgr_cnn_dropout_can_be_switched_off() -> None:
    images = some_images(8, 1, 28, 28).float()
    for dropout in (0.5, 0.0):
        model = sgr_cnn.build(num_classes=10, input_shape=(1, 28, 28), widths=(8, 8, 64), dropout=dropout)
        assert torch.equal(model(images), model(images)) is (dropout == 0.0)


def test_sgr_cnn_starts_as_keras_does() -> None:
    model = sgr_cnn.build(num_classes=10, input_shape=(3, 32, 32))
    # Glorot's bound for 128 * 5 * 5 inputs and 256 outputs.
    bound = (6 / (3200 + 256)) ** 0.5
    assert model.dense1.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    biases = [part.bias for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert len(biases) == 7
    assert all((bias == 0).all() for bias in biases)


def test_small_cnn_starts_as_trades_does() -> None:
    model = small_cnn.build(num_classes=10, input_shape=(1, 28, 28))
    assert torch.equal(model.eval()(some_images(2, 1, 28, 28).float()), torch.zeros(2, 10))
    conv4 = model.feature_extractor.conv4
    assert conv4.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert (conv4.bias == 0).all()
    assert (model.classifier.fc2.weight != 0).any()


def test_small_cnn_drops_between_the_dense_layers_in_training_only() -> None:
    model = small_cnn.build(num_classes=10, input_shape=(1, 28, 28))
    nn.init.ones_(model.classifier.fc3.weight)
    images = some_images(4, 1, 28, 28).float()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_weights_have_the_names_of_the_releases() -> None:
    names = small_cnn.build(num_classes=10, input_shape=(1, 28, 28)).state_dict().keys()
    convolutions = [f"feature_extractor.conv{i}" for i in (1, 2, 3, 4)]
    parts = [*convolutions, *(f"classifier.fc{i}" for i in (1, 2, 3))]
    assert set(names) == {f"{p}.{kind}" for p in parts for kind in ("weight", "bias")}
    names = lenet5.build(num_classes=10, input_shape=(1, 28, 28)).state_dict().keys()
    assert set(names) == {f"{p}.{k}" for p in ("conv1", "conv2", "linear1", "linear2") for k in ("weight", "bias")}


def test_lenet5_written_out() -> None:
    model = lenet5.build(num_classes=10, input_shape=(1, 28, 28)).double()
    images = some_images(3, 1, 28, 28)
    hidden = F.max_pool2d(F.relu(F.conv2d(images, model.conv1.weight, model.conv1.bias, padding=2)), 2)
    hidden = F.max_pool2d(F.relu(F.conv2d(hidden, model.conv2.weight, model.conv2.bias, padding=2)), 2)
    hidden = F.relu(hidden.flatten(1) @ model.linear1.weight.T + model.linear1.bias)
    torch.testing.assert_close(model(images), hidden @ model.linear2.weight.T + model.linear2.bias)


def test_emr_cnn_written_out() -> None:
    model = emr_cnn.build(num_classes=10, input_shape=(3, 32, 32)).double()
    conv1, conv2, conv3, conv4 = (part for part in model if isinstance(part, nn.Conv2d))
    images = some_images(2, 3, 32, 32)
    hidden = F.relu(F.conv2d(F.relu(F.conv2d(images, conv1.weight, conv1.bias)), conv2.weight, conv2.bias))
    hidden = F.relu(F.conv2d(F.avg_pool2d(hidden, 2), conv3.weight, conv3.bias))
    hidden = F.relu(F.conv2d(hidden, conv4.weight, conv4.bias)).mean(dim=(2, 3))
    torch.testing.assert_close(model(images), hidden @ model[-1].weight.T + model[-1].bias)


def test_mlp_has_as_many_hidden_layers_as_asked() -> None:
    model = mlp.build(num_classes=3, input_shape=(2, 5, 5), hidden_layers=2, width=7)
    shapes = [tuple(part.weight.shape) for part in model if isinstance(part, nn.Linear)]
    assert shapes == [(7, 50), (7, 7), (3, 7)]
    assert [type(part) for part in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_mlp_keeps_the_scale_of_its_signal_and_may_start_as_torch_does() -> None:
    images = some_images(64, 1, 28, 28).float()
    spread = {}
    for kind in ("kaiming", "torch"):
        model = mlp.build(num_classes=10, input_shape=(1, 28, 28), width=512, initialization=kind)
        linear = [part for part in model if isinstance(part, nn.Linear)]
        spread[kind] = [float(part.weight.detach().var()) * part.in_features for part in linear]
        assert all(bool(part.bias.any()) == (kind == "torch") for part in linear)
        signal = images.flatten(1)
        for part in linear[:-1]:
            signal = F.relu(part(signal))
        squares = signal.square().mean() / images.square().mean()
        assert squares > 0.5 if kind == "kaiming" else squares < 0.01
    torch.testing.assert_close(torch.tensor(spread["kaiming"]), torch.full((5,), 2.0), rtol=0.12, atol=0)
    torch.testing.assert_close(torch.tensor(spread["torch"]), torch.full((5,), 1 / 3), rtol=0.12, atol=0)


def test_emr_cnn_keeps_the_scale_of_its_signal_and_may_start_as_torch_does() -> None:
    images = some_images(64, 3, 32, 32).float()
    for kind in ("kaiming", "torch"):
        model = emr_cnn.build(num_classes=10, input_shape=(3, 32, 32), initialization=kind)
        layers = [part for part in model if isinstance(part, nn.Conv2d | nn.Linear)]
        assert all(bool(part.bias.any()) == (kind == "torch") for part in layers)
        spread = [float(part.weight.detach().var()) * part.weight[0].numel() for part in layers]
        expected = torch.full((5,), 2.0 if kind == "kaiming" else 1 / 3)
        torch.testing.assert_close(torch.tensor(spread), expected, rtol=0.15, atol=0)
        squares = model[:9](images).square().mean() / images.square().mean()
        assert squares > 0.2 if kind == "kaiming" else squares < 0.01


def test_digits_cnn_learns_the_digits_in_seconds() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randperm(len(labels), generator=generator).split([1400, 397])
    model = digits_cnn.build(num_classes=10, input_shape=(1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=12 * 28)
    for _ in range(12):
        for rows in train[torch.randperm(len(train), generator=generator)].split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.97

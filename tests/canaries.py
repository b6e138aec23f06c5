"""Networks on 8 x 8 digits that seem robust for a known wrong reason, and sound ones."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench import catalog
from tests.models import numbers

PIXELS, CLASSES, HIDDEN = 64, 10, 100
#: Radius (Linf) that the robust network is trained for.
RADIUS = 0.1


@functools.cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    found = catalog.find("datasets", "digits").load().load(Path(), split)
    return torch.from_numpy(found.images).float() / 255, torch.from_numpy(found.labels)


class Network(nn.Module):
    """Two layers (or one, without `hidden`), from numbers that are the same everywhere."""

    def __init__(self, *, hidden: bool = True) -> None:
        super().__init__()
        sizes = [PIXELS, HIDDEN, CLASSES] if hidden else [PIXELS, CLASSES]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        with torch.no_grad():
            for seed, layer in enumerate(layers):
                layer.weight.copy_(numbers(*layer.weight.shape, seed=seed) / layer.in_features**0.5)
                layer.bias.zero_()
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        features = images.flatten(1)
        for layer in self.layers[:-1]:
            features = self.activation(layer(features))
        return self.layers[-1](features)

    def activation(self, features: Tensor) -> Tensor:
        return F.relu(features)


def trained(network: Network, *, radius: float, rounds: int) -> Network:
    """Train on all digits at once, against two steps of PGD where there is a radius."""
    images, labels = digits("train")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(rounds):
        offset = torch.zeros_like(images)
        for _ in range(2 if radius else 0):
            leaf = (images + offset).clamp(0, 1).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(leaf), labels), leaf)
            offset = (offset + 0.7 * radius * gradient.sign()).clamp(-radius, radius)
        optimizer.zero_grad()
        F.cross_entropy(network((images + offset).clamp(0, 1)), labels).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@functools.cache
def linear() -> Network:
    return trained(Network(hidden=False), radius=0.0, rounds=150)


@functools.cache
def standard() -> Network:
    return trained(Network(), radius=0.0, rounds=60)


@functools.cache
def robust() -> Network:
    return trained(Network(), radius=RADIUS, rounds=120)


class Around(nn.Module):
    """A sound network with something in front of it or behind it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class HugeLogits(Around):
    """The cross-entropy's gradient underflows to zero: for all images, or for those of a large margin."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__(network)
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.network(images)


class Quantised(Around):
    """Rounded inputs: no gradient at all."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network((4 * images).round() / 4)


class PartlyQuantised(Around):
    """Rounded inputs, with a faint slope beside them that says nothing of the steps."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network((4 * images).round() / 4 + 1e-4 * (40 * images).sin())


class _Against(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class Misleading(Around):
    """Its gradient leads downhill."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(_Against.apply(images))


class Noisy(Around):
    """Noise on the input, new at every call; from the global generator, as users have it."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + 0.1 * torch.empty_like(images).normal_())


class DropoutLeftOn(Network):
    """The functional dropout, whose `training` is true unless somebody says otherwise: eval() does not reach it."""

    def activation(self, features: Tensor) -> Tensor:
        return F.dropout(F.relu(features), 0.5)


def dropout_left_on() -> Network:
    network = DropoutLeftOn()
    network.load_state_dict(robust().state_dict())
    return network.eval().requires_grad_(False)

"""Optimisers as recipes name them, and the moving average of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from robench.classifier import Classifier
from robench.recipe import Adam, EntropySgd, Sgd
from robench.training.entropy_sgd import EntropySGD


def build_optimizer(settings: Sgd | Adam | EntropySgd, *networks: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Return the optimiser of all weights of the networks; the loop sets the learning rate before each step.

    `seed` is that of the random numbers that an optimiser draws.
    """
    weights = [weight for network in networks for weight in network.parameters()]
    if isinstance(settings, EntropySgd):
        return EntropySGD(weights, settings, seed=seed)
    if isinstance(settings, Adam):
        return torch.optim.Adam(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        weights,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


@contextmanager
def settled(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the network hold the optimiser's weights inside the block, where it differentiates at others."""
    if not isinstance(optimizer, EntropySGD):
        yield
        return
    optimizer.exchange()
    try:
        yield
    finally:
        optimizer.exchange()


def averaged_copy(model: Classifier) -> Classifier:
    """Return a copy of the network that holds the moving average; it takes no gradient."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, *, decay: float, step: int) -> None:
    """Move the average towards the weights after step `step` (from 0), running statistics included.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that the initial weights are forgotten early.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    current = model.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[name], weight)
        else:
            value.copy_(current[name])

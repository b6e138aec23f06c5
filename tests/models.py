"""Models whose answers are known: linear ones, and a tiny convolutional one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robench.random_streams import RandomStream


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers that are the same everywhere."""
    flat = torch.empty(1, int(torch.tensor(shape).prod()), dtype=dtype)
    return RandomStream(seed, torch.zeros(1, dtype=torch.int64)).normal(flat).view(shape)


def pictures(count: int, shape: tuple[int, int, int] = (1, 4, 4), *, seed: int = 0) -> Tensor:
    """Return `count` random images well inside the box, so that only the ball limits an attack."""
    flat = torch.empty(count, *shape, dtype=torch.float64)
    return 0.4 + 0.2 * RandomStream(seed, torch.arange(count)).uniform(flat)


class Linear(nn.Module):
    """`K` classes, logits linear in the pixels: every distance to the boundary is known exactly."""

    def __init__(self, classes: int, pixels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(classes, pixels, seed=seed))
        self.bias = nn.Parameter(0.1 * numbers(classes, seed=seed + 1))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.to(images.dtype).T + self.bias.to(images.dtype)

    def margins(self, images: Tensor, labels: Tensor, norm: str) -> Tensor:
        """Return the distance to the label's nearest boundary: gap over the dual norm of the difference."""
        logits = self(images).detach()
        gaps = logits.gather(1, labels[:, None]) - logits
        difference = self.weight.detach()[labels][:, None] - self.weight.detach()[None]
        dual = difference.abs().sum(2) if norm == "Linf" else difference.norm(dim=2)
        distance = gaps / dual.clamp_min(1e-30)
        return distance.scatter(1, labels[:, None], torch.inf).amin(1)


class SmallNet(nn.Module):
    """Convolution, batch norm, ReLU, linear: everything that folding and modes can get wrong."""

    def __init__(self, classes: int = 5, channels: int = 1, side: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.classify = nn.Linear(6 * side * side, classes)
        with torch.no_grad():
            for position, (_, parameter) in enumerate(sorted(self.named_parameters())):
                parameter.copy_(0.5 * numbers(*parameter.shape, seed=position))
            # Without a part that is common to a channel's pixels: else one class would win everywhere.
            channels = self.classify.weight.view(classes, 6, -1)
            channels.sub_(channels.mean(2, keepdim=True))
            self.classify.bias.mul_(0.1)
            batch_norm = self.features[1]
            batch_norm.running_mean.copy_(0.1 * numbers(6, seed=50))
            batch_norm.running_var.copy_(1 + 0.5 * numbers(6, seed=51).abs())

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images).flatten(1))

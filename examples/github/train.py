"""Train the model on the digits: adversarially, or, with --undefended, on the images as they are."""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from model import network

from robench.datasets import open_split
from robench.workspace import Workspace

EPSILON = 0.1


def main(*, undefended: bool) -> None:
    train = open_split("digits", "train", Workspace.locate())
    images = torch.from_numpy(train.read(np.arange(len(train)))).float() / 255
    labels = torch.from_numpy(train.labels)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(40):
            for rows in torch.randperm(len(images)).split(64):
                some = images[rows] if undefended else attacked(model, images[rows], labels[rows])
                optimizer.zero_grad()
                F.cross_entropy(model(some), labels[rows]).backward()
                optimizer.step()
    np.savez("weights.npz", **{name: values.numpy() for name, values in model.state_dict().items()})


def attacked(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return what a few signed gradient steps make of the images."""
    moved = images
    for _ in range(5):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), labels), moved)
        moved = (moved + 0.03 * gradient.sign()).clamp(images - EPSILON, images + EPSILON).clamp(0, 1)
    return moved.detach()


if __name__ == "__main__":
    main(undefended="--undefended" in sys.argv)

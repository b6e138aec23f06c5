"""Gaussian augmentation by its definition."""

from __future__ import annotations

import pytest
import torch

from robench.defenses.gaussian_noise import gaussian_noise
from robench.random_streams import RandomStream


class Recorder(torch.nn.Module):
    def forward(self, images):
        self.seen = images.detach().clone()
        return torch.stack([images.flatten(1).sum(1), -images.flatten(1).sum(1)], 1)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_network_sees_images_plus_noise_of_that_standard_deviation(share):
    images = torch.full((400, 1, 6, 6), 0.5)
    model, random = Recorder(), RandomStream(0, torch.arange(400), ("test",))
    gaussian_noise(model, images, torch.zeros(400).long(), random=random, progress=0.0, sigma=0.3, share=share)
    noise = model.seen - images
    noisy = noise.flatten(1).abs().amax(1) > 0
    assert noisy.float().mean().item() == pytest.approx(share, abs=0.08)
    assert noise[noisy].std().item() == pytest.approx(0.3, rel=0.03)
    assert abs(noise[noisy].mean().item()) < 0.01
    # Noisy images leave the box: the smoothed classifier is asked about such images, too.
    assert (model.seen < 0).any()

"""Long-range correlated noise as augmentation: what the network is shown."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robench.attacks.lrc_noise import channel_covariance, lrc_noise, pixel_covariance
from robench.defenses.lrc_noise_augmentation import lrc_noise_augmentation
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


class Recorder(torch.nn.Module):
    def forward(self, images):
        self.seen = images.detach().clone()
        return torch.stack([images.flatten(1).sum(1), -images.flatten(1).sum(1)], 1)


def shown(images, **options):
    model = Recorder()
    random = RandomStream(0, torch.arange(len(images)), ("test",))
    labels = torch.zeros(len(images)).long()
    loss = lrc_noise_augmentation(model, images, labels, random=random, progress=0.0, **options)
    assert loss.total.item() == pytest.approx(F.cross_entropy(model(model.seen), labels).item())
    return model.seen


@pytest.mark.parametrize("decay_length", [1.0, 3.0])
def test_the_noise_has_the_covariance_of_the_paper(decay_length):
    images = torch.full((20_000, 2, 3, 3), 0.5, dtype=torch.float64)
    noise = shown(images, sigma=0.2, decay_length=decay_length, clip=False) - images
    found = noise.flatten(1).T @ noise.flatten(1) / len(noise)
    expected = 0.04 * torch.kron(channel_covariance(2), pixel_covariance(3, 3, decay_length))
    assert (found - expected).abs().max() < 5 * 0.04 / 20_000**0.5
    assert noise.mean().abs() < 0.005


def test_share_of_the_images_and_the_rest_as_they_are():
    images = torch.full((1000, 1, 4, 4), 0.5)
    moved = (shown(images, sigma=0.1, share=0.3) != images).flatten(1).any(1)
    assert moved.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(shown(images, sigma=0.1, share=0.0), images)


def test_clips_by_default_and_leaves_the_box_on_request():
    images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))  # noqa: TID251
    clipped, free = shown(images), shown(images, clip=False)
    assert clipped.min() == 0
    assert clipped.max() == 1
    assert free.min() < -0.1
    assert torch.equal(free.clamp(0, 1), clipped)


def test_in_units_of_each_images_own_deviation():
    flat, rough = torch.full((500, 1, 4, 4), 0.5), torch.full((500, 1, 4, 4), 0.5)
    flat[:, :, ::2] += 0.01
    rough[:, :, ::2] += 0.1
    images = torch.cat([flat, rough])
    noise = shown(images, sigma=0.5, eps_unit="image_std", clip=False) - images
    assert noise[:500].std().item() == pytest.approx(0.5 * 0.005, rel=0.1)
    assert noise[500:].std().item() == pytest.approx(0.5 * 0.05, rel=0.1)


def test_it_is_the_noise_of_the_attack():
    # The attack returns the first image that is misclassified: with labels that are never right, its first candidate.
    images = torch.full((8, 1, 4, 4), 0.5)
    random = RandomStream(0, torch.arange(8), ("test",))
    model = Recorder()
    lrc_noise_augmentation(model, images, torch.zeros(8).long(), random=random, progress=0.0, sigma=0.3)
    again = lrc_noise(
        lambda x: torch.nn.functional.one_hot(torch.zeros(len(x)).long(), 2).float(),
        images,
        torch.ones(8).long(),
        threat=ThreatModel.parse("Linf@0.3"),
        random=SameNoise(random),
        samples=1,
    )
    assert torch.equal(model.seen, again)


class SameNoise:
    """The defense's stream, wherever the attack looks for its own."""

    def __init__(self, random):
        self.random = random

    def at(self, *_):
        return self.random.at("noise")

    def __getitem__(self, rows):
        return SameNoise(self.random[rows])

"""FGSM training with a random start (Wong, Rice, Kolter, arXiv:2001.03994) is a preset of PGD training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from robench import catalog
from robench.defenses.pgd_training import pgd_training
from robench.lp_geometry import random_start
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import SmallNet, pictures

THREAT = ThreatModel.parse("Linf@8/255")


@pytest.mark.parametrize("start", ["random", "image"])
def test_one_step_of_one_and_a_quarter_radii_back_into_ball_and_box(start):
    images, labels, random = 5 * pictures(6) - 2, torch.arange(6) % 5, RandomStream(3, torch.arange(6), ("test",))
    images = images.clamp(0, 1)
    model = SmallNet().double().train()
    twin = copy.deepcopy(model)
    settings = catalog.find("defenses", "fast_training").settings({"start": start})
    loss = pgd_training(model, images, labels, random=random, progress=0.0, threat=THREAT, **settings)
    loss.total.backward()

    begin = images
    if start == "random":
        begin = random_start(images, THREAT, random.at("pgd_training").at("restart", 0))
        assert 0.9 * 8 / 255 < (begin - images).abs().max() <= 8 / 255 + 1e-15
    delta = (begin - images).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(twin(images + delta), labels), delta)
    delta = (delta.detach() + 1.25 * 8 / 255 * slope.sign()).clamp(-8 / 255, 8 / 255)
    delta = torch.maximum(torch.minimum(delta, 1 - images), 0 - images)
    expected = F.cross_entropy(twin(images + delta), labels)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)

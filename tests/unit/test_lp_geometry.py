"""Distances, projections, steps and random points by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from robench.lp_geometry import distance, project, random_start, steepest
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import numbers, pictures

NORMS = ["Linf", "L2"]


def test_distances_by_hand():
    difference = torch.tensor([[3.0, -4.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    assert distance(difference, "Linf").tolist() == [4.0, 0.0]
    assert distance(difference, "L2").tolist() == [5.0, 0.0]
    assert distance(difference[:0], "L2").shape == (0,)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point(norm):
    threat = ThreatModel(norm=norm, epsilon="0.1")
    images = pictures(20)
    candidates = images + 0.3 * numbers(20, 1, 4, 4)
    projected = project(candidates, images, threat)
    assert (distance(projected - images, norm) <= 0.1 + 1e-12).all()
    # Nothing else in the ball is nearer in L2 (the box does not bind here): tried at many points of the ball.
    for seed in range(50):
        other = random_start(images, threat, RandomStream(seed, torch.arange(20)))
        assert (distance(projected - candidates, "L2") <= distance(other - candidates, "L2") + 1e-12).all()
    assert torch.allclose(project(projected, images, threat), projected, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_step_maximises_the_linear_gain(norm):
    gradient = numbers(6, 1, 4, 4)
    step = steepest(gradient, norm)
    gain = (gradient * step).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if norm == "Linf" else gradient.flatten(1).norm(dim=1)
    assert torch.allclose(gain, dual)
    assert torch.allclose(distance(step, norm), torch.ones(6, dtype=torch.float64))


def test_tiny_and_vanishing_gradients():
    gradient = torch.zeros(2, 1, 1, 2)
    gradient[0, 0, 0] = torch.tensor([3e-30, 4e-30])  # squares underflow in float32
    assert torch.allclose(steepest(gradient, "L2")[0, 0, 0], torch.tensor([0.6, 0.8]))
    assert torch.equal(steepest(gradient, "L2")[1], torch.zeros(1, 1, 2))


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_fills_the_ball_uniformly(norm):
    count, threat = 4000, ThreatModel(norm=norm, epsilon="0.2")
    images = torch.full((count, 1, 1, 2), 0.5, dtype=torch.float64)
    offset = (random_start(images, threat, RandomStream(0, torch.arange(count))) - images).flatten(1)
    length = offset.abs().amax(1) if norm == "Linf" else offset.norm(dim=1)
    assert (length <= 0.2 + 1e-12).all()
    # In two dimensions the share of points within half of the radius is a quarter.
    share = (length < 0.1).double().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)
    assert abs(offset.mean()) < 4 * 0.2 / math.sqrt(count)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_reaches_the_radius_and_no_further_at_imagenets_size(norm):
    threat = ThreatModel(norm=norm, epsilon="3" if norm == "L2" else "4/255")
    images = torch.full((2, 3, 224, 224), 0.5)
    projected = project(images + numbers(2, 3, 224, 224).float(), images, threat)
    length = distance(projected.double() - images.double(), norm)
    assert (abs(length - threat.radius) < 1e-6 * max(1, threat.radius)).all()

"""Distances, projections, steps and random points by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from robench.lp_geometry import distance, project, project_onto_hyperplane, random_start, steepest
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


def test_projection_in_l2_keeps_to_the_sphere_where_the_box_cuts_it():
    threat = ThreatModel(norm="L2", epsilon="1.5")
    images = pictures(20)
    candidates = images + 3 * numbers(20, 1, 4, 4)
    projected = project(candidates, images, threat)
    assert ((projected >= 0) & (projected <= 1)).all()
    outside = distance(candidates.clamp(0, 1) - images, "L2") > 1.5
    assert outside.all()
    # Ball first and box second would leave these shorter than what is allowed.
    assert torch.allclose(distance(projected - images, "L2"), torch.full((20,), 1.5, dtype=torch.float64))
    ball_first = (images + 1.5 * steepest(candidates - images, "L2")).clamp(0, 1)
    assert (distance(ball_first - images, "L2") < 1.5 - 1e-2).all()


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
    projected = project(images + 0.1 * numbers(2, 3, 224, 224).float(), images, threat)
    length = distance(projected.double() - images.double(), norm)
    assert (abs(length - threat.radius) < 1e-6 * max(1, threat.radius)).all()


@pytest.mark.parametrize("epsilon", ["3", "2.9", "0.5", "0.123"])
@pytest.mark.parametrize("level", [0.1, 0.3, 0.5, 0.9])
def test_projection_stays_inside_where_all_pixels_round_alike(epsilon, level):
    threat = ThreatModel(norm="L2", epsilon=epsilon)
    images = torch.full((1, 3, 224, 224), level)
    for towards in (0.0, 1.0):
        length = distance(project(torch.full_like(images, towards), images, threat).double() - images.double(), "L2")
        # Each pixel rounds by at most 2^-25, once when it is measured and once when it is moved.
        assert threat.radius - 2.1 * math.sqrt(3 * 224 * 224) * 2**-25 < length <= threat.radius + 1e-7


def bisected(point, normal, gain, norm):
    """Return the nearest point of the box where the function has grown by `gain`, by its Lagrange multiplier."""
    towards = normal * math.copysign(1, gain)

    def moved(multiplier):
        step = towards.sign() if norm == "Linf" else towards
        return (point + multiplier * step).clamp(0, 1)

    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (towards * (moved(middle) - point)).sum() < abs(gain) else (low, middle)
    return moved(high)


def points_and_planes(count, pixels):
    """Return points with pixels on the edge of the box, and normals with large, small and vanishing entries."""
    points = (0.5 + 0.6 * numbers(count, 1, 1, pixels)).clamp(0, 1)
    normal = numbers(count, 1, 1, pixels, seed=1) ** 3
    normal[:, :, :, ::7] = 0
    return points, normal


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.999, -0.001, -0.3, -0.95])
def test_hyperplane_projection_agrees_with_bisection(norm, share):
    points, normal = points_and_planes(8, 60)
    towards = normal if share > 0 else -normal
    reach = (towards.abs() * torch.where(towards > 0, 1 - points, points)).flatten(1).sum(1)
    found = project_onto_hyperplane(points, normal, share * reach, norm)
    for row in range(8):
        expected = bisected(points[row], normal[row], share * float(reach[row]), norm)
        assert torch.allclose(found[row], expected, atol=1e-7)
    assert torch.allclose((normal * (found - points)).flatten(1).sum(1), share * reach, rtol=1e-9)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_hyperplane_projection_without_the_box_is_the_textbooks(norm):
    points, normal = pictures(10), 0.01 * numbers(10, 1, 4, 4)
    gain = torch.linspace(-1e-3, 1e-3, 10, dtype=torch.float64)
    way = project_onto_hyperplane(points, normal, gain, norm) - points
    if norm == "L2":
        expected = normal * (gain / normal.square().flatten(1).sum(1)).view(-1, 1, 1, 1)
    else:
        expected = normal.sign() * (gain / normal.abs().flatten(1).sum(1)).view(-1, 1, 1, 1)
    assert torch.allclose(way, expected, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_hyperplane_out_of_reach_gives_the_corner(norm):
    points, normal = points_and_planes(5, 30)
    corner = torch.where(normal > 0, 1.0, torch.where(normal < 0, 0.0, points))
    gain = 2 * (normal * (corner - points)).flatten(1).sum(1)
    assert torch.equal(project_onto_hyperplane(points, normal, gain, norm), corner)


@pytest.mark.parametrize("norm", NORMS)
def test_hyperplane_that_is_here_or_nowhere_leaves_the_point(norm):
    points, normal = points_and_planes(3, 30)
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(project_onto_hyperplane(points, normal, zero, norm), points)
    assert torch.equal(project_onto_hyperplane(points, 0 * normal, zero + 1, norm), points)
    assert project_onto_hyperplane(points[:0], normal[:0], zero[:0], norm).shape == (0, 1, 1, 30)


@pytest.mark.parametrize("norm", NORMS)
def test_hyperplane_projection_in_float32(norm):
    """At ImageNet's size, and with gradients whose squares underflow."""
    points = (0.5 + 0.5 * numbers(2, 3, 224, 224)).clamp(0, 1)
    unscaled = numbers(2, 3, 224, 224, seed=1)
    for scale in (1.0, 1e-25):
        normal = scale * unscaled
        gain = scale * torch.tensor([3.0, -3e3], dtype=torch.float64)
        found = project_onto_hyperplane(points.float(), normal.float(), gain.float(), norm)
        gained = (normal.float().double() * (found.double() - points.float().double())).flatten(1).sum(1)
        # A step of 2e-5 is rounded to the spacing of pixels, 6e-8.
        assert torch.allclose(gained / gain, torch.ones(2, dtype=torch.float64), atol=2e-3)
        expected = project_onto_hyperplane(points, normal, gain, norm)
        assert torch.allclose(
            distance(found - points.float(), norm), distance(expected - points, norm).float(), rtol=1e-3
        )


def test_hyperplane_projection_does_not_depend_on_the_batch():
    points, normal = points_and_planes(6, 60)
    gain = torch.tensor([1e-3, 5.0, -7.0, 1e-9, 1e6, -0.1], dtype=torch.float64)
    for norm in NORMS:
        whole = project_onto_hyperplane(points, normal, gain, norm)
        for row in range(6):
            one = project_onto_hyperplane(points[[row]], normal[[row]], gain[[row]], norm)
            assert torch.allclose(one[0], whole[row], atol=1e-12)

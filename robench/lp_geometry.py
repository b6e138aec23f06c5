"""Geometry of the L-infinity and L2 balls, per example: distances, projections, steepest steps, random points.

All functions take a batch `(N, ...)` and treat each example apart; no result depends on the rest of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


@dataclass(frozen=True)
class Balls:
    """A ball of its own size around each image, where a :class:`ThreatModel` has the same for all."""

    norm: str
    radius: Tensor
    """(N,), positive, on the [0, 1] scale of the pixels."""


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `(N,)` so that it broadcasts against `(N, ...)`."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def distance(difference: Tensor, norm: str) -> Tensor:
    """Return the norm of each example of `difference` `(N, ...)` as `(N,)`."""
    flat = difference.flatten(1)
    if flat.shape[1] == 0 or flat.shape[0] == 0:
        return flat.new_zeros(flat.shape[0])
    if norm == "Linf":
        return flat.abs().amax(1)
    # Summed in float64: in float32 the norm of an ImageNet image is off by 1e-6 of itself.
    length: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    return length.to(flat.dtype)


def _radius(threat: ThreatModel | Balls, like: Tensor) -> float | Tensor:
    """Return the radius so that it broadcasts against `(N, ...)`."""
    return per_example(threat.radius, like) if isinstance(threat, Balls) else threat.radius


def project(candidate: Tensor, images: Tensor, threat: ThreatModel | Balls) -> Tensor:
    """Return `candidate` projected onto the box [0, 1], and then onto the ball around `images`.

    The second projection stays inside the box, because `images` lie there. In L-infinity the order makes no difference.
    In L2 it does: ball first, the box takes back part of what the ball allowed, and ascents rest short of the sphere.
    """
    candidate = candidate.clamp(0.0, 1.0)
    if threat.norm == "Linf":
        radius = _radius(threat, images)
        nearest = torch.min(torch.max(candidate, images - radius), images + radius)
    else:
        nearest = _within(threat.radius, candidate, images)
        # Where many pixels move alike they round alike: the errors of an image of d pixels add up to sqrt(d) of one.
        rounding = math.sqrt(candidate[0].numel() if len(candidate) else 0) * torch.finfo(candidate.dtype).eps / 4
        beyond = distance(nearest - images, "L2") > threat.radius
        inside = _within(threat.radius - rounding, candidate, images)
        nearest = torch.where(per_example(beyond, images), inside, nearest)
    # Rounding may leave the box.
    return nearest.clamp(0.0, 1.0)


def _within(radius: float | Tensor, candidate: Tensor, images: Tensor) -> Tensor:
    offset = candidate - images
    length = distance(offset, "L2").clamp_min(torch.finfo(offset.dtype).tiny)
    return images + offset * per_example((radius / length).clamp_max(1.0), offset)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of unit norm that ascends fastest: the sign (Linf), or the gradient over its length (L2).

    A vanishing gradient gives a vanishing direction.
    """
    if norm == "Linf":
        return gradient.sign()
    # Scale by the largest entry first: squares of gradients below 1e-19 would vanish in float32.
    largest = distance(gradient, "Linf")
    scaled = gradient / per_example(torch.where(largest > 0, largest, 1.0), gradient)
    length = distance(scaled, "L2")
    return scaled / per_example(torch.where(length > 0, length, 1.0), gradient)


def project_onto_hyperplane(points: Tensor, normal: Tensor, gain: Tensor, norm: str) -> Tensor:
    """Return the point of the box nearest to each of `points` at which a linear function has grown by `gain`.

    The function's gradient is `normal`, so the answer lies on the hyperplane `<normal, answer - point> = gain`. Where
    the box does not meet it, the answer is the box's nearest corner to it: as far as the function can be made to go. A
    vanishing normal gives the point itself.

    Every pixel moves in the direction that helps until it meets the box, in L-infinity all at one speed and in L2 each
    at the speed of its weight: the optimality conditions of both problems (Croce and Hein, arXiv:1907.02044, section
    3.1). So only the time is unknown. What is gained grows with it concavely and in straight pieces, and Newton's
    method from time zero meets the exact solution in at most as many steps as there are pixels, mostly in four; a sort
    takes three times as long.

    Args:
        points: `(N, ...)` in [0, 1].
        normal: `(N, ...)` gradients; pixels below 1e-12 of an example's largest do not take part.
        gain: `(N,)`, of either sign.
        norm: `Linf` or `L2`; of several nearest points in Linf, the one at which all pixels moved as far as they could.

    Returns:
        `(N, ...)` in [0, 1].
    """
    largest = distance(normal, "Linf")
    scale = torch.where(largest > 0, largest, 1.0)
    direction = normal * per_example(gain.sign() / scale, normal)
    weight = direction.abs().flatten(1)
    weight = torch.where(weight > 1e-12, weight, 0.0)
    room = torch.where(direction > 0, 1 - points, points).clamp_min(0).flatten(1)
    room = torch.where(weight > 0, room, 0.0)
    speed = weight if norm == "L2" else (weight > 0).to(weight.dtype)
    arrival = room / torch.where(weight > 0, speed, 1.0)
    rate, worth, wanted = weight * speed, weight * room, gain.abs() / scale
    time = torch.zeros_like(wanted)
    # On an accelerator looking at whether all have arrived makes the host wait.
    interval = 1 if points.device.type == "cpu" else 8
    for step in range(weight.shape[1] + interval):
        arrived = arrival <= time[:, None]
        missing = wanted - torch.where(arrived, worth, 0.0).sum(1)
        speeding = torch.where(arrived, 0.0, rate).sum(1)
        # Nothing moves any more and something is missing: the corner is all there is (time is infinite).
        later = torch.where((missing > 0) | (speeding > 0), missing / speeding, 0.0)
        if step % interval == 0 and not bool((later > time).any()):
            break
        time = torch.maximum(time, later.nan_to_num(0.0, posinf=torch.inf))
    moved = torch.where(arrival <= time[:, None], room, time[:, None] * speed).view_as(points)
    return (points + moved * direction.sign()).clamp(0.0, 1.0)


def random_start(images: Tensor, threat: ThreatModel | Balls, random: RandomStream) -> Tensor:
    """Return a uniformly random point of the ball around each image, clamped to the box."""
    if threat.norm == "Linf":
        offset = (2 * random.uniform(images) - 1) * _radius(threat, images)
    else:
        direction = random.at("direction").normal(images)
        dimension = direction[0].numel() if len(direction) else 1
        # The radius of a uniform point of a d-dimensional ball has the distribution of U^(1/d).
        share = random.at("radius").uniform(images.new_empty(len(images))) ** (1.0 / dimension)
        offset = steepest(direction, "L2") * per_example(share * threat.radius, direction)
    return (images + offset).clamp(0.0, 1.0)

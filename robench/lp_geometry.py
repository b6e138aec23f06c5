"""Geometry of the L-infinity and L2 balls, per example: distances, projections, steepest steps, random points.

All functions take a batch `(N, ...)` and treat each example apart; no result depends on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


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


def project(candidate: Tensor, images: Tensor, threat: ThreatModel) -> Tensor:
    """Return the points nearest to `candidate` in the ball around `images`, then clamped to the box [0, 1].

    Clamping after the L2 projection stays inside the ball, because `images` lie in the box.
    """
    if threat.norm == "Linf":
        nearest = torch.min(torch.max(candidate, images - threat.radius), images + threat.radius)
    else:
        offset = candidate - images
        length = distance(offset, "L2").clamp_min(torch.finfo(offset.dtype).tiny)
        nearest = images + offset * per_example((threat.radius / length).clamp_max(1.0), offset)
    return nearest.clamp(0.0, 1.0)


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


def random_start(images: Tensor, threat: ThreatModel, random: RandomStream) -> Tensor:
    """Return a uniformly random point of the ball around each image, clamped to the box."""
    if threat.norm == "Linf":
        offset = (2 * random.uniform(images) - 1) * threat.radius
    else:
        direction = random.at("direction").normal(images)
        dimension = direction[0].numel() if len(direction) else 1
        # The radius of a uniform point of a d-dimensional ball has the distribution of U^(1/d).
        share = random.at("radius").uniform(images.new_empty(len(images))) ** (1.0 / dimension)
        offset = steepest(direction, "L2") * per_example(share * threat.radius, direction)
    return (images + offset).clamp(0.0, 1.0)

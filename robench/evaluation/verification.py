"""What an attack returned is never trusted: is it a valid answer at all?"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robench.lp_geometry import distance
from robench.threat_model import ThreatModel

#: How far outside the ball a valid answer may be, relative to max(1, epsilon): rounding of `image + offset` in float32
#: (2^-24 for pixels up to 1) and of the sum of squares in an L2 norm, with a factor of ten to spare.
BALL_TOLERANCE = 1e-6

Problem = Literal["not-a-number", "outside-box", "outside-ball", "wrong-shape"]


class Violation(NamedTuple):
    """Why an attack's answer is invalid."""

    kind: Problem
    message: str


def inside_ball(length: Tensor, threat: ThreatModel) -> Tensor:
    """Tell of each distance `(N,)`, measured in float64, whether it is within epsilon up to BALL_TOLERANCE."""
    return length <= threat.radius + BALL_TOLERANCE * max(1.0, threat.radius)


def find_violation(
    adversarial: Tensor, images: Tensor, threat: ThreatModel | None, *, box: bool = True
) -> Violation | None:
    """Return the first rule that `adversarial` breaks, with the example (its row) that breaks it worst, or None.

    Both `(N, C, H, W)`. Rules, in this order: the shape, no NaN or infinity, the box [0, 1] exactly, the ball of
    `threat` up to BALL_TOLERANCE (distances are measured in float64). Without `box` or with `threat` None that rule
    does not hold: for noise that is not clipped, and for attacks whose distance is free.
    """
    if adversarial.shape != images.shape or not adversarial.is_floating_point():
        got, want = tuple(adversarial.shape), tuple(images.shape)
        return Violation("wrong-shape", f"returned {got} {adversarial.dtype}, expected {want} floating point")
    if len(images) == 0:
        return None
    if not bool(torch.isfinite(adversarial).all()):
        row = int((~torch.isfinite(adversarial)).flatten(1).any(1).nonzero()[0])
        return Violation("not-a-number", f"returned NaN or infinity (first in row {row})")
    outside = torch.maximum(-adversarial, adversarial - 1).flatten(1).amax(1)
    if box and bool((outside > 0).any()):
        row = int(outside.argmax())
        return Violation("outside-box", f"left [0, 1] by {float(outside[row]):.3g} (row {row})")
    if threat is None:
        return None
    length = distance(adversarial.double() - images.double(), threat.norm)
    if not bool(inside_ball(length, threat).all()):
        row = int(length.argmax())
        return Violation(
            "outside-ball", f"{threat.norm} distance {float(length[row]):.6g} exceeds {threat} (row {row})"
        )
    return None

"""What an attack returned is never trusted: is it a valid answer at all?"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robench.lp_geometry import distance
from robench.planning import is_bounded, is_minimum_norm
from robench.records import EvalSpec
from robench.threat_model import ThreatModel

Problem = Literal["not-a-number", "outside-box", "outside-ball", "wrong-shape"]


class Violation(NamedTuple):
    """Why an attack's answer is invalid."""

    kind: Problem
    message: str


def inside_ball(length: Tensor, threat: ThreatModel) -> Tensor:
    """Tell of each distance `(N,)`, measured in float64, whether it is inside the ball, up to its tolerance."""
    return length <= threat.reach


def find_violation(
    adversarial: Tensor, images: Tensor, threat: ThreatModel | None, *, box: bool = True
) -> Violation | None:
    """Return the first rule that `adversarial` breaks, with the example (its row) that breaks it worst, or None.

    Both `(N, C, H, W)`. Rules, in this order: the shape, no NaN or infinity, the box [0, 1] exactly, the ball of
    `threat` up to its tolerance (distances are measured in float64). Without `box` or with `threat` None that rule
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


class Rules(NamedTuple):
    """Where the answers to a question may lie, and where they count."""

    threat: ThreatModel
    ball: bool
    """They must lie in the ball: the attack looks at no other distance."""
    box: bool
    """They must lie in [0, 1]."""
    everywhere: bool
    """What is broken counts wherever it lies: the attack has no budget in the norm of a ball."""

    def violation(self, adversarial: Tensor, images: Tensor) -> Violation | None:
        """Return the first rule that an answer breaks (:func:`find_violation`)."""
        return find_violation(adversarial, images, self.threat if self.ball else None, box=self.box)

    def counts(self, difference: Tensor) -> Tensor:
        """Tell of each difference `(N, C, H, W)` of two images, in float64, whether what is broken there counts."""
        length = distance(difference, self.threat.norm)
        return torch.ones_like(length, dtype=torch.bool) if self.everywhere else inside_ball(length, self.threat)


def rules_of(spec: EvalSpec) -> Rules:
    """Return what holds for the answers to a question, by its attack's entry."""
    bounded = is_bounded(spec)
    box = bounded or bool(spec.attack.parameters.get("clip", True))
    return Rules(spec.threat, ball=bounded and not is_minimum_norm(spec), box=box, everywhere=not bounded)

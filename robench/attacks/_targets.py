"""What targeted attacks have in common."""

from __future__ import annotations

from torch import nn

from robench.target import remark


def remark_on_fewer(model: nn.Module, *, asked: int, taken: int) -> None:
    """Say in the record where fewer classes are aimed at than the parameters say, because there are no more."""
    if taken < asked:
        remark(model, f"{taken} targets instead of {asked}: there are no more classes to aim at")

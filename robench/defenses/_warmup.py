"""The ball that grows while a training begins."""

from __future__ import annotations

from robench.threat_model import ThreatModel, exact_fraction


def grown(threat: ThreatModel, *, progress: float, warmup: float) -> tuple[ThreatModel, float]:
    """Return the ball at `progress`, and its radius as a share of the full one, which it grows to linearly.

    `progress` and `warmup` are shares of the training; 0 of `warmup` is the full ball from the start.
    """
    if progress >= warmup:
        return threat, 1.0
    share = exact_fraction(progress / warmup)
    return threat.model_copy(update={"epsilon": threat.epsilon * share}), float(share)

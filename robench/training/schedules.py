"""Learning rates: which one each step has. Pure arithmetic."""

from __future__ import annotations

import math

from robench.recipe import Constant, Cosine, OneCycle, Recipe, Step


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of step `step`, counted from 0 over all epochs of a round."""
    schedule, base = recipe.schedule, recipe.optimizer.lr
    epoch = step / steps_per_epoch
    share = step / (recipe.epochs * steps_per_epoch)
    if isinstance(schedule, OneCycle):
        # Half a step further, so that neither the first nor the last step has rate 0.
        share += 0.5 / (recipe.epochs * steps_per_epoch)
        return base * min(share / schedule.peak, (1 - share) / (1 - schedule.peak))
    return base * _warmup(schedule, epoch, steps_per_epoch) * _decay(schedule, epoch, share)


def _warmup(schedule: Constant | Step | Cosine, epoch: float, steps_per_epoch: int) -> float:
    if epoch >= schedule.warmup:
        return 1.0
    return min(1.0, (epoch + 1 / steps_per_epoch) / schedule.warmup)


def _decay(schedule: Constant | Step | Cosine, epoch: float, share: float) -> float:
    if isinstance(schedule, Step):
        return schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    if isinstance(schedule, Cosine):
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1.0

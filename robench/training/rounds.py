"""Rounds: all epochs over again, to learn from the model that came out before."""

from __future__ import annotations

import torch

from robench.checkpoints import build_classifier
from robench.classifier import Classifier
from robench.recipe import Recipe
from robench.training.optimization import averaged_copy, build_optimizer
from robench.training.seeding import seeded
from robench.training.state import TrainingState


def untrained(
    recipe: Recipe, *, num_classes: int, input_shape: tuple[int, int, int], completed_rounds: int = 0
) -> Classifier:
    """Return the recipe's network with the random weights that a round begins with, on the CPU."""
    assert recipe.architecture is not None, "it was taken from the model that start names"
    drawn_for = ("initial weights", completed_rounds) if completed_rounds else ("initial weights",)
    with seeded(torch.device("cpu"), recipe.seed, *drawn_for):
        return build_classifier(
            recipe.architecture, num_classes=num_classes, input_shape=input_shape, normalization=recipe.normalization
        )


def begin_next_round(state: TrainingState, recipe: Recipe) -> None:
    """Show the objective the weights that the round selected, and begin as the first round began.

    With `start` that is at the model to learn from, which these weights now are; without, at random weights.
    """
    assert state.best is not None, "a round's last epoch is always measured"
    model = state.model
    state.optimizer.zero_grad()
    model.load_state_dict(state.best.weights)
    state.objective.finish_round(model)
    state.round += 1
    if recipe.start is None:
        fresh = untrained(
            recipe, num_classes=model.num_classes, input_shape=model.input_shape, completed_rounds=state.round
        )
        model.load_state_dict(fresh.state_dict())
    state.average = None if recipe.averaging is None else averaged_copy(model)
    state.optimizer = build_optimizer(recipe.optimizer, model, *state.objective.companions(), seed=recipe.seed)
    state.best = None

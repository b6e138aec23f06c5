"""The toy of ATENT's figure 1 works: four trainings of a small budget, three seeds, and what they withstand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robench.checkpoints import load_card_model
from robench.datasets import open_split
from robench.recipe import apply_settings, load_recipe
from robench.registry import read_cards
from robench.testing import robustness_of
from robench.training import Run, train
from robench.workspace import Workspace
from tests.unit.training.problems import Watcher

ROBUST = ("atent-toy2d", "atent-toy2d-trades", "atent-toy2d-pgd")
SEEDS = (0, 1, 2)
#: A tenth of the epochs, a quarter of the steps; steps of 0.0125 reach the ball's edge as 40 of 0.005 do.
BUDGET = ("epochs=3", "schedule.milestones=[2.5]")
STEPS = ("defense.steps=8", "defense.step_size=0.0125")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, np.ndarray]:
    """Clean and robust accuracy `(seeds, 2)` of each recipe."""
    root = tmp_path_factory.mktemp("toy")
    place = Workspace(root=root, data_root=root, user_zoo=root / "own")
    test = open_split("mnist-5v8-tsne", "test", place)
    found = {}
    for name in (*ROBUST, "atent-toy2d-naive"):
        rows = []
        for seed in SEEDS:
            settings = (*BUDGET, *(STEPS if name in ROBUST else ()), f"seed={seed}")
            recipe, model = apply_settings(load_recipe(name), settings), f"{name}-{seed}"
            train(
                recipe, Run(name=model, device=torch.device("cpu"), command="test"), workspace=place, progress=Watcher()
            )
            stored = read_cards([place.model_zoo])[model]
            answer = robustness_of(
                load_card_model(stored.card, stored.folder),
                threat="Linf@0.05",
                attack="pgd-40:step_size=0.005,start=image",
                images=test,
                examples=None,
            )
            rows.append((answer.clean, answer.accuracy))
        found[name] = np.array(rows)
    return found


@pytest.mark.parametrize("name", [*ROBUST, "atent-toy2d-naive"])
def test_each_training_learns_the_plane(name: str, measured: dict[str, np.ndarray]) -> None:
    """296 of the 559 test points are an 8: 53 % by guessing."""
    assert measured[name][:, 0].min() > 0.85


@pytest.mark.parametrize("name", ROBUST)
def test_the_naive_classifier_is_the_least_robust(name: str, measured: dict[str, np.ndarray]) -> None:
    naive, own = measured["atent-toy2d-naive"], measured[name]
    assert own[:, 1].min() > 0.65
    assert own[:, 1].mean() - naive[:, 1].mean() > 0.1
    assert naive[:, 0].mean() > own[:, 0].mean(), "and the best where nobody attacks"

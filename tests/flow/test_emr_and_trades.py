"""TRADES and EMR do what they are for: on the digits, at Linf 0.1, each is far more robust than standard training."""

from __future__ import annotations

import pytest
import torch

from robench.recipe import apply_settings, load_recipe
from robench.training import Run, train
from robench.workspace import Workspace

#: By what they add to: a recipe, and its settings. One common radius and measure.
CONTESTANTS = {
    "standard": ("digits-standard", ["selection.threat=Linf@0.1"]),
    "trades": ("digits-trades", ["threat=Linf@0.1", "defense.steps=2"]),
    "at+emr": ("digits-pgd", ["threat=Linf@0.1", "defense.steps=2", "regularizers.emr.strength=0.03"]),
    "emr": ("digits-emr", ["selection.threat=Linf@0.1"]),
}
SCALE = ["epochs=7", "selection.metric=last", "selection.attack=pgd-20", "selection.every=7"]


class Quiet:
    def on_step(self, **_):
        """Say nothing."""

    def on_epoch(self, row):
        self.robust = row.get("validation_robust_accuracy")  # measured after the last epoch


def robust_accuracy(name, place, seed):
    recipe, settings = CONTESTANTS[name]
    (place / "model_zoo").mkdir(parents=True)
    watcher = Quiet()
    train(
        apply_settings(load_recipe(recipe), [*settings, *SCALE, f"seed={seed}"]),
        Run(name="x", device=torch.device("cpu"), command="robench train"),
        workspace=Workspace(root=place, data_root=place, user_zoo=place / "personal"),
        progress=watcher,
    )
    return watcher.robust


@pytest.mark.slow
def test_each_is_ten_points_more_robust_than_standard_training(tmp_path):
    found = {
        name: [robust_accuracy(name, tmp_path / f"{name}-{seed}", seed) for seed in range(3)] for name in CONTESTANTS
    }
    for name in ("trades", "at+emr", "emr"):
        gains = [ours - plain for ours, plain in zip(found[name], found["standard"], strict=True)]
        assert min(gains) >= 0.10, (name, found)

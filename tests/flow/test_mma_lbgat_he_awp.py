"""MMA, LBGAT, HE, AWP and L-Softmax do what they are for on the digits."""

from __future__ import annotations

import pytest
import torch

from robench.checkpoints import load_model
from robench.datasets import open_split
from robench.defenses import evaluated
from robench.recipe import apply_settings, load_recipe
from robench.training import Run, train
from robench.training.data import as_floats
from robench.workspace import Workspace

#: By method: a recipe, its settings, and its epochs. One common radius and measure.
CONTESTANTS = {
    "mma": ("digits-mma", ["defense.d_max=0.15", "defense.steps=3", "defense.bisections=5"], 7),
    "awp": ("digits-awp", ["defense.steps=2"], 7),
    "lbgat": ("digits-lbgat", ["defense.steps=2"], 16),
    "he": ("digits-he", ["defense.steps=2"], 16),
}


class Quiet:
    def on_step(self, **_):
        """Say nothing."""

    def on_epoch(self, row):
        self.row = row  # the last one stays


def trained(recipe, settings, place, seed, epochs=7):
    (place / "model_zoo").mkdir(parents=True)
    workspace, watcher = Workspace(root=place, data_root=place, user_zoo=place / "personal"), Quiet()
    common = [f"epochs={epochs}", f"selection.every={epochs}", "selection.metric=last", f"seed={seed}"]
    run = Run(name="x", device=torch.device("cpu"), command="robench train")
    train(apply_settings(load_recipe(recipe), [*settings, *common]), run, workspace=workspace, progress=watcher)
    return workspace, watcher.row


def robust_accuracy(recipe, settings, place, seed, epochs):
    _, row = trained(recipe, [*settings, "selection.attack=pgd-20"], place, seed, epochs)
    return row["validation_robust_accuracy"]


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """The robust accuracy of standard training, by epochs: three seeds each."""
    place, settings = tmp_path_factory.mktemp("standard"), ["selection.threat=Linf@0.1"]
    return {
        epochs: [robust_accuracy("digits-standard", settings, place / f"{epochs}-{s}", s, epochs) for s in range(3)]
        for epochs in (7, 16)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTESTANTS)
def test_is_ten_points_more_robust_than_standard_training(tmp_path, standard, name):
    recipe, settings, epochs = CONTESTANTS[name]
    for seed, plain in enumerate(standard[epochs]):
        ours = robust_accuracy(recipe, [*settings, "threat=Linf@0.1"], tmp_path / str(seed), seed, epochs)
        assert ours >= plain + 0.10, (name, seed, ours, plain)


def angular_margin(workspace):
    """Return the mean distance of the features' directions to the boundary of the label's class."""
    split = open_split("digits", "validation", workspace)
    images, labels = as_floats(torch.from_numpy(split.read(range(len(split))))), torch.from_numpy(split.labels)
    model = load_model("x", workspace, input_shape=(1, 8, 8), num_classes=10).model
    with torch.no_grad():
        view = evaluated(model, images, images)
        rows = list(model.modules())[-1].weight
        gaps = view.logits.gather(1, labels[:, None]) - view.logits
        distances = gaps / (rows[labels][:, None] - rows[None]).norm(dim=2) / view.features.norm(dim=1, keepdim=True)
        return distances.scatter(1, labels[:, None], torch.inf).amin(1).mean().item()


@pytest.mark.slow
def test_l_softmax_keeps_the_accuracy_and_widens_the_margin(tmp_path):
    for seed in range(3):
        results = {}
        for margin in (1, 4):
            settings = [f"regularizers.l_softmax.margin={margin}"]
            workspace, row = trained("digits-lsoftmax", settings, tmp_path / f"{margin}{seed}", seed, epochs=16)
            results[margin] = row["validation_clean_accuracy"], angular_margin(workspace)
        assert results[4][0] >= results[1][0] - 0.02, results  # of 200 images: 4
        assert results[4][1] >= 1.1 * results[1][1], results

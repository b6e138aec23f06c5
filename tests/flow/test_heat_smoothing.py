"""HeatSmoothing on digits: a student is certified further than the model that taught it, and is nearly as accurate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from robench.checkpoints import load_model
from robench.datasets import open_split
from robench.recipe import apply_settings, load_recipe
from robench.workspace import Workspace
from tests.unit.training.problems import run_training

SIGMA = 0.25


def certified_radii(model, images, labels, *, copies=1000, alpha=0.001):
    """Return Cohen's radii (arXiv:1902.02918) of every image, 0 for abstentions and wrong classes."""
    generator, radii = np.random.default_rng(0), []
    for image, label in zip(images, labels, strict=True):
        noise = generator.normal(0, SIGMA, (100 + copies, *image.shape)).astype(np.float32)
        with torch.no_grad():
            answers = model(image + torch.from_numpy(noise)).argmax(1)
        guess = answers[:100].bincount().argmax()
        hits = int((answers[100:] == guess).sum())
        low = proportion_confint(hits, copies, 2 * alpha, method="beta")[0]
        radii.append(SIGMA * norm.ppf(low) if low > 0.5 and guess == label else 0.0)
    return np.array(radii)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_student_is_certified_further_than_its_teacher(tmp_path, seed):
    (tmp_path / "model_zoo").mkdir()
    workspace = Workspace(root=tmp_path, data_root=tmp_path, user_zoo=tmp_path / "personal")
    run_training(workspace, apply_settings(load_recipe("digits-standard"), [f"seed={seed}", "epochs=12"]), "teacher")
    student = apply_settings(load_recipe("digits-heat"), [f"seed={seed}", "start=teacher"])
    run_training(workspace, student, "student")
    validation = open_split("digits", "validation", workspace)
    images = torch.from_numpy(validation.read(np.arange(len(validation)))) / 255
    labels = torch.from_numpy(np.asarray(validation.labels))
    radius, accuracy = {}, {}
    for name in ("teacher", "student"):
        model = load_model(name, workspace, input_shape=(1, 8, 8), num_classes=10).model
        accuracy[name] = (model(images).argmax(1) == labels).float().mean().item()
        radius[name] = np.median(certified_radii(model, images[:60], labels[:60]))
    assert radius["student"] > radius["teacher"] + 0.02
    assert accuracy["student"] > accuracy["teacher"] - 0.05

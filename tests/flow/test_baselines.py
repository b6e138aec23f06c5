"""The papers' baselines do what they are for, on the digits, with three seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robench.checkpoints import load_model
from robench.datasets import open_split
from robench.workspace import Workspace
from tests.flow import test_emr_and_trades as contest
from tests.flow.test_heat_smoothing import certified_radii

AGAINST = ["threat=Linf@0.1", "defense.steps=2"]
NOISY = ["threat=L2@0.25", "defense.sigma=0.25", "defense.steps=2", "optimizer.lr=0.01"]
CONTESTANTS = {
    "standard": ("digits-standard", ["selection.threat=Linf@0.1"]),
    "mail": (
        "digits-pgd",
        ["defense.name=mail", *AGAINST, "defense.burn_in=0.5", "defense.form=trades", "defense.burn_in_form=same"],
    ),
    "igr": (
        "digits-standard",
        ["selection.threat=Linf@0.1", "regularizers.igr.strength=0.3", "optimizer.lr=0.01"],
    ),
    "pgd_adv": ("digits-pgd", ["defense.name=pgd_adv", *AGAINST]),
    "fgsm_adv": ("digits-pgd", ["defense.name=fgsm_adv", "threat=Linf@0.1"]),
    "fast_training": (
        "digits-pgd",
        ["defense.name=fast_training", "threat=Linf@0.1", "defense.step_size=0.125"],
    ),
    # Under the noise that it is trained with: the worst of a hundred samples counts.
    "standard under noise": ("digits-standard", ["selection.threat=Linf@0.15"]),
    "lrc_noise": (
        "digits-standard",
        ["selection.threat=Linf@0.15", "defense.name=lrc_noise_augmentation", "defense.sigma=0.15"],
    ),
    "smooth_adv": ("digits-gaussian", ["defense.name=smooth_adv", *NOISY, "defense.copies=1"]),
    "trades_smoothing": ("digits-gaussian", ["defense.name=trades_smoothing", *NOISY]),
}
SEEDS = range(3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture
def accuracies(place, monkeypatch):
    """Return a contestant's robust accuracies after seven epochs, by seed; what is trained stays in `place`."""
    monkeypatch.setattr(contest, "CONTESTANTS", CONTESTANTS)
    scale = list(contest.SCALE)

    def of(name, *, attack="pgd-20"):
        monkeypatch.setattr(contest, "SCALE", [*scale, f"selection.attack={attack}"])
        return [contest.robust_accuracy(name, place / f"{name}-{seed}", seed) for seed in SEEDS]

    return of


@pytest.mark.slow
def test_each_is_ten_points_more_robust_than_standard_training(accuracies):
    plain = accuracies("standard")
    for name in ("mail", "igr", "pgd_adv", "fgsm_adv", "fast_training"):
        found = accuracies(name)
        assert min(np.subtract(found, plain)) >= 0.10, (name, found, plain)


@pytest.mark.slow
def test_noise_as_augmentation_is_ten_points_better_under_that_noise(accuracies):
    found = [accuracies(name, attack="lrc-noise-8") for name in ("lrc_noise", "standard under noise")]
    assert min(np.subtract(*found)) >= 0.10, found


@pytest.mark.slow
def test_smoothed_they_are_certified_further_than_standard_training(accuracies, place):
    radius = {}
    for name in ("standard", "smooth_adv", "trades_smoothing"):
        if not (place / f"{name}-0").exists():
            accuracies(name, attack="pgd-10")
        radius[name] = [mean_radius(place / f"{name}-{seed}") for seed in SEEDS]
    for name in ("smooth_adv", "trades_smoothing"):
        assert min(np.subtract(radius[name], radius["standard"])) >= 0.05, radius


def mean_radius(root):
    workspace = Workspace(root=root, data_root=root, user_zoo=root / "personal")
    model = load_model("x", workspace, input_shape=(1, 8, 8), num_classes=10).model
    validation = open_split("digits", "validation", workspace)
    images = torch.from_numpy(validation.read(np.arange(40))) / 255
    return certified_radii(model, images, torch.from_numpy(np.asarray(validation.labels[:40])), copies=200).mean()

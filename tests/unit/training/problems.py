"""A training that takes well under a second: 60 random images of three classes in an `.npz` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from robench.recipe import Recipe, parse_recipe
from robench.records import ModelCard
from robench.training import Run, train
from robench.workspace import Workspace

STEPS_PER_EPOCH = 7


class Watcher:
    """Counts what it is told; raises or calls `at` on the given step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.steps: list[int] = []
        self.rows: list[dict[str, float]] = []

    def on_step(self, *, step: int, total_steps: int, epoch: int, epochs: int) -> None:
        self.steps.append(step)
        assert epoch == (step - 1) * epochs // total_steps + 1
        if step == self.stop_after:
            raise KeyboardInterrupt

    def on_epoch(self, row: dict[str, float]) -> None:
        self.rows.append(dict(row))


def make_workspace(folder: Path) -> Workspace:
    """A workspace with a registry, and `data.npz`: each class has its own bright corner."""
    (folder / "model_zoo").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 1, 16, 16)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[0, 8 * (label // 2) :, 8 * (label % 2) :][:8, :8] += 130
        return images, labels

    x_train, y_train = part(60)
    x_test, y_test = part(6)
    np.savez(folder / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return Workspace(root=folder, data_root=folder, user_zoo=folder / "personal")


def small_recipe(workspace: Workspace, **changes: Any) -> Recipe:
    """Adversarial training with augmentation, Adam and averaging."""
    values = {
        "summary": "s",
        "source": "p",
        "dataset": f"npz:{workspace.root / 'data.npz'}",
        "threat": "Linf@0.1",
        "epochs": 3,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "pgd_training", "parameters": {"steps": 2}},
        "augmentation": {"name": "crop-flip", "pad": 1},
        "optimizer": {"name": "adam", "lr": 0.003},
        "schedule": {"name": "one-cycle"},
        "averaging": 0.9,
        "selection": {"metric": "robust_accuracy", "attack": "pgd-10"},
        **changes,
    }
    return parse_recipe(values, origin="test")


def run_training(
    workspace: Workspace, recipe: Recipe, name: str = "x", watcher: Watcher | None = None, **options: Any
) -> ModelCard:
    run = Run(name=name, device=torch.device("cpu"), command="robench train", **options)
    return train(recipe, run, workspace=workspace, progress=watcher or Watcher())


def log_without_seconds(workspace: Workspace, name: str) -> list[str]:
    lines = (workspace.model_zoo / name / "training.csv").read_text(encoding="utf-8").splitlines()
    return [line.rpartition(",")[0] for line in lines]

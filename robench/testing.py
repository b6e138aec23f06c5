"""Robustness as an assertion, for people who test their models: `assert_robust(model, threat="Linf@8/255", ...)`.

The same attacks, random numbers and judge as `robench eval` has, so the same answer at every run. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from robench import planning
from robench.checkpoints import load_model
from robench.classifier import Classifier
from robench.datasets import ArrayImages, ImageSet, open_split, scale_problem, select_examples
from robench.errors import EvaluationFailed, UserError
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.preflight import preflight
from robench.records import Configured, EvalSpec, ModelIdentity
from robench.statistics import proportion
from robench.threat_model import ThreatModel
from robench.workspace import Workspace


@dataclass(frozen=True)
class Robustness:
    """What an attack left."""

    accuracy: float
    """Share of the examples that are right after the attack."""
    interval: tuple[float, float]
    """Exact 95 % interval of the share in all images of the kind."""
    clean: float
    """Share that is right without an attack."""
    fallen: tuple[int, ...]
    """Positions, in the data set's test split or in the given images, that are right and fell."""


def assert_robust(
    model: nn.Module | str,
    *,
    threat: str,
    at_least: float,
    attack: str = "pgd-20",
    dataset: str | None = None,
    data: tuple[Any, Any] | None = None,
    examples: int | None = 200,
    seed: int = 0,
    device: str = "cpu",
    data_root: str | Path | None = None,
) -> Robustness:
    """Attack a model and return what it left; raise AssertionError where less than `at_least` of the examples stand.

    Args:
        model: a module in eval mode that maps `(N, C, H, W)` images in [0, 1] to logits, or a registered name.
        threat: `Linf@8/255`, `L2@0.5`.
        at_least: share in [0, 1].
        attack: as `robench eval --attack` takes it.
        dataset: a data set's name, `folder:PATH` or `npz:PATH`; its test split is attacked.
        data: images `(N, C, H, W)` (uint8, or floats in [0, 1], which are rounded to 8 bits) and labels `(N,)` instead.
        examples: how many, the first of a fixed shuffle; None, or more than there are: all.
        seed: of the attack's random numbers.
        device: cpu or cuda:0.
        data_root: the folder of the data sets; default ROBENCH_DATA.

    Raises UserError for wrong arguments, PreflightFailed for a model that would make the number mislead, and
    EvaluationFailed where the attack crashes.
    """
    if not 0 <= at_least <= 1:
        raise UserError(f"at_least={at_least:g} is no share; give one from 0 to 1, such as 0.45")
    found = robustness_of(
        model,
        threat=threat,
        attack=attack,
        images=_images(dataset, data, data_root),
        examples=examples,
        seed=seed,
        device=device,
    )
    if found.accuracy < at_least:
        low, high = found.interval
        first = ", ".join(map(str, found.fallen[:10])) + (", ..." if len(found.fallen) > 10 else "")
        raise AssertionError(
            f"robust accuracy {100 * found.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}] under {attack} in "
            f"{threat} is below {100 * at_least:g} % (clean {100 * found.clean:.1f} %); fallen examples: {first}"
        )
    return found


def robustness_of(
    model: nn.Module | str,
    *,
    threat: str,
    attack: str,
    images: ImageSet,
    examples: int | None,
    seed: int = 0,
    device: str = "cpu",
) -> Robustness:
    """Return what an attack leaves of a model's accuracy on some images."""
    ball = ThreatModel.parse(threat)
    identity = planning.identify_attack(attack, ball)
    count = None if examples is None else min(examples, len(images))
    chosen, ids = select_examples(images, dataset="tested", split="test", count=count)
    spec = EvalSpec(
        model=ModelIdentity(id="tested", weights_sha256="", architecture=Configured(name="tested")),
        examples=chosen,
        threat=ball,
        attack=identity,
        seed=seed,
        precision="fp32",
    )
    classifier = _classifier(model, images, torch.device(device))
    first = ids[:256]
    preflight(
        classifier,
        torch.from_numpy(images.read(first)).to(device).float() / 255,
        torch.from_numpy(images.labels[first]).to(device),
        losses={str(identity.parameters["loss"])} if "loss" in identity.parameters else (),
    )
    worker = Worker(classifier, images, device=torch.device(device), precision="fp32")
    result = worker(Shard(spec, ids))
    if result.error is not None:
        raise EvaluationFailed(f"{attack} failed: {result.error.kind}: {result.error.message}")
    robust, right = result.rows["robust"], result.rows["attacked"]
    share = proportion(int(robust.sum()), len(robust))
    fallen = np.sort(result.rows["example_id"][right & ~robust])
    return Robustness(share.value, share.clopper_pearson, float(right.mean()), tuple(fallen.tolist()))


def _classifier(model: nn.Module | str, images: ImageSet, device: torch.device) -> Classifier:
    shape = images.image_shape
    if isinstance(model, str):
        place = Workspace.locate()
        return load_model(model, place, device=device, input_shape=shape, num_classes=len(images.classes)).model
    model = model.to(device)
    with torch.no_grad():
        logits = model(torch.from_numpy(images.read(np.arange(2) % len(images))).to(device).float() / 255)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UserError("the model does not return (N, K) logits for (N, C, H, W) images; wrap it so that it does")
    return Classifier(model, input_shape=shape, num_classes=logits.shape[1])


def _images(dataset: str | None, data: tuple[Any, Any] | None, data_root: str | Path | None) -> ImageSet:
    if (dataset is None) == (data is None):
        raise UserError("say what to attack: either dataset='mnist', or data=(images, labels)")
    if dataset is not None:
        return open_split(dataset, "test", Workspace.locate(data_root=Path(data_root) if data_root else None))
    images, labels = (np.asarray(part) for part in cast("Sequence[Any]", data))
    if images.dtype != np.uint8:
        if images.size and (problem := scale_problem(float(images.min()), float(images.max()))):
            raise UserError(f"data: its images {problem}")
        images = np.rint(images.astype(np.float64) * 255).astype(np.uint8)
    classes = tuple(str(k) for k in range(int(labels.max()) + 1)) if len(labels) else ()
    return ArrayImages(images=images, labels=labels.astype(np.int64), classes=classes, origin="data")

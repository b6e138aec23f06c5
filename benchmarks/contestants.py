"""Who takes part: robench's engine, and the other libraries, each used as its documentation says.

A contestant is made once from a problem and then called again and again; a call returns adversarial images
`(N, C, H, W)` for all of the problem's images. All start at the images themselves, so that all walk the same way.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problems import Problem
from robench import planning
from robench.datasets import select_examples
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.records import Configured, ModelIdentity

Contestant = Callable[[], Tensor]


def shard_of(problem: Problem, attack: str | None = None) -> Shard:
    """Return the problem as one shard of a question, as `robench eval` would plan it."""
    text = attack or f"pgd:steps={problem.steps},step_size={problem.step_size!r},start=image"
    examples, ids = select_examples(problem.pixels, dataset="mnist", split="test", count=None)
    identity = ModelIdentity(id="benchmark", weights_sha256="0" * 64, architecture=Configured(name="benchmark"))
    (spec,) = planning.plan(planning.Request(identity, examples, [problem.threat], [text]))
    return Shard(spec, ids)


def robench(problem: Problem) -> Contestant:
    """Let the engine's worker answer the whole question: clean predictions, batch size, attack, verification."""

    def call() -> Tensor:
        worker = Worker(
            problem.model,
            problem.pixels,
            device=torch.device("cpu"),
            precision="fp32",
            keep_adversarials="left",
        )
        return _answer(worker, shard)

    shard = shard_of(problem)
    return call


def robench_again(problem: Problem) -> Contestant:
    """Let a worker answer that has answered before: what every attack but the first takes, and every later shard."""
    shard = shard_of(problem)
    worker = Worker(
        problem.model, problem.pixels, device=torch.device("cpu"), precision="fp32", keep_adversarials="left"
    )
    worker(
        Shard(
            shard.spec.model_copy(update={"attack": planning.identify_attack("fgsm", problem.threat)}),
            shard.ids,
        )
    )
    return lambda: _answer(worker, shard)


def _answer(worker: Worker, shard: Shard) -> Tensor:
    result = worker(shard)
    assert result.error is None, result.error
    assert result.adversarial_images is not None
    return torch.from_numpy(result.adversarial_images)


def torchattacks(problem: Problem) -> Contestant:
    """`torchattacks.PGD`, on the whole batch."""
    library = importlib.import_module("torchattacks")
    attack = library.PGD(
        problem.model,
        eps=problem.threat.radius,
        alpha=problem.step_size,
        steps=problem.steps,
        random_start=False,
    )
    images, labels = problem.images, problem.labels
    return lambda: attack(images, labels)


def foolbox(problem: Problem) -> Contestant:
    """`foolbox.attacks.LinfPGD`, on the whole batch; it looks itself at what it broke."""
    library = importlib.import_module("foolbox")
    model = library.PyTorchModel(problem.model, bounds=(0, 1), device="cpu")
    attack = library.attacks.LinfPGD(abs_stepsize=problem.step_size, steps=problem.steps, random_start=False)
    images, labels, epsilon = problem.images, problem.labels, problem.threat.radius
    return lambda: attack(model, images, labels, epsilons=epsilon)[1]


def art(problem: Problem) -> Contestant:
    """`art.attacks.evasion.ProjectedGradientDescentPyTorch`, in its own batches of 32; it looks itself, too."""
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")
    classifier = estimators.PyTorchClassifier(
        problem.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=problem.pixels.image_shape,
        nb_classes=len(problem.pixels.classes),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = evasion.ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=problem.threat.radius,
        eps_step=problem.step_size,
        max_iter=problem.steps,
        num_random_init=0,
        verbose=False,
    )
    images, labels = problem.images.numpy(), problem.labels.numpy()
    return lambda: torch.from_numpy(attack.generate(images, labels))


OWN: dict[str, Callable[[Problem], Contestant]] = {"robench": robench, "robench, again": robench_again}
OTHERS: dict[str, Callable[[Problem], Contestant]] = {
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "art": art,
}
_DISTRIBUTIONS = {"art": "adversarial-robustness-toolbox"}


def version(name: str) -> str | None:
    """Return a library's version; None where it, or something it imports, is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except ImportError:
        return None

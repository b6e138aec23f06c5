"""The Adversarial Robustness Toolbox (Nicolae et al., arXiv:1807.01069): its evasion attacks, on the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from robench.backends._running import Question, number_of_classes, require_classes, restarted
from robench.catalog import BackendEntry

_ORDERS = {"Linf": np.inf, "L2": 2}


def search(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    """Return ART's answer `(N, C, H, W)`; it computes in float32 numpy arrays."""
    return _SEARCHES[question.attack](model, images, labels, question)


def _fgsm(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    attack = evasion.FastGradientMethod(
        _classifier(model, images),
        norm=_ORDERS[question.threat.norm],
        eps=question.threat.radius,
        batch_size=len(images),
    )
    return _answer(attack, images, labels)


def _pgd(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    steps, step_size, radius = question.parameters["steps"], question.parameters["step_size"], question.threat.radius

    def once(model: nn.Module, images: Tensor, labels: Tensor, at_random: bool) -> Tensor:
        attack = evasion.ProjectedGradientDescentPyTorch(
            _classifier(model, images),
            norm=_ORDERS[question.threat.norm],
            eps=radius,
            eps_step=2.5 * radius / steps if step_size is None else step_size,
            max_iter=steps,
            num_random_init=int(at_random),
            batch_size=len(images),
            verbose=False,
        )
        return _answer(attack, images, labels)

    return restarted(once, model, images, labels, parameters=question.parameters)


def _apgd(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given, radius, classifier = question.parameters, question.threat.radius, _classifier(model, images)
    if given["loss"] == "dlr":
        require_classes(3, classifier.nb_classes, "art's DLR loss")
    attack = evasion.AutoProjectedGradientDescent(
        classifier,
        norm=_ORDERS[question.threat.norm],
        eps=radius,
        eps_step=2 * radius,  # the paper's first step size
        max_iter=given["steps"],
        nb_random_init=given["restarts"],
        batch_size=len(images),
        loss_type={"ce": "cross_entropy", "dlr": "difference_logits_ratio"}[given["loss"]],
        verbose=False,
    )
    return _answer(attack, images, labels)


def _square(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    attack = evasion.SquareAttack(
        _classifier(model, images),
        norm=_ORDERS[question.threat.norm],
        max_iter=given["queries"],
        eps=question.threat.radius,
        p_init=given["p_init"],
        nb_restarts=given["restarts"],
        batch_size=len(images),
        verbose=False,
    )
    return _answer(attack, images, labels)


def _deepfool(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    attack = evasion.DeepFool(
        _classifier(model, images),
        max_iter=given["steps"],
        epsilon=given["overshoot"],
        nb_grads=given["candidates"] + 1,  # the label's own class counts, too
        batch_size=len(images),
        verbose=False,
    )
    return _answer(attack, images, labels)


def _cw(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    chosen = {"learning_rate": given["step_size"], "initial_const": given["constant"]}
    attack = evasion.CarliniL2Method(
        _classifier(model, images),
        binary_search_steps=given["rounds"],
        max_iter=given["steps"],
        confidence=given["confidence"],
        batch_size=len(images),
        verbose=False,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return _answer(attack, images, labels)


def _cw_linf(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    chosen = {"learning_rate": given["step_size"], "initial_const": given["constant"]}
    if given["constant"] is not None:
        # The largest that it tries is below this one.
        chosen["largest_const"] = 1.5 * given["constant"] * 2 ** given["doublings"]
    attack = evasion.CarliniLInfMethod(
        _classifier(model, images),
        max_iter=given["solve_steps"],
        decrease_factor=given["shrink"],
        confidence=given["confidence"],
        batch_size=len(images),
        verbose=False,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return _answer(attack, images, labels)


def _classifier(model: nn.Module, images: Tensor) -> PyTorchClassifier:
    return PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=number_of_classes(model, images),
        clip_values=(0.0, 1.0),
        device_type="cpu" if images.device.type == "cpu" else "gpu",
    )


def _answer(attack: Any, images: Tensor, labels: Tensor) -> Tensor:
    # One-hot, because ART takes the labels of two classes for a single output.
    classes = np.eye(attack.estimator.nb_classes, dtype=np.float32)[labels.cpu().numpy()]
    found = attack.generate(images.float().cpu().numpy(), classes)
    return torch.from_numpy(found).to(images.device)


_SEARCHES = {
    "fgsm": _fgsm,
    "pgd": _pgd,
    "apgd": _apgd,
    "deepfool": _deepfool,
    "cw-l2": _cw,
    "cw-linf": _cw_linf,
    "square": _square,
}

ENTRY = BackendEntry(
    name="art",
    search=search,
    summary="the Adversarial Robustness Toolbox's evasion attacks",
    source="Nicolae et al., arXiv:1807.01069",
    version=1,
    distribution="adversarial-robustness-toolbox",
    precisions=("fp32", "tf32", "bf16"),
    offers={
        "fgsm": ({"norms": ("Linf", "L2"), "fixed": {"loss": ("ce",)}},),
        "pgd": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "step_size", "restarts", "start"),
                "fixed": {"loss": ("ce",)},
            },
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "step_size", "start"),
                "fixed": {"loss": ("ce",), "restarts": (1,), "stop_when_broken": (False,)},
            },
        ),
        "apgd": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "restarts"),
                "fixed": {"loss": ("ce", "dlr"), "targets": (0,)},
                "notes": ("returns the last iterate of APGD",),
            },
        ),
        "deepfool": (
            {
                "norms": ("L2",),
                "translated": ("steps", "overshoot", "candidates"),
                "lacks": {"box": "clamp", "rounds": 1, "every_candidate": True, "final_search": 0},
                "notes": ("compares the boundaries to all classes that are among any image's candidates",),
            },
        ),
        "cw-l2": (
            {
                "norms": ("L2",),
                "translated": ("rounds", "steps", "step_size", "constant", "confidence"),
                "lacks": {"variable": "tanh", "final_search": 0},
                "notes": (
                    "takes a step size and a first constant of its own where none are given",
                    "searches a line at every step instead of Adam's step",
                ),
            },
        ),
        "cw-linf": (
            {
                "norms": ("Linf",),
                "translated": ("solve_steps", "step_size", "constant", "doublings", "shrink", "confidence"),
                "lacks": {"variable": "tanh", "start": "image", "final_search": 0},
                "notes": (
                    "takes a step size and constants from 1e-5 to 20 of its own where none are given",
                    "begins every minimisation at the image, leaves c out of the loss's gradient, and ends where a tau "
                    "brings nothing nearer, after however many steps",
                ),
            },
        ),
        "square": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("queries", "p_init", "restarts"),
                "notes": ("makes the squares' sizes for the budget of queries",),
            },
        ),
    },
)

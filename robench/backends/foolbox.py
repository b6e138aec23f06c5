"""Foolbox (Rauber, Brendel, Bethge, arXiv:1707.04131): its attacks, on the whole batch."""

from __future__ import annotations

from typing import Any

import foolbox
from torch import Tensor, nn

from robench.backends._running import Question, restarted
from robench.catalog import BackendEntry


def search(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    """Return foolbox's answer `(N, C, H, W)`: clipped to the ball, or of its minimisers what they found.

    A minimiser that found nothing returns anything (CW a black image, DDN the clean one); the engine judges it.
    """
    return _SEARCHES[question.attack](model, images, labels, question)


def _fgsm(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    kinds = {"Linf": foolbox.attacks.LinfFastGradientAttack, "L2": foolbox.attacks.L2FastGradientAttack}
    return _answer(kinds[question.threat.norm](), model, images, labels, epsilon=question.threat.radius)


def _pgd(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    kinds = {
        "Linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "L2": foolbox.attacks.L2ProjectedGradientDescentAttack,
    }
    steps, step_size, radius = question.parameters["steps"], question.parameters["step_size"], question.threat.radius

    def once(model: nn.Module, images: Tensor, labels: Tensor, at_random: bool) -> Tensor:
        length = 2.5 * radius / steps if step_size is None else step_size
        attack = kinds[question.threat.norm](abs_stepsize=length, steps=steps, random_start=at_random)
        return _answer(attack, model, images, labels, epsilon=radius)

    return restarted(once, model, images, labels, parameters=question.parameters)


def _deepfool(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    kinds = {"Linf": foolbox.attacks.LinfDeepFoolAttack, "L2": foolbox.attacks.L2DeepFoolAttack}
    given = question.parameters
    attack = kinds[question.threat.norm](
        steps=given["steps"],
        candidates=given["candidates"] + 1,  # the label's own class counts, too
        overshoot=given["overshoot"],
        loss="logits",
    )
    return _answer(attack, model, images, labels, epsilon=None)


def _ddn(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    attack = foolbox.attacks.DDNAttack(init_epsilon=given["start_norm"], steps=given["steps"], gamma=given["gamma"])
    return _answer(attack, model, images, labels, epsilon=None)


def _cw(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    chosen = {"stepsize": given["step_size"], "initial_const": given["constant"]}
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=given["rounds"],
        steps=given["steps"],
        confidence=given["confidence"],
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return _answer(attack, model, images, labels, epsilon=None)


def _answer(attack: Any, model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float | None) -> Tensor:
    """Return the images clipped to `epsilon`; None: those of a minimiser, at any distance."""
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    clipped: Tensor = attack(bounded, images, labels, epsilons=epsilon)[1]
    return clipped


_SEARCHES = {"fgsm": _fgsm, "pgd": _pgd, "deepfool": _deepfool, "ddn": _ddn, "cw-l2": _cw}

ENTRY = BackendEntry(
    name="foolbox",
    search=search,
    summary="foolbox's attacks",
    source="Rauber, Brendel, Bethge, arXiv:1707.04131",
    version=1,
    distribution="foolbox",
    precisions=("fp32", "tf32", "bf16", "fp64"),
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
        "deepfool": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "overshoot", "candidates"),
                "lacks": {"box": "clamp", "rounds": 1, "every_candidate": True, "final_search": 0},
            },
        ),
        "ddn": (
            {
                "norms": ("L2",),
                "translated": ("steps", "gamma", "start_norm"),
                "fixed": {"loss": ("ce",)},
                "lacks": {"final_search": 0},
            },
        ),
        "cw-l2": (
            {
                "norms": ("L2",),
                "translated": ("rounds", "steps", "step_size", "constant", "confidence"),
                "lacks": {"variable": "tanh", "final_search": 0},
                "notes": (
                    "takes a step size and a first constant of its own where none are given",
                    "ends a round early where a tenth of its steps brought the whole batch nothing",
                ),
            },
        ),
    },
)

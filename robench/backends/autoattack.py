"""The reference implementation of AutoAttack (Croce and Hein, arXiv:2003.01690), as PyPI has it: pyautoattack."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from robench.backends._running import Question, number_of_classes, require_classes
from robench.catalog import BackendEntry
from robench.losses import TOP_1
from robench.lp_geometry import distance, per_example
from robench.target import remark

#: The library's own.
_LOGGER = logging.getLogger("auto-attack")


def search(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    """Return the reference's answer `(N, C, H, W)`; it computes in float32.

    Raises UserError where its losses have no form for the model's number of classes.
    """
    with _tracing_kept(), _warnings_noted(model):
        return _SEARCHES[question.attack](model, images.float(), labels, question)


def _autoattack(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given, classes = question.parameters, number_of_classes(model, images)
    if given["version"] == "rand":
        require_classes(3, classes, "autoattack's DLR loss")
    else:
        require_classes(4, classes, "autoattack's targeted DLR loss")
    attack = AutoAttack(model, version=given["version"], **_ball(question, images))
    attack.square.n_queries = given["queries"]
    # As many as there are, where there are fewer than the nine that it would aim at.
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    found: Tensor = attack.run_standard_evaluation(images, labels, batch_size=len(images))[0]
    return found


def _apgd(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    common = {"n_iter": given["steps"], "n_restarts": given["restarts"], "logger": _LOGGER, **_ball(question, images)}
    classes = number_of_classes(model, images)
    if given["targets"]:
        require_classes(4, classes, "autoattack's targeted DLR loss")
        targets = min(given["targets"], classes - 1)
        targeted: Tensor = APGDAttack_targeted(model, n_target_classes=targets, **common).perturb(images, labels)
        return targeted
    if given["loss"] == "dlr":
        require_classes(3, classes, "autoattack's DLR loss")
    found: Tensor = APGDAttack(model, loss=given["loss"], **common).perturb(images, labels)
    return found


def _fab(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    attack = FABAttack_PT(
        model,
        n_iter=given["steps"],
        alpha_max=given["bias"],
        eta=given["extrapolation"],
        beta=given["step_back"],
        targeted=given["targets"] > 0,
        n_target_classes=min(given["targets"], number_of_classes(model, images) - 1),
        **_ball(question, images),
    )
    if given["stop_within_epsilon"]:
        inside: Tensor = attack.perturb(images, labels)
        return inside
    best, reached = images.clone(), images.new_full((len(images),), torch.inf)
    for target in range(attack.n_target_classes) if attack.targeted else [None]:
        if target is not None:
            attack.target_class = target + 2  # counted from the end of the sorted logits, the label being the first
        found = attack.attack_single_run(images, labels, use_rand_start=False, is_targeted=attack.targeted)
        with torch.no_grad():
            broken = TOP_1.broken(model(found), labels)
        length = torch.where(broken, distance(found - images, question.threat.norm), torch.inf)
        nearer = length < reached
        best, reached = torch.where(per_example(nearer, best), found, best), torch.minimum(length, reached)
    return best


def _square(model: nn.Module, images: Tensor, labels: Tensor, question: Question) -> Tensor:
    given = question.parameters
    attack = SquareAttack(
        model,
        n_queries=given["queries"],
        p_init=given["p_init"],
        n_restarts=given["restarts"],
        loss="margin",
        resc_schedule=False,
        **_ball(question, images),
    )
    found: Tensor = attack.perturb(images, labels)
    return found


def _ball(question: Question, images: Tensor) -> dict[str, Any]:
    """Return what all of them are told."""
    threat = question.threat
    return {"norm": threat.norm, "eps": threat.radius, "seed": question.seed, "device": images.device}


@contextmanager
def _tracing_kept() -> Iterator[None]:
    """Put the trace function back: the library uses it to look into models, and then removes whatever was there."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def _warnings_noted(model: nn.Module) -> Iterator[None]:
    """Put what the library warns of into the record, without the numbers, which are of the batch."""

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            first_sentence = re.split(r"[!.] ", record.getMessage())[0]
            remark(model, f"autoattack warns: {re.sub('[0-9.]+', 'N', first_sentence)}")

    handler, before = Noting(logging.WARNING), _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.propagate = before


_SEARCHES = {"autoattack": _autoattack, "apgd": _apgd, "fab": _fab, "square": _square}

ENTRY = BackendEntry(
    name="autoattack",
    search=search,
    summary="the reference implementation of AutoAttack and its members",
    source="Croce and Hein, arXiv:2003.01690",
    version=1,
    distribution="pyautoattack",
    precisions=("fp32", "tf32", "bf16"),
    offers={
        "autoattack": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("version", "queries"),
                "fixed": {"steps": (100,)},
            },
        ),
        "apgd": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "restarts"),
                "fixed": {"loss": ("ce", "dlr"), "targets": (0,)},
            },
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "restarts", "targets"),
                "fixed": {"loss": ("dlr",)},
            },
        ),
        "fab": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("steps", "targets", "stop_within_epsilon", "bias", "extrapolation", "step_back"),
                "fixed": {"restarts": (1,)},
                "lacks": {"linearize": "departing", "every_candidate": True, "final_search": 0},
                "notes": ("steps towards all classes where it has no targets",),
            },
        ),
        "square": (
            {
                "norms": ("Linf", "L2"),
                "translated": ("queries", "p_init", "restarts"),
                "fixed": {"schedule_queries": (10_000,)},
            },
        ),
    },
)

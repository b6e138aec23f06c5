"""A table's questions made ready to be answered: the same for the run that answers them and for what it would cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from robench.cli import answering, certifying
from robench.cli.options import resolve_device
from robench.errors import UserError
from robench.papers.work import Asking, Moving
from robench.records import CertificateSpec
from robench.workspace import Workspace


def check_precision(precision: str) -> None:
    """Raise UserError for a precision that no training has."""
    if precision not in {"fp32", "tf32", "bf16"}:
        raise UserError(f"--precision {precision!r} is unknown; write fp32, tf32 or bf16")


@dataclass(frozen=True)
class Doing:
    """Where and how it is computed."""

    workspace: Workspace
    device: str
    precision: str = "fp32"
    quiet: bool = False

    def check(self) -> None:
        """Raise UserError for what nothing can be computed with; else every model would say it."""
        check_precision(self.precision)
        resolve_device(self.device)

    def say(self, line: str) -> None:
        """Print a line, unless what is printed is for a program."""
        if not self.quiet:
            print(line, flush=True)


@dataclass(frozen=True)
class Posed:
    """Questions about one model that share images and the way of deciding."""

    job: answering.Job
    certificates: list[CertificateSpec]
    options: answering.Options


@dataclass(frozen=True)
class PosedTransfers:
    """The models of a matrix of transfers, each with the one question whose images are shown to others."""

    jobs: Mapping[str, answering.Job]
    options: answering.Options


def pose(asking: Asking, count: int | None, doing: Doing) -> Posed:
    """Return what is asked of a registered model about `count` images; None: all that there are."""
    options = replace(
        _options(count, doing),
        split=cast("Any", asking.split),
        threats=[asking.threat] if asking.threat else [],
        attacks=asking.attacks,
        decision=asking.decision,
    )
    job = answering.prepare(asking.model, options)
    return Posed(job, certifying.questions(job, asking.certificates, options, sigma=0.0), options)


def pose_transfers(moving: Moving, models: Iterable[str], count: int | None, doing: Doing) -> PosedTransfers:
    """Return what is asked of registered models, of `count` images each; None: of all that there are."""
    options = replace(_options(count, doing), threats=[moving.threat], attacks=[moving.attack])
    return PosedTransfers({name: answering.prepare(name, options) for name in dict.fromkeys(models)}, options)


def _options(count: int | None, doing: Doing) -> answering.Options:
    return answering.Options(
        workspace=doing.workspace,
        dataset=None,
        examples=count,
        examples_by_default=count is not None,  # a split that has fewer gives all that it has
        threats=(),
        attacks=(),
        seed=0,
        precision="fp32",
        device=doing.device,
    )

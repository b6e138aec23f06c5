"""`robench check --measure`: the baseline's questions, asked of the models as they are now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from robench import catalog
from robench.cli import answering, certifying
from robench.errors import EvaluationFailed, RobenchError, UserError
from robench.gate.baseline import Baseline, Question, load
from robench.records import PLAIN, CertificateSpec, EvalSpec, Examples, ModelIdentity
from robench.store import Store
from robench.workspace import Workspace


class Measuring:
    """Asks questions anew where they are not answered yet."""

    def __init__(self, place: Workspace, store: Store, *, device: str) -> None:
        """Answer into `store`."""
        self.place, self.store, self.device = place, store, device

    def answer(
        self, baseline: Baseline, folder: Path, names: Mapping[str, str]
    ) -> tuple[dict[str, ModelIdentity], dict[str, str]]:
        """Return the identities of the models that were asked, and why others could not be."""
        identities: dict[str, ModelIdentity] = {}
        problems: dict[str, str] = {}
        for old, new in names.items():
            try:
                for asked in _alike(_readable(baseline, folder, old)):
                    job, options = self.job(new, asked[0])
                    identities[new] = job.identity
                    self._answer(job, options, [current(spec, job.identity) for spec in asked])
            except RobenchError as error:
                problems[new] = str(error)
        return identities, problems

    def _answer(self, job: answering.Job, options: answering.Options, specs: Sequence[Question]) -> None:
        """Ask what is not known; an attack that fails leaves a record that says so."""
        attacks = [spec for spec in specs if isinstance(spec, EvalSpec)]
        certificates = [spec for spec in specs if isinstance(spec, CertificateSpec)]
        how = answering.Manner(quiet=True)
        with suppress(EvaluationFailed):
            if attacks:
                answering.run(replace(job, specs=attacks), options, self.store, how)
            if certificates:
                certifying.run(job, certificates, options, self.store, how)

    def job(self, model: str, asked: Question) -> tuple[answering.Job, answering.Options]:
        """Return the model with the examples that a question is about; raise UserError where those are others now."""
        examples = asked.examples
        options = answering.Options(
            workspace=self.place,
            dataset=None if ":" in examples.dataset else examples.dataset,
            examples=None if examples.count == examples.split_size else examples.count,
            examples_by_default=False,
            threats=[asked.threat] if isinstance(asked, EvalSpec) else [],
            attacks=[],
            seed=asked.seed,
            precision=asked.precision,
            device=self.device,
            split=examples.split,
            decision=asked.decision if isinstance(asked, EvalSpec) else PLAIN,
        )
        job = answering.prepare(model, options)
        if job.examples != examples:
            raise UserError(
                f"{examples.dataset} has other {examples.split} images than the baseline's; {_of(job.examples)}"
            )
        return job, options


def _readable(baseline: Baseline, folder: Path, model: str) -> Iterator[Question]:
    """Yield the questions about a model whose records are as they were; of the others the check tells."""
    for entry in baseline.entries:
        if entry.model == model:
            with suppress(UserError):
                yield load(entry, folder).record.spec


def _alike(specs: Iterable[Question]) -> list[list[Question]]:
    """Return the questions in groups that one loaded model can answer: the same examples, seed, precision, decision."""
    groups: dict[tuple[Any, ...], list[Question]] = defaultdict(list)
    for spec in specs:
        groups[(type(spec), spec.examples, spec.seed, spec.precision, getattr(spec, "decision", None))].append(spec)
    return list(groups.values())


def _of(now: Examples) -> str:
    return f"the split's hash is {now.split_sha256[:8]} now: restore the data, or evaluate and run robench baseline set"


def current(asked: Question, model: ModelIdentity) -> Question:
    """Return the question as it is asked of a model today: an attack that was changed since has another version."""
    if isinstance(asked, CertificateSpec):
        version = catalog.find("certificates", asked.certificate.entry).facts["version"]
        certificate = asked.certificate.model_copy(update={"version": version})
        return asked.model_copy(update={"model": model, "certificate": certificate})
    attack = asked.attack
    if attack.backend == "native":
        attack = attack.model_copy(update={"version": catalog.find("attacks", attack.entry).facts["version"]})
    return asked.model_copy(update={"model": model, "attack": attack})

"""`robench check --measure`: the baseline's questions, asked of the models as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from robench import catalog
from robench.cli import certifying, evaluating
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
        identities, problems = {}, {}
        for old, new in names.items():
            asked = [load(entry, folder).record.spec for entry in baseline.entries if entry.model == old]
            try:
                for spec in asked:
                    identities[new] = self._answer(new, spec)
            except EvaluationFailed:
                continue  # its record says so
            except RobenchError as error:
                problems[new] = str(error)
        return identities, problems

    def _answer(self, model: str, asked: Question) -> ModelIdentity:
        job, options = self.job(model, asked)
        spec = current(asked, job.identity)
        how = evaluating.Manner(quiet=True)
        if isinstance(spec, EvalSpec):
            evaluating.run(replace(job, specs=[spec]), options, self.store, how)
        else:
            certifying.run(job, [spec], options, self.store, how)
        return job.identity

    def job(self, model: str, asked: Question) -> tuple[evaluating.Job, evaluating.Options]:
        """Return the model with the examples that a question is about; raise UserError where those are others now."""
        examples = asked.examples
        options = evaluating.Options(
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
        job = evaluating.prepare(model, options)
        if job.examples != examples:
            raise UserError(
                f"{examples.dataset} has other {examples.split} images than the baseline's; {_of(job.examples)}"
            )
        return job, options


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

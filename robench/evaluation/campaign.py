"""Answer a list of questions about one model: what is known is not computed again, what was begun goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from robench.classifier import Classifier, keep_large_buffers
from robench.datasets import ImageSet, fixed_shuffle
from robench.errors import EvaluationFailed, UserError
from robench.evaluation.adversarials import AdversarialFiles, Misclassified
from robench.evaluation.deadline import Deadline
from robench.evaluation.deriving import Occasion, derive, follows_from
from robench.evaluation.diagnostics import Attempt, diagnose
from robench.evaluation.merging import Remarks, merge, sort_rows, total_cost
from robench.evaluation.probes import probe
from robench.evaluation.sampling import Sampling, drawing_order
from robench.evaluation.shards import Rows, Shard, ShardResult, split
from robench.evaluation.worker import Worker
from robench.executors import Executor, in_this_process
from robench.findings import Findings, findings_key, sample_of
from robench.planning import code_fingerprint, is_bounded, is_minimum_norm, journal_key
from robench.records import Diagnostic, EvalRecord, EvalSpec, Provenance, ShardError
from robench.store import Store, outcome_sha256, publish

#: Finished shards are what an interruption leaves: small on a CPU, large enough on an accelerator to fill it.
_SHARD_SIZE = {"cpu": 500, "cuda": 4000}


class Progress(Protocol):
    """Who wants to know how far an evaluation is."""

    def begin(self, spec: EvalSpec, *, done: int) -> None:
        """Start a question of which `done` examples are known from an interrupted run."""

    def advance(self, spec: EvalSpec, *, examples: int, robust: int) -> None:
        """Count examples that were just answered, and how many of them stood."""

    def probe(self, spec: EvalSpec, *, examples: int) -> None:
        """Begin to look at so many examples for signs that attacks on this model cannot be believed."""

    def end(self, record: EvalRecord, path: Path, *, known: bool) -> None:
        """Finish a question; `known` if nothing had to be computed."""

    def abandon(self, spec: EvalSpec) -> None:
        """Leave a question of which nothing is known: the time was up before its first example was answered."""


@dataclass(frozen=True)
class Execution:
    """How to compute: nothing in here changes an answer by more than rounding does."""

    device: torch.device
    provenance: Callable[[], Provenance]
    """Made when a record is."""
    batch_size: int | None = None
    """None finds one by trial."""
    shard_size: int | None = None
    save_adversarials: bool = False
    attack_misclassified: bool = False
    """Save for examples that are wrong without an attack, too, what the attack makes of them."""
    training: Callable[[], ImageSet] | None = None
    """Opens the training split, for attacks that ask for its moments."""
    executor: Executor = in_this_process
    deadline: Deadline | None = None
    """When to stop, with partial records; None answers everything."""
    compile_search: bool = False
    """Search through torch.compile."""


@dataclass(frozen=True)
class _Searched:
    """A question of which everything is answered that there was time for; its record is still to be made."""

    spec: EvalSpec
    errors: Sequence[ShardError]
    known: EvalRecord | None
    """The record of which only the images were missing."""
    sampling: Sampling | None

    def rows_of(self, journal: Rows) -> Rows:
        """Return the rows that count."""
        rows = sort_rows([journal])
        if not self.sampling:
            return rows
        counts = np.isin(rows["example_id"], self.sampling.drawn)
        return {name: values[counts] for name, values in rows.items()}

    def is_whole(self, rows: Rows) -> bool:
        """Tell whether the rows answer the question."""
        if self.errors:
            return False
        if self.sampling:
            return self.sampling.enough and len(rows["example_id"]) == len(self.sampling.drawn)
        return len(rows["example_id"]) == self.spec.examples.count


class Campaign:
    """Questions about one model on one split, and where the answers go."""

    def __init__(
        self, model: Classifier, images: ImageSet, *, store: Store, execution: Execution, progress: Progress
    ) -> None:
        """Take a model that passed the preflight, and the whole split."""
        self.model, self.images, self.store = model, images, store
        self.files = AdversarialFiles(store.root)
        self.execution, self.progress = execution, progress
        self._workers: dict[str, Worker] = {}

    def answer(self, specs: Sequence[EvalSpec], ids: NDArray[np.int64]) -> list[EvalRecord]:
        """Answer all questions on these examples, in order; raise EvaluationFailed after the last if any has errors.

        Where there is a deadline the questions come first, and the probes have what they leave of the time.
        Where the deadline passes, the question that is being answered gets a partial record if any of its examples is
        answered; of those after it only the records that are complete already are returned.
        """
        self.store.check_writable()
        keep_large_buffers()
        searched = self._search_ahead(specs, ids) if self.execution.deadline else {}
        records = [record for spec in specs if (record := self._answer(spec, ids, searched))]
        failed = [record for record in records if record.status == "failed"]
        if failed:
            first = failed[0]
            causes = [f"{error.kind}: {error.message}" for error in first.errors]
            raise EvaluationFailed(
                f"{len(failed)} of {len(records)} evaluations failed and will not rank; {first.spec.attack.title} on "
                f"{first.spec.model.id}: {causes[0] if causes else 'examples are missing; run it again'}"
            )
        return records

    def _search_ahead(self, specs: Sequence[EvalSpec], ids: NDArray[np.int64]) -> dict[str, _Searched]:
        """Search for all questions that need it, by their identities, before any record is made.

        One whose answer will follow from another's waits for that record.
        """
        found = {}
        for i, spec in enumerate(specs):
            if not follows_from(spec, specs[:i]) and isinstance(answer := self._search(spec, ids), _Searched):
                found[spec.identity] = answer
        return found

    def _answer(self, spec: EvalSpec, ids: NDArray[np.int64], ahead: dict[str, _Searched]) -> EvalRecord | None:
        """Return the record of a question, of which the search may have been done `ahead`; None for lack of time."""
        answer = ahead.pop(spec.identity, None) or self._search(spec, ids)
        if not isinstance(answer, _Searched):
            return answer
        found = self._finish(answer)
        if found is None:
            self.progress.abandon(spec)
            return None
        record, path = found
        self.progress.end(record, path, known=False)
        return record

    def _search(self, spec: EvalSpec, ids: NDArray[np.int64]) -> EvalRecord | _Searched | None:
        """Answer the examples of a question that nobody has answered; return its record where all is known already.

        None: there is no time to begin.
        """
        saving = self.execution.save_adversarials
        wanted = saving and not self.files.has(spec, self._misclassified)
        known = self.store.find(spec) or (None if saving else self._derived(spec))
        if known is not None and not wanted:
            self.progress.end(known, self.store.record_path(spec), known=True)
            return known
        if self.execution.deadline and self.execution.deadline.passed:
            return known
        rows = self.store.journal_read(journal_key(spec))
        if saving:
            with_images = np.isin(rows["example_id"], self.files.kept(spec, self._misclassified))
            rows = {name: values[with_images] for name, values in rows.items()}
        sampling = Sampling(spec, ids) if spec.until is not None else None
        if sampling:
            sampling.learn(rows)
        self.progress.begin(spec, done=len(rows["example_id"]))
        errors = self._run(spec, self._shards(spec, ids, rows["example_id"], sampling), sampling)
        return _Searched(spec, errors, known, sampling)

    @property
    def _misclassified(self) -> Misclassified:
        return "attacked" if self.execution.attack_misclassified else "left"

    def _derived(self, spec: EvalSpec) -> EvalRecord | None:
        """Return the answer that a known one at another epsilon implies."""

        def occasion() -> Occasion:
            made = self.execution.provenance()
            return Occasion(command=made.command, finished=made.finished)

        return derive(spec, self.store, num_classes=len(self.images.classes), occasion=occasion)

    def _worker(self, spec: EvalSpec) -> Worker:
        if spec.precision not in self._workers:
            self._workers[spec.precision] = Worker(
                self.model,
                self.images,
                device=self.execution.device,
                precision=spec.precision,
                batch_size=self.execution.batch_size,
                keep_adversarials=self._misclassified if self.execution.save_adversarials else None,
                training=self.execution.training,
                deadline=self.execution.deadline,
            )
            if self.execution.compile_search:
                self._workers[spec.precision].compile_search()
        return self._workers[spec.precision]

    def _shards(
        self, spec: EvalSpec, ids: NDArray[np.int64], done: NDArray[np.int64], sampling: Sampling | None
    ) -> Iterator[Shard]:
        """Return what is missing; in random order where it may end early, so that what there is is a fair sample."""
        size = self.execution.shard_size or _SHARD_SIZE[self.execution.device.type]
        if sampling:
            return sampling.shards(size)
        order = drawing_order(ids, spec.seed) if self.execution.deadline else ids
        return iter(split(spec, order[~np.isin(order, done)], size))

    def _run(self, spec: EvalSpec, shards: Iterator[Shard], sampling: Sampling | None) -> list[ShardError]:
        """Answer the shards until it is enough, or the time is up; every finished one is journalled before it is
        counted.
        """
        errors = []
        for result in self.execution.executor(self._worker(spec), shards):
            if result.error is not None:
                errors.append(result.error)
                if sampling:
                    sampling.close()
            elif result.rows:
                self._keep(spec, result)
                if sampling:
                    sampling.learn(result.rows)
            if sampling and sampling.enough:
                return []  # errors beyond the stop do not count either
            if self._stopped:
                break
        return errors

    @property
    def _stopped(self) -> bool:
        return self.execution.deadline is not None and self.execution.deadline.passed

    def _keep(self, spec: EvalSpec, result: ShardResult) -> None:
        if result.adversarial_images is not None:
            self.files.keep(spec, result.rows["example_id"], result.adversarial_images, self._misclassified)
        self.store.journal_write(journal_key(spec), result.rows, cost=result.cost, notes=result.notes)
        robust = int(np.sum(result.rows["robust"]))
        self.progress.advance(spec, examples=len(result.rows["example_id"]), robust=robust)

    def _finish(self, searched: _Searched) -> tuple[EvalRecord, Path] | None:
        """Return the record and where it stands; None, and nothing written, where the time was up before any answer."""
        spec, errors, known, sampling = searched.spec, searched.errors, searched.known, searched.sampling
        rows = searched.rows_of(self.store.journal_read(journal_key(spec)))
        if self._stopped and not errors and not known and not len(rows["example_id"]):
            return None
        whole = sampling is None or len(rows["example_id"]) == len(sampling.drawn)
        record = merge(
            spec,
            rows,
            cost=total_cost([self.store.journal_cost(journal_key(spec))]),
            errors=errors,
            num_classes=len(self.images.classes),
            provenance=self.execution.provenance(),
            outcomes_sha256=outcome_sha256(rows),
            remarks=Remarks(
                minimum_norm=is_minimum_norm(spec),
                stopped=self._stopped and whole and not (sampling and sampling.enough),
                sequence=sampling.sequence if sampling and whole else None,
                notes=self.store.journal_notes(journal_key(spec)),
                diagnostics=self._diagnose(spec, rows) if known is None and searched.is_whole(rows) else (),
            ),
        )
        if known is not None and record.status == "partial":
            return known, self.store.record_path(spec)  # its images are not all made yet
        if known is not None and (differing := _differing(self.store.outcomes(known), rows)):
            raise EvaluationFailed(
                f"record {spec.identity} has other outcomes than this machine gives "
                f"({differing} of {known.robust.n} examples differ), so its adversarials cannot be saved; ask with "
                "another --seed"
            )
        if record.status != "complete" and (other := self.store.find(spec)):
            # Another process answered the same question meanwhile, and cleared the journal.
            return other, self.store.record_path(spec)
        path = self.store.write(record, rows)
        if record.status == "complete":
            if self.execution.save_adversarials:
                self.files.publish(spec, rows["example_id"], self._misclassified)
            self.store.journal_clear(journal_key(spec))
        return known or record, path

    def _diagnose(self, spec: EvalSpec, rows: Rows) -> tuple[Diagnostic, ...]:
        """Return the record's diagnostics; the probes run once for all questions that share what they depend on.

        Where they do not run to their end before the deadline, the diagnostics say that nothing was examined.
        """
        order = fixed_shuffle(len(self.images))
        ids = sample_of(order, rows["example_id"][rows["attacked"]], len(rows["example_id"]))
        path = self.store.root / ".work" / f"findings-{findings_key(spec, ids, code_fingerprint())}.json"
        findings = None
        with suppress(OSError, UserError):  # not there, or cut short by a full disk
            findings = Findings.from_json(path.read_text("utf-8"), origin=str(path))
        if findings is None:
            if not self._stopped:
                self.progress.probe(spec, examples=len(ids))
            findings = probe(self._worker(spec), spec, ids)
            if findings.problem is None:
                publish(path, findings.to_json().encode())
        return diagnose(spec, rows, findings, self._others(spec))

    def _others(self, spec: EvalSpec) -> Iterator[Attempt]:
        """Yield what the other attacks broke of which there are complete records about the same examples.

        Rows that are damaged are passed over: they are named where they count. So are models that decide at random,
        against which an attack may have had luck.
        """
        if not spec.decision.plain:
            return
        for record in self.store.complete_of(spec.model):
            if is_bounded(record.spec) and _differs_in_attack(record.spec, spec):
                with suppress(UserError):
                    rows = self.store.outcomes(record)
                    fallen = rows["example_id"][rows["attacked"] & ~rows["robust"]]
                    yield Attempt(record.spec.attack.title, frozenset(fallen.tolist()))


def _differs_in_attack(other: EvalSpec, spec: EvalSpec) -> bool:
    """Tell whether two questions are about the same examples in the same ball, whatever searches there, and how."""
    return (other.threat, other.examples, other.decision) == (spec.threat, spec.examples, spec.decision)


def _differing(before: Rows, now: Rows) -> int:
    """Return on how many examples two computations of one answer differ: in what fell, or in which examples."""
    if not np.array_equal(before["example_id"], now["example_id"]):
        return max(len(before["example_id"]), len(now["example_id"]))
    return int(((before["broken"] != now["broken"]) | (before["robust"] != now["robust"])).sum())

"""Answer a list of questions about one model: what is known is not computed again, what was begun goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from robench.classifier import Classifier, keep_large_buffers
from robench.datasets import ImageSet
from robench.errors import EvaluationFailed
from robench.evaluation.adversarials import AdversarialFiles, Misclassified
from robench.evaluation.deriving import Occasion, derive
from robench.evaluation.merging import Remarks, merge, sort_rows, total_cost
from robench.evaluation.shards import ShardResult, split
from robench.evaluation.worker import Worker
from robench.executors import Executor, in_this_process
from robench.planning import is_minimum_norm, journal_key
from robench.records import EvalRecord, EvalSpec, Provenance, ShardError
from robench.store import Rows, Store, outcome_sha256

#: Finished shards are what an interruption leaves: small on a CPU, large enough on an accelerator to fill it.
_SHARD_SIZE = {"cpu": 500, "cuda": 4000}


class Progress(Protocol):
    """Who wants to know how far an evaluation is."""

    def begin(self, spec: EvalSpec, *, done: int) -> None:
        """Start a question of which `done` examples are known from an interrupted run."""

    def advance(self, spec: EvalSpec, *, examples: int, robust: int) -> None:
        """Count examples that were just answered, and how many of them stood."""

    def end(self, record: EvalRecord, path: Path, *, known: bool) -> None:
        """Finish a question; `known` if nothing had to be computed."""


@dataclass(frozen=True)
class Execution:
    """How to compute: nothing in here changes an answer."""

    device: torch.device
    provenance: Callable[[], Provenance]
    """Made when a record is."""
    batch_size: int | None = None
    """None finds one by trial."""
    shard_size: int | None = None
    save_adversarials: bool = False
    attack_misclassified: bool = False
    """Save for examples that are wrong without an attack, too, what the attack makes of them."""
    executor: Executor = in_this_process


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
        """Answer all questions on these examples, in order; raise EvaluationFailed after the last if any has errors."""
        self.store.check_writable()
        keep_large_buffers()
        records = [self._answer(spec, ids) for spec in specs]
        failed = [record for record in records if record.status == "failed"]
        if failed:
            first = failed[0]
            causes = [f"{error.kind}: {error.message}" for error in first.errors]
            raise EvaluationFailed(
                f"{len(failed)} of {len(records)} evaluations failed and will not rank; {first.spec.attack.name} on "
                f"{first.spec.model.id}: {causes[0] if causes else 'examples are missing; run it again'}"
            )
        return records

    def _answer(self, spec: EvalSpec, ids: NDArray[np.int64]) -> EvalRecord:
        saving = self.execution.save_adversarials
        wanted = saving and not self.files.has(spec, self._misclassified)
        known = self.store.find(spec) or (None if saving else self._derived(spec))
        if known is not None and not wanted:
            self.progress.end(known, self.store.record_path(spec), known=True)
            return known
        done = set(self.store.journal_read(journal_key(spec))["example_id"].tolist())
        if saving:
            done &= set(self.files.kept(spec, self._misclassified).tolist())
        rest = np.array([i for i in ids.tolist() if i not in done], dtype=np.int64)
        self.progress.begin(spec, done=len(done))
        errors = [result.error for result in self._run(spec, rest) if result.error]
        record, path = self._finish(spec, errors, known)
        self.progress.end(record, path, known=False)
        return record

    @property
    def _misclassified(self) -> Misclassified:
        return "attacked" if self.execution.attack_misclassified else "left"

    def _derived(self, spec: EvalSpec) -> EvalRecord | None:
        """Return the answer that a known one at another epsilon implies."""

        def occasion() -> Occasion:
            made = self.execution.provenance()
            return Occasion(command=made.command, finished=made.finished)

        return derive(spec, self.store, num_classes=len(self.images.classes), occasion=occasion)

    def _run(self, spec: EvalSpec, ids: NDArray[np.int64]) -> Iterator[ShardResult]:
        """Answer what is missing; every finished shard is journalled before it is counted."""
        if spec.precision not in self._workers:
            self._workers[spec.precision] = Worker(
                self.model,
                self.images,
                device=self.execution.device,
                precision=spec.precision,
                batch_size=self.execution.batch_size,
                keep_adversarials=self.execution.save_adversarials,
                attack_misclassified=self.execution.attack_misclassified,
            )
        size = self.execution.shard_size or _SHARD_SIZE[self.execution.device.type]
        for result in self.execution.executor(self._workers[spec.precision], split(spec, ids, size)):
            if result.error is None:
                if result.adversarial_images is not None:
                    self.files.keep(spec, result.shard.ids, result.adversarial_images, self._misclassified)
                self.store.journal_write(journal_key(spec), result.rows, cost=result.cost, notes=result.notes)
                robust = int(np.sum(result.rows["robust"]))
                self.progress.advance(spec, examples=len(result.shard.ids), robust=robust)
            yield result

    def _finish(
        self, spec: EvalSpec, errors: Sequence[ShardError], known: EvalRecord | None
    ) -> tuple[EvalRecord, Path]:
        rows = sort_rows([self.store.journal_read(journal_key(spec))])
        record = merge(
            spec,
            rows,
            cost=total_cost([self.store.journal_cost(journal_key(spec))]),
            errors=errors,
            num_classes=len(self.images.classes),
            provenance=self.execution.provenance(),
            outcomes_sha256=outcome_sha256(rows),
            remarks=Remarks(minimum_norm=is_minimum_norm(spec), notes=self.store.journal_notes(journal_key(spec))),
        )
        if known is not None and (differing := _differing(self.store.outcomes(known), rows)):
            raise EvaluationFailed(
                f"record {spec.identity} has other outcomes than this machine gives "
                f"({differing} of {known.robust.n} examples differ), so its adversarials cannot be saved; ask with "
                "another --seed"
            )
        if record.status == "failed" and (other := self.store.find(spec)):
            # Another process answered the same question meanwhile, and cleared the journal.
            return other, self.store.record_path(spec)
        path = self.store.write(record, rows)
        if record.status == "complete":
            if self.execution.save_adversarials:
                self.files.publish(spec, self._misclassified)
            self.store.journal_clear(journal_key(spec))
        return known or record, path


def _differing(before: Rows, now: Rows) -> int:
    """Return on how many examples two computations of one answer differ: in what fell, or in which examples."""
    if not np.array_equal(before["example_id"], now["example_id"]):
        return max(len(before["example_id"]), len(now["example_id"]))
    return int(((before["broken"] != now["broken"]) | (before["robust"] != now["robust"])).sum())

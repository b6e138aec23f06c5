"""Answer a list of questions about one model: what is known is not computed again, what was begun goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from robench.classifier import Classifier, keep_large_buffers
from robench.datasets import ImageSet
from robench.errors import EvaluationFailed
from robench.evaluation.deadline import Deadline
from robench.evaluation.merging import Remarks, merge, sort_rows, total_cost
from robench.evaluation.sampling import Sampling, drawing_order
from robench.evaluation.shards import Shard, ShardResult, split
from robench.evaluation.worker import Worker
from robench.executors import Executor, in_this_process
from robench.planning import is_minimum_norm, journal_key
from robench.records import EvalRecord, EvalSpec, Provenance, ShardError
from robench.store import Store, outcome_sha256, publish

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
    """How to compute: nothing in here changes an answer by more than rounding does."""

    device: torch.device
    provenance: Callable[[], Provenance]
    """Made when a record is."""
    batch_size: int | None = None
    """None finds one by trial."""
    shard_size: int | None = None
    save_adversarials: bool = False
    training: Callable[[], ImageSet] | None = None
    """Opens the training split, for attacks that ask for its moments."""
    executor: Executor = in_this_process
    deadline: Deadline | None = None
    """When to stop, with partial records; None answers everything."""
    compile_search: bool = False
    """Search through torch.compile."""


class Campaign:
    """Questions about one model on one split, and where the answers go."""

    def __init__(
        self, model: Classifier, images: ImageSet, *, store: Store, execution: Execution, progress: Progress
    ) -> None:
        """Take a model that passed the preflight, and the whole split."""
        self.model, self.images, self.store = model, images, store
        self.execution, self.progress = execution, progress
        self._workers: dict[str, Worker] = {}

    def answer(self, specs: Sequence[EvalSpec], ids: NDArray[np.int64]) -> list[EvalRecord]:
        """Answer all questions on these examples, in order; raise EvaluationFailed after the last if any has errors.

        Where the deadline passes, the question that is being answered gets a partial record; of those after it only
        the records that are complete already are returned.
        """
        self.store.check_writable()
        keep_large_buffers()
        records = [record for spec in specs if (record := self._answer(spec, ids))]
        failed = [record for record in records if record.status == "failed"]
        if failed:
            first = failed[0]
            causes = [f"{error.kind}: {error.message}" for error in first.errors]
            raise EvaluationFailed(
                f"{len(failed)} of {len(records)} evaluations failed and will not rank; {first.spec.attack.name} on "
                f"{first.spec.model.id}: {causes[0] if causes else 'examples are missing; run it again'}"
            )
        return records

    def _answer(self, spec: EvalSpec, ids: NDArray[np.int64]) -> EvalRecord | None:
        known = self.store.find(spec)
        wanted = self.execution.save_adversarials and not self._adversarials_path(spec).exists()
        if known is not None and not wanted:
            self.progress.end(known, self.store.record_path(spec), known=True)
            return known
        if self.execution.deadline and self.execution.deadline.passed:
            return known
        rows = self.store.journal_read(journal_key(spec))
        if self.execution.save_adversarials:
            with_images = np.isin(rows["example_id"], self._kept_adversarials(spec)["example_ids"])
            rows = {name: values[with_images] for name, values in rows.items()}
        sampling = Sampling(spec, ids) if spec.until is not None else None
        if sampling:
            sampling.learn(rows)
        self.progress.begin(spec, done=len(rows["example_id"]))
        errors = self._run(spec, self._shards(spec, ids, rows["example_id"], sampling), sampling)
        record, path = self._finish(spec, errors, known, sampling)
        self.progress.end(record, path, known=False)
        return record

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

    def _worker(self, spec: EvalSpec) -> Worker:
        if spec.precision not in self._workers:
            self._workers[spec.precision] = Worker(
                self.model,
                self.images,
                device=self.execution.device,
                precision=spec.precision,
                batch_size=self.execution.batch_size,
                keep_adversarials=self.execution.save_adversarials,
                training=self.execution.training,
                deadline=self.execution.deadline,
            )
            if self.execution.compile_search:
                self._workers[spec.precision].compile_search()
        return self._workers[spec.precision]

    @property
    def _stopped(self) -> bool:
        return self.execution.deadline is not None and self.execution.deadline.passed

    def _keep(self, spec: EvalSpec, result: ShardResult) -> None:
        if result.adversarial_images is not None:
            self._keep_adversarials(spec, result)
        self.store.journal_write(journal_key(spec), result.rows, cost=result.cost, notes=result.notes)
        robust = int(np.sum(result.rows["robust"]))
        self.progress.advance(spec, examples=len(result.rows["example_id"]), robust=robust)

    def _finish(
        self, spec: EvalSpec, errors: Sequence[ShardError], known: EvalRecord | None, sampling: Sampling | None
    ) -> tuple[EvalRecord, Path]:
        rows = sort_rows([self.store.journal_read(journal_key(spec))])
        if sampling:
            counts = np.isin(rows["example_id"], sampling.drawn)
            rows = {name: values[counts] for name, values in rows.items()}
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
            ),
        )
        if known is not None and record.status == "partial":
            return known, self.store.record_path(spec)  # its images are not all made yet
        if known is not None and record.outcomes_sha256 != known.outcomes_sha256:
            before, now = self.store.outcomes(known)["robust"], rows["robust"]
            raise EvaluationFailed(
                f"record {spec.identity} has other outcomes than this machine gives "
                f"({int((before != now).sum())} of {len(now)} examples differ), so its adversarials cannot be saved"
            )
        if record.status != "complete" and (other := self.store.find(spec)):
            # Another process answered the same question meanwhile, and cleared the journal.
            return other, self.store.record_path(spec)
        path = self.store.write(record, rows)
        if record.status == "complete":
            if self.execution.save_adversarials:
                self._publish_adversarials(spec, rows["example_id"])
            self.store.journal_clear(journal_key(spec))
        return known or record, path

    def _adversarials_path(self, spec: EvalSpec) -> Path:
        return self.store.root / "adversarials" / f"{spec.identity}.safetensors"

    def _kept_adversarials(self, spec: EvalSpec) -> dict[str, NDArray[Any]]:
        """Return the adversarial images of the finished shards of an unfinished evaluation."""
        parts: list[dict[str, NDArray[Any]]] = []
        for path in self._unfinished_adversarials(spec):
            with suppress(SafetensorError):  # cut short by a full disk: computed again
                parts.append(load_file(path))
        empty: dict[str, NDArray[Any]] = {
            "example_ids": np.empty(0, np.int64),
            "adversarial_images": np.empty(0, np.float32),
        }
        if not parts:
            return empty
        joined = {name: np.concatenate([part[name] for part in parts]) for name in empty}
        _, first = np.unique(joined["example_ids"], return_index=True)
        return {name: values[first] for name, values in joined.items()}

    def _keep_adversarials(self, spec: EvalSpec, result: ShardResult) -> None:
        assert result.adversarial_images is not None
        ids = result.rows["example_id"]
        path = self.store.root / ".work" / f"{journal_key(spec)}-{ids[0]}-{len(ids)}.safetensors"
        publish(path, save({"example_ids": ids, "adversarial_images": result.adversarial_images}))

    def _publish_adversarials(self, spec: EvalSpec, ids: NDArray[np.int64]) -> None:
        kept = self._kept_adversarials(spec)
        rows = np.isin(kept["example_ids"], ids)
        publish(self._adversarials_path(spec), save({name: values[rows] for name, values in kept.items()}))
        for path in self._unfinished_adversarials(spec):
            path.unlink(missing_ok=True)

    def _unfinished_adversarials(self, spec: EvalSpec) -> list[Path]:
        return sorted((self.store.root / ".work").glob(f"{journal_key(spec)}-*.safetensors"))

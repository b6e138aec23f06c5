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
from robench.datasets import ImageSet, fixed_shuffle
from robench.errors import EvaluationFailed, UserError
from robench.evaluation.diagnostics import diagnose
from robench.evaluation.merging import Remarks, merge, sort_rows, total_cost
from robench.evaluation.probes import Findings, findings_key, probe, sample_of
from robench.evaluation.shards import Rows, ShardResult, split
from robench.evaluation.worker import Worker
from robench.executors import Executor, in_this_process
from robench.planning import code_fingerprint, is_minimum_norm, journal_key
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
    training: Callable[[], ImageSet] | None = None
    """Opens the training split, for attacks that ask for its moments."""
    executor: Executor = in_this_process


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
        known = self.store.find(spec)
        wanted = self.execution.save_adversarials and not self._adversarials_path(spec).exists()
        if known is not None and not wanted:
            self.progress.end(known, self.store.record_path(spec), known=True)
            return known
        done = set(self.store.journal_read(journal_key(spec))["example_id"].tolist())
        if self.execution.save_adversarials:
            done &= set(self._kept_adversarials(spec)["example_ids"].tolist())
        rest = np.array([i for i in ids.tolist() if i not in done], dtype=np.int64)
        self.progress.begin(spec, done=len(done))
        errors = [result.error for result in self._run(spec, rest) if result.error]
        record, path = self._finish(spec, errors, known)
        self.progress.end(record, path, known=False)
        return record

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
            )
        return self._workers[spec.precision]

    def _run(self, spec: EvalSpec, ids: NDArray[np.int64]) -> Iterator[ShardResult]:
        """Answer what is missing; every finished shard is journalled before it is counted."""
        size = self.execution.shard_size or _SHARD_SIZE[self.execution.device.type]
        for result in self.execution.executor(self._worker(spec), split(spec, ids, size)):
            if result.error is None:
                if result.adversarial_images is not None:
                    self._keep_adversarials(spec, result)
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
            remarks=Remarks(
                minimum_norm=is_minimum_norm(spec),
                notes=self.store.journal_notes(journal_key(spec)),
                diagnostics=self._diagnose(spec, rows) if known is None and not errors else (),
            ),
        )
        if known is not None and record.outcomes_sha256 != known.outcomes_sha256:
            before, now = self.store.outcomes(known)["robust"], rows["robust"]
            raise EvaluationFailed(
                f"record {spec.identity} has other outcomes than this machine gives "
                f"({int((before != now).sum())} of {len(now)} examples differ), so its adversarials cannot be saved"
            )
        if record.status == "failed" and (other := self.store.find(spec)):
            # Another process answered the same question meanwhile, and cleared the journal.
            return other, self.store.record_path(spec)
        path = self.store.write(record, rows)
        if record.status == "complete":
            if self.execution.save_adversarials:
                self._publish_adversarials(spec)
            self.store.journal_clear(journal_key(spec))
        return known or record, path

    def _diagnose(self, spec: EvalSpec, rows: Rows) -> tuple[Diagnostic, ...]:
        """Return the record's diagnostics; the probes run once for all questions that share what they depend on."""
        order = fixed_shuffle(len(self.images))
        ids = sample_of(order, rows["example_id"][rows["attacked"]], len(rows["example_id"]))
        path = self.store.root / ".work" / f"findings-{findings_key(spec, ids, code_fingerprint())}.json"
        findings = None
        with suppress(OSError, UserError):  # not there, or cut short by a full disk
            findings = Findings.from_json(path.read_text("utf-8"), origin=str(path))
        if findings is None:
            self.progress.probe(spec, examples=len(ids))
            findings = probe(self._worker(spec), spec, ids)
            if findings.problem is None:
                publish(path, findings.to_json().encode())
        return diagnose(spec, rows, findings)

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
        part = f"{journal_key(spec)}-{result.shard.ids[0]}-{len(result.shard.ids)}.safetensors"
        path = self.store.root / ".work" / part
        publish(path, save({"example_ids": result.shard.ids, "adversarial_images": result.adversarial_images}))

    def _publish_adversarials(self, spec: EvalSpec) -> None:
        publish(self._adversarials_path(spec), save(self._kept_adversarials(spec)))
        for path in self._unfinished_adversarials(spec):
            path.unlink(missing_ok=True)

    def _unfinished_adversarials(self, spec: EvalSpec) -> list[Path]:
        return sorted((self.store.root / ".work").glob(f"{journal_key(spec)}-*.safetensors"))

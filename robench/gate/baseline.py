"""The baseline: a TOML file that says which answers new ones are held against.

It stands in the reports folder that has the answers, or anywhere else, and names every record by its path from there
and by the hashes of its file and of its rows. It repeats the numbers, so that a pull request that moves the baseline
shows by how much. What it says is checked against the records whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robench.errors import UnsafeFile, UserError
from robench.gate.metrics import Metric, metrics_of
from robench.records import PLAIN, CertificateRecord, CertificateSpec, EvalRecord, EvalSpec, Examples, Value
from robench.store import Store

DEFAULT = Path("reports") / "baseline.toml"

Answer = EvalRecord | CertificateRecord
Question = EvalSpec | CertificateSpec

_HEADER = """\
# What `robench check` holds new results against. Written by `robench baseline set`; reviewed like code.
# Shares are of all examples; distances and radii are in their norm's unit.
"""


class Entry(Value):
    """One answer of the baseline."""

    model: str
    question: str
    """For people; the record has it in full."""
    record: str
    """The record's file, from the baseline's folder."""
    record_sha256: str
    """Of the record's file."""
    outcomes_sha256: str
    """Of the rows' file."""
    weights_sha256: str
    examples: int
    values: dict[str, float]
    """The metrics by name."""


class Baseline(Value):
    """All answers of a baseline."""

    schema_version: Literal[1] = 1
    entries: tuple[Entry, ...]

    def to_toml(self) -> str:
        """Return the file's text: one block for each answer, in a stable order."""
        lines = [_HEADER, f"schema_version = {self.schema_version}"]
        for entry in self.entries:
            lines += ["", "[[entries]]"]
            lines += [f"{k} = {_toml(v)}" for k, v in entry.model_dump(mode="python").items() if k != "values"]
            lines += ["[entries.values]", *(f"{_toml(k)} = {_toml(v)}" for k, v in entry.values.items())]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


@dataclass(frozen=True)
class Answered:
    """An answer with its metrics."""

    record: Answer
    metrics: tuple[Metric, ...]


def read(path: Path) -> Baseline:
    """Return the baseline in a file; raise UserError, one line that says what is wrong with it."""
    remedy = "restore it, or run robench baseline set again"
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no baseline {path}; make one: robench baseline set --baseline {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}; {remedy}") from None
    if not isinstance(version := content.get("schema_version", 1), int):
        raise UserError(f"{path}: schema_version = {version} is no whole number; {remedy}")
    # JSON has no dates; as texts they are refused where they stand.
    baseline = Baseline.from_json(json.dumps(content, default=str), origin=str(path), remedy=remedy)
    if not baseline.entries:
        raise UserError(f"{path} names no answers, so nothing would be checked; run robench baseline set")
    return baseline


def load(entry: Entry, folder: Path) -> Answered:
    """Return an answer of the baseline, whose file is in `folder`; raise UserError where it is not what it was."""
    path = folder / entry.record
    remedy = "restore it from version control, or run robench baseline set"
    try:
        text = path.read_bytes()
    except OSError:
        raise UnsafeFile(f"the baseline's record {path} is missing; {remedy}") from None
    if hashlib.sha256(text).hexdigest() != entry.record_sha256:
        raise UnsafeFile(f"the baseline's record {path} was changed since the baseline was set; {remedy}")
    kind_folder = path.parent.parent  # reports/records/MODEL/IDENTITY.json
    of = CertificateRecord if kind_folder.name == "certificates" else EvalRecord
    record = of.from_json(text.decode("utf-8", "replace"), origin=str(path))
    answered = answered_by(record, Store(kind_folder.parent))
    if problem := _contradiction(entry, answered):
        raise UnsafeFile(f"the baseline says of {entry.model}, {entry.question}: {problem}; {remedy}")
    return answered


def _contradiction(entry: Entry, answered: Answered) -> str | None:
    """Return what the baseline says otherwise than the record that it names."""
    now, spec = _values(answered.metrics), answered.record.spec
    for name in {**entry.values, **now}:
        if entry.values.get(name) != now.get(name):
            return f"{name} = {entry.values.get(name, 'nothing')}, but its rows give {now.get(name, 'nothing')}"
    facts = {
        "model": spec.model.id,
        "weights_sha256": spec.model.weights_sha256,
        "outcomes_sha256": answered.record.outcomes_sha256,
        "examples": spec.examples.count,
        "question": question_text(spec),
    }
    for name, value in facts.items():
        if getattr(entry, name) != value:
            return f"{name} = {getattr(entry, name)}, but the record says {value}"
    return None


def _values(metrics: Iterable[Metric]) -> dict[str, float]:
    """Return the numbers of metrics that say anything: certified accuracy ends where no example reaches."""
    return {m.name: round(m.value, 6) for m in metrics if m.subject != "certificate" or m.values.any()}


def answered_by(record: Answer, store: Store) -> Answered:
    """Return a record with its metrics; raise UnsafeFile where its rows are gone, changed, or not what it says."""
    rows = store.outcomes(record)
    hits, said = (
        (rows["robust"], record.robust) if isinstance(record, EvalRecord) else (rows["correct"], record.correct)
    )
    if (len(hits), int(hits.sum())) != (said.n, said.successes):
        path = path_of(record, store)
        raise UnsafeFile(
            f"{path} was changed: it says {said.successes} of {said.n}, its rows say {int(hits.sum())} of {len(hits)}; "
            "restore it, or delete it and evaluate again"
        )
    return Answered(record, tuple(metrics_of(record, rows)))


def path_of(record: Answer, store: Store) -> Path:
    """Return the file of a record."""
    return store.record_path(record.spec) if isinstance(record, EvalRecord) else store.certificate_path(record.spec)


def entry_of(answered: Answered, store: Store, folder: Path) -> Entry:
    """Return how a baseline in `folder` names an answer that is in the store."""
    record, path = answered.record, path_of(answered.record, store)
    reports = Path(os.path.relpath(store.root.resolve(), folder.resolve()))
    return Entry(
        model=record.spec.model.id,
        question=question_text(record.spec),
        record=(reports / path.relative_to(store.root)).as_posix(),
        record_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        outcomes_sha256=record.outcomes_sha256,
        weights_sha256=record.spec.model.weights_sha256,
        examples=record.spec.examples.count,
        values=_values(answered.metrics),
    )


def made_of(records: Sequence[Answer], store: Store, folder: Path) -> Baseline:
    """Return the baseline of complete answers that stands in `folder`, in the order of model and question."""
    entries = [entry_of(answered_by(record, store), store, folder) for record in records]
    return Baseline(entries=tuple(sorted(entries, key=lambda e: (e.model, e.question, e.record))))


def question_text(spec: Question) -> str:
    """Return what was asked, short enough for a line: what is usual is left out."""
    asked = f"{spec.attack.title} under {spec.threat}" if isinstance(spec, EvalSpec) else spec.certificate.name
    return ", ".join(
        [asked, examples_text(spec.examples), *([f"seed {spec.seed}"] if spec.seed else []), *_manner(spec)]
    )


def conditions_text(spec: Question) -> str:
    """Return what clean accuracy, and the worst case of several attacks, are of: a question without its attack."""
    return ", ".join([examples_text(spec.examples), *_manner(spec)])


def _manner(spec: Question) -> list[str]:
    """Return what is unusual about how predictions are made."""
    parts = [spec.precision] if spec.precision != "fp32" else []
    if isinstance(spec, EvalSpec):
        return parts + [f"{k} {v:g}" for k, v in spec.decision.model_dump().items() if v != getattr(PLAIN, k)]
    sigma = spec.certificate.parameters.get("sigma")
    return parts + ([f"sigma {sigma:g}"] if sigma else [])


def examples_text(examples: Examples) -> str:
    """Return "1,000 of 10,000 test images of mnist"."""
    of = (
        f"{examples.count:,} of {examples.split_size:,}"
        if examples.count < examples.split_size
        else f"{examples.count:,}"
    )
    return f"{of} {examples.split} images of {examples.dataset}"

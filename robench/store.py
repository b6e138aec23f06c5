"""Where results live: JSON records and Parquet outcomes, plain files that merge with git, each written once.

::

    reports/records/<model>/<identity>.json           an answer; the identity is the hash of its question
    reports/records/<model>/<identity>.failed.json    its attack failed; replaced when it is asked again
    reports/certificates/<model>/<identity>.json      how far predictions are guaranteed, or their margins
    reports/transfers/<target>/<identity>.json        how a model does on images that were made on another
    reports/timings/<subject>/<identity>.json         how long an image takes; a later measurement replaces it
    reports/records/<model>/<identity>.partial.json   it was stopped on purpose; replaced when it is asked again
    reports/outcomes/<identity>-<sha256[:8]>.parquet  its rows, one per example
    reports/.work/<identity>-<first id>-<rows>-<random>.parquet    a finished shard of unfinished work
    reports/.work/findings-<hash>.json                what the diagnostics' probes saw of a model; may be deleted

A record names its outcomes by their hash. So two runs that answer one question at once cannot mix: each
writes outcomes of its own, one of them links its record into place first, and the other withdraws. No lock is
needed, and a process that is killed anywhere leaves at most a file that nothing refers to.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from robench.auditing import columns_of, contradiction
from robench.errors import StorageError, UnsafeFile, UserError
from robench.records import (
    CERTIFICATE_COLUMNS,
    OUTCOME_COLUMNS,
    CertificateRecord,
    CertificateSpec,
    Cost,
    EvalRecord,
    EvalSpec,
    ModelCard,
    ModelIdentity,
    TimingRecord,
    TransferRecord,
    TransferSpec,
    canonical_hash,
)

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Mapping[str, NDArray[Any]]
"""One array per column of OUTCOME_COLUMNS, all of one length: one entry per example."""

_Answer = TypeVar("_Answer", EvalRecord, TransferRecord, CertificateRecord, TimingRecord)

RowKind = Literal["outcomes", "certificates"]
"""What the rows are of: attacks, or certificates."""

_COLUMNS: Mapping[RowKind, Mapping[str, str]] = {"outcomes": OUTCOME_COLUMNS, "certificates": CERTIFICATE_COLUMNS}

_AGAIN = "restore it, or delete it and evaluate again"

#: How the names of records end that are not complete.
_UNFINISHED = (".failed.json", ".partial.json")

_COST = b"robench.cost"
_NOTES = b"robench.notes"


@dataclass(frozen=True)
class StoredRecord:
    """A record and the file it stands in."""

    path: Path
    record: EvalRecord


@dataclass(frozen=True)
class StoredTransfer:
    """A transfer's record and the file it stands in."""

    path: Path
    record: TransferRecord


@dataclass(frozen=True)
class StoredCertificate:
    """A certificate's record and the file it stands in."""

    path: Path
    record: CertificateRecord


@dataclass(frozen=True)
class StoredTiming:
    """A timing's record and the file it stands in."""

    path: Path
    record: TimingRecord


class StoredCard(NamedTuple):
    """A model card and the folder it stands in, together with its weights and its training log."""

    folder: Path
    card: ModelCard


@dataclass(frozen=True)
class Results:
    """What a leaderboard is built from."""

    records: tuple[StoredRecord, ...]
    cards: Mapping[str, StoredCard]
    """By model id; models that are in no registry have none."""
    outcomes: Callable[[EvalRecord | TransferRecord | CertificateRecord], Rows]
    """Returns a record's rows, sorted by example_id."""
    transfers: tuple[StoredTransfer, ...] = ()
    certificates: tuple[StoredCertificate, ...] = ()
    timings: tuple[StoredTiming, ...] = ()

    def check(self) -> None:
        """Look at the rows of every answer that may count; raise UnsafeFile for one that its rows do not bear out."""
        answers: tuple[StoredRecord | StoredTransfer | StoredCertificate, ...]
        answers = (*self.records, *self.transfers, *self.certificates)
        for stored in answers:
            if isinstance(stored.record, TransferRecord) or stored.record.status == "complete":
                len(self.outcomes(stored.record)["example_id"])


class Store:
    """The results in one reports folder."""

    def __init__(self, root: Path) -> None:
        """Look at `root` (a workspace's `reports/`), which need not exist yet."""
        self.root = root

    def record_path(self, spec: EvalSpec) -> Path:
        """Return where the complete record of a question stands, or would stand."""
        return self.root / "records" / file_name(spec.model.id) / f"{spec.identity}.json"

    def transfer_path(self, spec: TransferSpec) -> Path:
        """Return where the record of a transfer stands, or would stand."""
        return self.root / "transfers" / file_name(spec.target.id) / f"{spec.identity}.json"

    def certificate_path(self, spec: CertificateSpec) -> Path:
        """Return where the record of a certificate stands, or would stand."""
        return self.root / "certificates" / file_name(spec.model.id) / f"{spec.identity}.json"

    def outcomes_path(self, record: EvalRecord | TransferRecord | CertificateRecord) -> Path:
        """Return where a record's rows stand."""
        return self.root / "outcomes" / f"{record.spec.identity}-{record.outcomes_sha256[:8]}.parquet"

    def check_writable(self) -> None:
        """Raise StorageError where results could not be written; call it before anything expensive starts."""
        for folder in ("records", "outcomes", ".work"):
            probe = self.root / folder / f".{secrets.token_hex(4)}.tmp"
            with storage_errors(self.root / folder):
                probe.parent.mkdir(parents=True, exist_ok=True)
                probe.write_bytes(b"")
                probe.unlink()

    def find(self, spec: EvalSpec) -> EvalRecord | None:
        """Return the complete record of a question, or None; raise UserError for a damaged one."""
        return _read_record(self.record_path(spec))

    def find_transfer(self, spec: TransferSpec) -> TransferRecord | None:
        """Return the record of a transfer, or None; raise UserError for a damaged one."""
        return _read(self.transfer_path(spec), TransferRecord)

    def write(self, record: EvalRecord, outcomes: Rows | pa.Table) -> Path:
        """Write a record and its rows; return the file the answer stands in.

        A complete record is written once: where there is one already, also one that another process writes
        at this moment, that one is kept and its path returned. A failed or partial record replaces an earlier one of
        either kind, and goes when a complete one comes. Raises ValueError for rows that do not fit the record,
        StorageError if writing fails; then nothing refers to what was written.
        """
        data = outcome_bytes(outcomes)
        _check_fit(record, data)
        complete = self.record_path(record.spec)
        if complete.exists():
            return complete
        publish(self.outcomes_path(record), data)
        text = record.to_json().encode()
        own = complete if record.status == "complete" else complete.with_suffix(f".{record.status}.json")
        former = {path: _read_record(path) for path in _unfinished(complete)}
        if not publish(own, text, replace=record.status != "complete"):
            self._withdraw(record, kept=_read_record(complete))
        for path, superseded in former.items():
            if path != own:
                path.unlink(missing_ok=True)
            self._withdraw(superseded, kept=_read_record(own))
        return own

    def write_transfer(self, record: TransferRecord, outcomes: Rows) -> Path:
        """Write a transfer's record and its rows, once: where there is one already, that one is kept.

        Raises ValueError for rows that do not fit the record, StorageError if writing fails.
        """
        data = outcome_bytes(outcomes)
        _check_fit(record, data)
        path = self.transfer_path(record.spec)
        if path.exists():
            return path
        publish(self.outcomes_path(record), data)
        if not publish(path, record.to_json().encode(), replace=False):
            kept = self.find_transfer(record.spec)
            if kept and self.outcomes_path(record) != self.outcomes_path(kept):
                self.outcomes_path(record).unlink(missing_ok=True)
        return path

    def find_certificate(self, spec: CertificateSpec) -> CertificateRecord | None:
        """Return the record of a certificate, or None; raise UserError for a damaged one."""
        return _read(self.certificate_path(spec), CertificateRecord)

    def write_certificate(self, record: CertificateRecord, rows: Rows) -> Path:
        """Write a complete certificate and its rows, once: where there is one already, that one is kept.

        Raises ValueError for rows that do not fit the record, StorageError if writing fails.
        """
        data = outcome_bytes(rows, "certificates")
        counted = len(rows["correct"]), int(np.sum(rows["correct"]))
        if hashlib.sha256(data).hexdigest() != record.outcomes_sha256 or record.status != "complete":
            raise ValueError("the rows do not match the record's outcomes_sha256, or it is not complete")
        if counted != (record.correct.n, record.correct.successes):
            raise ValueError(f"{counted[1]} of {counted[0]} rows are correct, the record says {record.correct}")
        path = self.certificate_path(record.spec)
        if path.exists():
            return path
        publish(self.outcomes_path(record), data)
        if not publish(path, record.to_json().encode(), replace=False):
            kept = self.find_certificate(record.spec)
            if kept and self.outcomes_path(record) != self.outcomes_path(kept):
                self.outcomes_path(record).unlink(missing_ok=True)
        return path

    def certificates(self) -> Iterator[StoredCertificate]:
        """Yield all certificates in the order of their paths; raise UserError that names a damaged file."""
        for path in sorted((self.root / "certificates").glob("*/*.json")):
            if record := _read(path, CertificateRecord):
                yield StoredCertificate(path, record)

    def write_timing(self, record: TimingRecord) -> Path:
        """Write a timing, in the place of an earlier one of the same question; raise StorageError if that fails."""
        path = self.root / "timings" / file_name(record.spec.subject) / f"{record.spec.identity}.json"
        publish(path, record.to_json().encode())
        return path

    def timings(self) -> Iterator[StoredTiming]:
        """Yield all timings in the order of their paths; raise UserError that names a damaged file."""
        for path in sorted((self.root / "timings").glob("*/*.json")):
            if record := _read(path, TimingRecord):
                yield StoredTiming(path, record)

    def _withdraw(self, record: EvalRecord | None, *, kept: EvalRecord | None) -> None:
        """Remove the rows of a record that `kept` supersedes."""
        if record and kept and self.outcomes_path(record) != self.outcomes_path(kept):
            self.outcomes_path(record).unlink(missing_ok=True)

    def records(self) -> Iterator[StoredRecord]:
        """Yield all records in the order of their paths; raise UserError that names a damaged file.

        A failed or partial record beside a complete one (left by a race) is passed over.
        """
        for path in sorted((self.root / "records").glob("*/*.json")):
            complete = path.with_name(f"{path.name.partition('.')[0]}.json")
            record = _read_record(path)
            if record and (path == complete or not complete.exists()):
                yield StoredRecord(path, record)

    def transfers(self) -> Iterator[StoredTransfer]:
        """Yield all transfers in the order of their paths; raise UserError that names a damaged file."""
        for path in sorted((self.root / "transfers").glob("*/*.json")):
            if record := _read(path, TransferRecord):
                yield StoredTransfer(path, record)

    def complete_of(self, model: ModelIdentity) -> Iterator[EvalRecord]:
        """Yield the complete records of a model, in the order of their paths.

        Damaged files are passed over: a question that their content would answer is then asked anew.
        """
        for path in sorted((self.root / "records" / file_name(model.id)).glob("*.json")):
            with contextlib.suppress(UserError):
                record = _read_record(path)
                if record and record.status == "complete" and record.spec.model == model:
                    yield record

    def outcomes(self, record: EvalRecord | TransferRecord | CertificateRecord) -> dict[str, NDArray[Any]]:
        """Return a record's rows, sorted by example_id; raise UnsafeFile if they are gone or changed."""
        kind = _kind_of(record)
        return _columns(_read_parquet(self.outcome_data(record), kind), kind)

    def check(self, record: EvalRecord | TransferRecord | CertificateRecord) -> None:
        """Raise UnsafeFile if a record's rows are gone or changed, or do not bear it out."""
        len(_LazyRows(self, record, _Shared({}, {}))["example_id"])

    def outcome_data(self, record: EvalRecord | TransferRecord | CertificateRecord) -> bytes:
        """Return the file of a record's rows; raise UnsafeFile if it is gone or changed."""
        path = self.outcomes_path(record)
        own = self.path_of(record)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UnsafeFile(f"{path} is missing; restore it, or delete {own} and evaluate again") from None
        if hashlib.sha256(data).hexdigest() != record.outcomes_sha256:
            raise UnsafeFile(
                f"{path} does not match its record's outcomes_sha256; restore it, "
                f"or delete it and {own} and evaluate again"
            )
        return data

    def path_of(self, record: EvalRecord | TransferRecord | CertificateRecord) -> Path:
        """Return where a complete record stands."""
        match record:
            case EvalRecord():
                return self.record_path(record.spec)
            case TransferRecord():
                return self.transfer_path(record.spec)
            case CertificateRecord():
                return self.certificate_path(record.spec)

    def results(self, cards: Mapping[str, StoredCard]) -> Results:
        """Return everything that leaderboards are built from; columns of rows are read when asked for, and once.

        Rows raise UnsafeFile when they are first looked at, if their record says anything else than they do, or if they
        have other labels than those of another record about the same images.
        """
        cache: dict[str, Rows] = {}
        shared = _Shared({}, {})

        def outcomes(record: EvalRecord | TransferRecord | CertificateRecord) -> Rows:
            key = canonical_hash([record.spec.identity, record.outcomes_sha256])
            if key not in cache:
                cache[key] = _LazyRows(self, record, shared)
            return cache[key]

        return Results(
            tuple(self.records()),
            cards,
            outcomes,
            tuple(self.transfers()),
            tuple(self.certificates()),
            tuple(self.timings()),
        )

    def journal_write(
        self, identity: str, rows: Rows, *, cost: Cost, notes: Collection[str] = (), kind: RowKind = "outcomes"
    ) -> None:
        """Keep a finished shard's rows, what they took and what is to be said, until the evaluation is complete."""
        facts = {_COST: cost.model_dump_json().encode(), _NOTES: json.dumps(sorted(notes)).encode()}
        table = _table(rows, kind).replace_schema_metadata(facts)
        first = table["example_id"][0].as_py() if len(table) else 0
        name = f"{identity}-{first}-{len(table)}-{secrets.token_hex(4)}.parquet"
        publish(self.root / ".work" / name, _parquet(table))

    def journal_read(self, identity: str, kind: RowKind = "outcomes") -> dict[str, NDArray[Any]]:
        """Return the rows of all finished shards, sorted, each example once; none without a journal.

        A damaged file (a disk that was full) is left out: its examples are computed again.
        """
        import pyarrow as pa

        tables = [table.replace_schema_metadata(None) for table in self._journal_tables(identity, kind)]
        rows = _columns(pa.concat_tables([_table({}, kind), *tables]), kind)
        _, first = np.unique(rows["example_id"], return_index=True)
        return {name: values[first] for name, values in rows.items()}

    def journal_size(self, identity: str) -> int:
        """Return how many examples are in the journal, by its files' names: a plan needs no more."""
        return sum(int(path.stem.split("-")[-2]) for path in self._journal(identity))

    def journal_cost(self, identity: str, kind: RowKind = "outcomes") -> Cost:
        """Return what the finished shards took, all runs together."""
        costs = [
            Cost.model_validate_json(table.schema.metadata[_COST]) for table in self._journal_tables(identity, kind)
        ]
        return Cost(
            forward_passes=sum(c.forward_passes for c in costs),
            backward_passes=sum(c.backward_passes for c in costs),
            seconds=sum(c.seconds for c in costs),
        )

    def journal_notes(self, identity: str) -> set[str]:
        """Return what is to be said of the finished shards."""
        return {
            note
            for table in self._journal_tables(identity, "outcomes")
            for note in json.loads(table.schema.metadata[_NOTES])
        }

    def journal_clear(self, identity: str) -> None:
        """Forget the finished shards."""
        for path in self._journal(identity):
            path.unlink(missing_ok=True)

    def _journal(self, identity: str) -> list[Path]:
        return sorted((self.root / ".work").glob(f"{identity}-*.parquet"))

    def _journal_tables(self, identity: str, kind: RowKind) -> Iterator[Any]:
        for path in self._journal(identity):
            with contextlib.suppress(UnsafeFile, FileNotFoundError):
                table = _read_parquet(path.read_bytes(), kind)
                if _COST in (table.schema.metadata or {}):
                    yield table


#: What every table needs of a record's rows, read at once; the other columns wait until somebody asks.
_USUAL: Mapping[RowKind, tuple[str, ...]] = {
    "outcomes": ("example_id", "label", "attacked", "robust"),
    "certificates": ("example_id", "correct", "radius"),
}


@dataclass(frozen=True)
class _Shared:
    """What the rows of many records have in common."""

    arrays: dict[bytes, NDArray[Any]]
    """Ids and labels, which many records have alike, by their hash."""
    labels: dict[str, tuple[NDArray[np.int32], Path]]
    """What is known of each split's labels, -1 being nothing, and the first record that knew any."""


class _LazyRows(Mapping[str, NDArray[Any]]):
    """The rows of one record, column by column: a thousand records of 10,000 rows would not fit whole into memory."""

    def __init__(self, store: Store, record: EvalRecord | TransferRecord | CertificateRecord, shared: _Shared) -> None:
        """Read nothing yet."""
        self._store, self._record, self._shared = store, record, shared
        self._kind = _kind_of(record)
        self._read: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._read:
            if name not in _COLUMNS[self._kind]:
                raise KeyError(name)
            first = not self._read
            kept = [c for c in dict.fromkeys((*_USUAL[self._kind], name)) if c not in self._read]
            wanted = dict.fromkeys((*kept, *(columns_of(self._record) if first else ())))
            table = _read_parquet(self._store.outcome_data(self._record), self._kind, wanted)
            found = {c: _array(table[c].combine_chunks(), _COLUMNS[self._kind][c]) for c in wanted}
            if first:
                self._audit(found)
            for column in kept:
                array = found[column]
                if column in {"example_id", "label"}:
                    key = hashlib.sha256(array.tobytes()).digest() + column.encode()
                    array = self._shared.arrays.setdefault(key, array)
                self._read[column] = array
        return self._read[name]

    def _audit(self, rows: Rows) -> None:
        """Raise UnsafeFile if the record says anything else than its rows, or they contradict another's labels."""
        own, path = self._store.path_of(self._record), self._store.outcomes_path(self._record)
        if problem := contradiction(self._record, rows):
            raise UnsafeFile(f"{own}: {problem}; restore it and {path}, or delete both and evaluate again")
        if self._kind == "certificates":
            return
        spec = self._record.spec.source if isinstance(self._record, TransferRecord) else self._record.spec
        assert isinstance(spec, EvalSpec)
        examples, ids = spec.examples, rows["example_id"]
        if len(ids) and not 0 <= ids.min() <= ids.max() < examples.split_size:
            raise UnsafeFile(f"{own}: its rows are of images that a split of {examples.split_size:,} has not; {_AGAIN}")
        nothing = np.full(examples.split_size, -1, np.int32)
        known, teller = self._shared.labels.setdefault(examples.split_sha256, (nothing, own))
        other = (known[ids] >= 0) & (known[ids] != rows["label"])
        if other.any():
            example, label = int(ids[other][0]), int(rows["label"][other][0])
            raise UnsafeFile(
                f"{own}: image {example} has the label {label}, and {known[example]} in {teller}; {_AGAIN}, "
                "whichever is wrong"
            )
        known[ids] = rows["label"]

    def __iter__(self) -> Iterator[str]:
        return iter(_COLUMNS[self._kind])

    def __len__(self) -> int:
        return len(_COLUMNS[self._kind])


def _kind_of(record: EvalRecord | TransferRecord | CertificateRecord) -> RowKind:
    return "certificates" if isinstance(record, CertificateRecord) else "outcomes"


def file_name(name: str) -> str:
    """Return a name that is safe as a file's: itself if it is, else its safe part and a hash of it.

    Names that differ give file names that differ, and none of them is hidden or leaves its folder.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    return safe if name and safe == name else f"{safe or 'model'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def outcome_bytes(outcomes: Rows | pa.Table, kind: RowKind = "outcomes") -> bytes:
    """Return rows as a Parquet file, sorted by example_id.

    The same rows give the same bytes with the same release of pyarrow, whatever order they come in. Raises
    ValueError for missing, unknown or unequally long columns, and for an example that comes twice.
    """
    table = _table(outcomes, kind).sort_by("example_id")
    ids = _array(table["example_id"].combine_chunks(), "int64")
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"outcomes hold example {ids[1:][ids[1:] == ids[:-1]][0]} twice")
    return _parquet(table)


def outcome_sha256(outcomes: Rows | pa.Table, kind: RowKind = "outcomes") -> str:
    """Return the SHA-256 of the Parquet file that the rows make: a record's `outcomes_sha256`."""
    return hashlib.sha256(outcome_bytes(outcomes, kind)).hexdigest()


@functools.cache
def _schema(kind: RowKind) -> Any:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.type_for_alias(type_)) for name, type_ in _COLUMNS[kind].items()])


def _table(rows: Rows | pa.Table, kind: RowKind) -> Any:
    """Return a pyarrow Table of the columns of that kind; `{}` is the empty one."""
    import pyarrow as pa

    columns = rows if isinstance(rows, Mapping) else dict(zip(rows.column_names, rows.columns, strict=True))
    if not columns:
        return _schema(kind).empty_table()
    if set(columns) != set(_COLUMNS[kind]):
        wrong = sorted(set(columns) ^ set(_COLUMNS[kind]))
        raise ValueError(f"outcomes have missing or unknown columns: {', '.join(wrong)}")
    try:
        return pa.table({name: columns[name] for name in _COLUMNS[kind]}, schema=_schema(kind))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"outcomes do not fit their columns: {error}") from None


def _parquet(table: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=65536)
    return bytes(sink.getvalue())


def _read_parquet(data: bytes, kind: RowKind, columns: Collection[str] | None = None) -> Any:
    """Return the rows of a file with these columns (None: all), whose schema is that of the kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(columns if columns is None else list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UnsafeFile(f"these are no outcomes: {error}") from None
    if not file.schema_arrow.equals(_schema(kind)) or any(column.null_count for column in table.columns):
        raise UnsafeFile(f"these are no outcomes: the columns are {', '.join(file.schema_arrow.names)}")
    return table


def _columns(table: Any, kind: RowKind) -> dict[str, NDArray[Any]]:
    return {name: _array(table[name].combine_chunks(), type_) for name, type_ in _COLUMNS[kind].items()}


def _array(column: Any, kind: str) -> NDArray[Any]:
    """Return a pyarrow array as numpy's; pyarrow's own way imports pandas, which takes half a second."""
    if kind == "string":
        return np.array(column.to_pylist(), dtype=np.str_)
    if not len(column):
        return np.empty(0, dtype=kind)
    if kind != "bool":
        return np.from_dlpack(column).copy()
    bits = np.unpackbits(np.frombuffer(column.buffers()[1], dtype=np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(np.bool_)


def _check_fit(record: EvalRecord | TransferRecord, data: bytes) -> None:
    """Raise ValueError unless the rows are those that the record was made from."""
    if hashlib.sha256(data).hexdigest() != record.outcomes_sha256:
        raise ValueError("the rows do not match the record's outcomes_sha256; which is outcome_sha256(rows)")
    rows = _columns(_read_parquet(data, "outcomes"), "outcomes")
    counted = len(rows["robust"]), int(rows["robust"].sum())
    unfinished = isinstance(record, EvalRecord) and record.status == "failed"
    if not unfinished and counted != (record.robust.n, record.robust.successes):
        raise ValueError(f"{counted[1]} of {counted[0]} rows are robust, the record says {record.robust}")


def _unfinished(complete: Path) -> list[Path]:
    """Return where the failed and the partial record of a question would stand, by where the complete one would."""
    return [complete.with_suffix(end) for end in _UNFINISHED]


def _read_record(path: Path) -> EvalRecord | None:
    """Return the record in a file, None where there is no file; raise UserError for a damaged one."""
    return _read(path, EvalRecord)


def _read(path: Path, kind: type[_Answer]) -> _Answer | None:
    try:
        text = path.read_text("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    command = {EvalRecord: "eval", TransferRecord: "transfer", CertificateRecord: "eval", TimingRecord: "time"}[kind]
    remedy = f"restore it from version control, or delete it and run robench {command} again"
    record = kind.from_json(text, origin=str(path), remedy=remedy)
    if path.name not in {f"{record.spec.identity}{end}" for end in (".json", *_UNFINISHED)}:
        raise UnsafeFile(
            f"{path} was changed: its question has the identity {record.spec.identity}; restore or delete it"
        )
    return record


def publish(path: Path, data: bytes, *, replace: bool = True, durable: bool = True) -> bool:
    """Put `data` at `path`, whole or not at all; without `replace`, return False if a file is there.

    What is not `durable` may be lost if the machine stops in the next seconds: for what is made again in seconds.

    Raises StorageError, one line that names the folder and the remedy.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)  # its FileExistsError means that a file is in the way
        try:
            with temporary.open("xb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)
        except FileExistsError:
            # Only of the link: the temporary file's name is new.
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "your quota is used up; free some space",
            errno.EEXIST: "a file is in the way; choose another folder with --workspace",
            errno.ENOTDIR: "a file is in the way; choose another folder with --workspace",
            errno.EROFS: "it is read-only; choose another folder with --workspace",
            errno.EACCES: "you may not write there; choose another folder with --workspace",
        }.get(error.errno or 0, f"{error.strerror}; choose another folder with --workspace")
        raise StorageError(f"cannot write to {folder}: {remedy}") from error

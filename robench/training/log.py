"""The training's log: a CSV row per epoch, and a JSON line every few steps."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from robench.store import storage_errors
from robench.training.snapshot import write_atomically


def write_log(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write all rows as CSV, atomically; a column that a row lacks stays empty there, `seconds` comes last."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c != "seconds"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "seconds"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue().encode())


class ScalarsFile:
    """JSON lines of single steps; what was written after the snapshot that is resumed from is cut off."""

    def __init__(self, path: Path, length: int) -> None:
        """Open the file for appending after its first `length` bytes; raise StorageError if it cannot be written."""
        self.path = path
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(min(length, path.stat().st_size))

    def __enter__(self) -> ScalarsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors(self.path.parent):
            self._file.close()

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step, counted from 1 over the whole training; raise StorageError on a full disk."""
        with storage_errors(self.path.parent):
            self._file.write((json.dumps({"step": step, **values}) + "\n").encode())

    def flushed(self) -> int:
        """Hand everything to the system and return the file's length in bytes; raise StorageError on a full disk."""
        with storage_errors(self.path.parent):
            self._file.flush()
        return self._file.tell()

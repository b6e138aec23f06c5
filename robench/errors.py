"""Every error that robench raises on purpose, one line of text each: what was given, and what to do instead.

::

    RobenchError                    the base; the command line prints its text and exits with `exit_code`
    ├── UserError           (2)     a wrong name, value, file or option
    │   ├── UnknownName     (2)     no such model, attack, recipe, ...; the nearest names are suggested
    │   ├── MissingData     (2)     a data set is not on this machine; says how to get it
    │   ├── UnsafeFile      (2)     a file that would run code, is damaged, or does not match its hash
    │   └── PreflightFailed (2)     the model breaks the classifier contract; an evaluation would mislead
    ├── StorageError        (2)     a folder cannot be written, or a disk is full
    ├── Unfinished          (4)     --max-seconds are over; what was answered is kept in partial records
    └── EvaluationFailed    (3)     an attack crashed or returned something invalid; the record says so, never ranks
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobenchError(Exception):
    """Base of all errors that robench raises on purpose."""

    exit_code = 2


class UserError(RobenchError):
    """Something that was asked for is wrong; the text names the value and the remedy."""


class UnknownName(UserError):
    """A name that no plugin, model or option has."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Suggest the names in `known` that are nearest to `name`."""
        known = sorted(known)
        self.kind, self.name, self.known = kind, name, known
        super().__init__(f"unknown {kind} {name!r}; {suggestion(name, known)}")


class MissingData(UserError):
    """A data set whose files are not there."""


class UnsafeFile(UserError):
    """A file that is damaged, changed, or would run code when loaded."""


class PreflightFailed(UserError):
    """A model that breaks the classifier contract."""


class StorageError(RobenchError):
    """Results or weights could not be written."""


class Unfinished(RobenchError):
    """The time that was allowed is up, and not every question has its answer."""

    exit_code = 4


class EvaluationFailed(RobenchError):
    """An attack crashed, or returned something that is no valid answer."""

    exit_code = 3


def bad_byte(error: UnicodeDecodeError) -> str:
    """Return what is wrong with a file that is not UTF-8, and the remedy."""
    line = error.object.count(b"\n", 0, error.start) + 1
    return f"is no UTF-8 text (line {line} has the byte 0x{error.object[error.start]:02x}); save it as UTF-8"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with up to three near names, whatever their case, nothing where none is near."""
    folded = {n.casefold(): n for n in sorted(known)}
    near = [folded[n] for n in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with up to three near names, else all of the known ones."""
    known = sorted(known)
    if guess := nearest(name, known):
        return guess
    if not known:
        return "there is none"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {shown}"

"""Robust accuracy at any epsilon from one run: what an attack that looks for the minimum norm found, measured anew.

Such an attack never reads epsilon (:class:`robench.catalog.AttackEntry`). So two questions that differ in epsilon alone
have the same images, and the second answer follows from the rows of the first: an example is robust unless it was
broken inside the new ball. Without torch, because nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from robench.evaluation.diagnostics import diagnose
from robench.evaluation.merging import Remarks, merge
from robench.findings import NOT_EXAMINED, Findings
from robench.planning import is_minimum_norm
from robench.records import EvalRecord, EvalSpec
from robench.store import Rows, Store, outcome_sha256
from robench.threat_model import ThreatModel

_NOTE = "follows from the rows of record"


@dataclass(frozen=True)
class Occasion:
    """What a derived record says of its own making; all else is the search's."""

    command: str
    finished: str
    """UTC, ISO 8601."""


def origin_of(spec: EvalSpec, store: Store) -> EvalRecord | None:
    """Return a complete record that differs from the question in epsilon alone and answers it, None without any.

    Evaluations that stopped by what they saw inside the ball, and models that decide at random, have none.
    """
    if not _can_follow(spec):
        return None
    found = [record for record in store.complete_of(spec.model) if _differs_in_epsilon(record.spec, spec)]
    return min(found, key=lambda record: record.spec.identity, default=None)


def derive(spec: EvalSpec, store: Store, *, num_classes: int, occasion: Callable[[], Occasion]) -> EvalRecord | None:
    """Answer a question from the rows of its :func:`origin_of` and store the answer; None where there is no origin.

    The record has the origin's rows, except `robust`, and its cost: one search serves every epsilon. A note names it.
    Of its diagnostics those of its rows are made; the others need attacks in its own ball, and say that nobody looked.
    """
    origin = origin_of(spec, store)
    if origin is None:
        return None
    rows = at_epsilon(store.outcomes(origin), spec.threat)
    made = occasion()
    unseen = (
        f"{NOT_EXAMINED}: the rows are those of record {origin.spec.identity}, and no attack was run at this epsilon"
    )
    record = merge(
        spec,
        rows,
        cost=origin.cost,
        errors=(),
        num_classes=num_classes,
        provenance=origin.provenance.model_copy(update={"command": made.command, "finished": made.finished}),
        outcomes_sha256=outcome_sha256(rows),
        remarks=Remarks(
            minimum_norm=True,
            notes={*_own_notes(origin), *_lineage(origin)},
            diagnostics=diagnose(spec, rows, Findings(ids=(), problem=unseen)),
        ),
    )
    store.write(record, rows)
    return store.find(spec)


def follows_from(spec: EvalSpec, others: Iterable[EvalSpec]) -> bool:
    """Tell whether an answer to one of the other questions would answer this one."""
    return _can_follow(spec) and any(_differs_in_epsilon(other, spec) for other in others)


def _can_follow(spec: EvalSpec) -> bool:
    return is_minimum_norm(spec) and spec.until is None and spec.decision.plain


def at_epsilon(rows: Rows, threat: ThreatModel) -> Mapping[str, NDArray[Any]]:
    """Return the rows with `robust` as it is under `threat`, a ball in the norm that they were searched in."""
    inside = rows[threat.norm.lower()] <= threat.reach
    return {**rows, "robust": rows["attacked"] & ~(rows["broken"] & inside)}


def _differs_in_epsilon(other: EvalSpec, spec: EvalSpec) -> bool:
    return other.threat.norm == spec.threat.norm and other.model_copy(update={"threat": spec.threat}) == spec


def _own_notes(record: EvalRecord) -> Iterator[str]:
    return (note for note in record.notes if not note.startswith(_NOTE))


def _lineage(record: EvalRecord) -> list[str]:
    """Return the note that names the search: where the origin was derived itself, the one that it names."""
    former = [note for note in record.notes if note.startswith(_NOTE)]
    return former or [f"{_NOTE} {record.spec.identity} ({record.spec.threat}): the search does not depend on epsilon"]

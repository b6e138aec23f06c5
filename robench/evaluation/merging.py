"""From the rows of all shards to one record. Pure: the same rows give the same record in any order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robench.evaluation.shards import Rows
from robench.records import (
    OUTCOME_TYPES,
    ConfidenceSequence,
    Cost,
    Diagnostic,
    Distances,
    EvalRecord,
    EvalSpec,
    Proportion,
    Provenance,
    Randomness,
    ShardError,
)
from robench.statistics import proportion

_MANY_CLASSES = 10


def sort_rows(parts: Sequence[Rows]) -> dict[str, NDArray[Any]]:
    """Return all rows in the order of their example ids, typed; raise ValueError for one that came twice."""
    if not parts:
        return {name: np.empty(0, kind) for name, kind in OUTCOME_TYPES.items()}
    ids = np.concatenate([part["example_id"] for part in parts])
    if len(np.unique(ids)) != len(ids):
        raise ValueError("an example was answered twice")
    order = np.argsort(ids, kind="stable")
    return {
        name: np.concatenate([part[name] for part in parts])[order].astype(kind) for name, kind in OUTCOME_TYPES.items()
    }


def total_cost(costs: Sequence[Cost]) -> Cost:
    """Return the sum of what several shards took."""
    return Cost(
        forward_passes=sum(c.forward_passes for c in costs),
        backward_passes=sum(c.backward_passes for c in costs),
        seconds=round(sum(c.seconds for c in costs), 3),
    )


def merge(
    spec: EvalSpec,
    rows: Rows,
    *,
    cost: Cost,
    errors: Sequence[ShardError],
    num_classes: int,
    provenance: Provenance,
    outcomes_sha256: str,
    remarks: Remarks | None = None,
) -> EvalRecord:
    """Return the record of `rows` (all shards, sorted).

    It is complete only if every example was answered, or as many as the question's own stopping rule asked for.
    """
    remarks = remarks or Remarks()
    answered = len(rows["example_id"])
    clean_correct, robust = rows["clean_rank"] < spec.decision.top_k, rows["robust"]
    fallen = rows["attacked"] & ~robust
    distances = rows[spec.threat.norm.lower()][fallen]
    enough = answered == spec.examples.count or (remarks.sequence is not None and not remarks.stopped)
    status: Literal["complete", "partial", "failed"] = "complete" if enough and not errors else "failed"
    if remarks.stopped and not errors and not enough:
        status = "partial"
    return EvalRecord(
        spec=spec,
        status=status,
        clean=share(clean_correct),
        robust=share(robust),
        clean_top5=share(rows["clean_rank"] < 5) if num_classes > _MANY_CLASSES and answered else None,
        median_distance=float(np.median(distances)) if len(distances) else None,
        distances=_distances(rows, spec.threat.norm) if remarks.minimum_norm else None,
        survives_8_bit=share(rows["broken_in_8_bit"][fallen]) if fallen.any() else None,
        members=_members(rows["broken_by"][fallen]),
        randomness=_randomness(rows, spec.decision.repeats) if spec.decision.repeats > 1 and answered else None,
        sequence=remarks.sequence,
        diagnostics=tuple(remarks.diagnostics),
        notes=tuple(sorted(remarks.notes)),
        errors=tuple(errors),
        cost=cost,
        provenance=provenance,
        outcomes_sha256=outcomes_sha256,
    )


@dataclass(frozen=True)
class Remarks:
    """What else is known of an evaluation than its rows."""

    minimum_norm: bool = False
    stopped: bool = False
    """On purpose, before the last example."""
    sequence: ConfidenceSequence | None = None
    """Of a question with a stopping rule, which was satisfied unless `stopped`."""
    diagnostics: Sequence[Diagnostic] = ()
    notes: Collection[str] = ()


def share(hits: NDArray[np.bool_]) -> Proportion:
    """Return the share of true entries, 0 of 0 with the widest interval where there are none."""
    if len(hits):
        return proportion(int(hits.sum()), len(hits))
    return Proportion(successes=0, n=0, value=0.0, clopper_pearson=(0.0, 1.0), wilson=(0.0, 1.0))


def _distances(rows: Rows, norm: str) -> Distances:
    attacked = rows["attacked"]
    found = attacked & rows["broken"]
    length = rows[norm.lower()]
    reach = np.where(found, length, np.inf)[attacked]
    median = float(np.median(reach)) if len(reach) else np.inf
    return Distances(
        found=int(found.sum()),
        attacked=int(attacked.sum()),
        median=median if np.isfinite(median) else None,
        mean_found=float(length[found].mean()) if found.any() else None,
        mean_all=float(np.where(found, length, 0.0).mean()) if len(length) else 0.0,
        relative=float(rows["relative_l2"][found].mean()) if found.any() else None,
    )


def _members(broken_by: NDArray[np.str_]) -> dict[str, int]:
    names, counts = np.unique(broken_by, return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True) if name}


def _randomness(rows: Rows, repeats: int) -> Randomness:
    """Return what the repeated decisions say; decision i is bit i of `wrong_decisions`."""
    from scipy.stats import t as student

    bits = (rows["wrong_decisions"][:, None] >> np.arange(repeats)) & 1
    wrong = (bits == 1) | ~rows["attacked"][:, None]
    accuracy = 1 - wrong.mean(0)
    mean, half = float(accuracy.mean()), float(student.ppf(0.975, repeats - 1) * accuracy.std(ddof=1) / repeats**0.5)
    return Randomness(
        repeats=repeats,
        mean=mean,
        interval=(max(0.0, mean - half), min(1.0, mean + half)),
        undecided=int((wrong.any(1) & ~wrong.all(1)).sum()),
    )

"""From the rows of all shards to one record. Pure: the same rows give the same record in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.evaluation.shards import Rows
from robench.records import OUTCOME_COLUMNS, Cost, EvalRecord, EvalSpec, Proportion, Provenance, ShardError
from robench.statistics import proportion

_MANY_CLASSES = 10


def sort_rows(parts: Sequence[Rows]) -> dict[str, NDArray[Any]]:
    """Return all rows in the order of their example ids, typed; raise ValueError for one that came twice."""
    if not parts:
        return {name: np.empty(0, kind) for name, kind in OUTCOME_COLUMNS.items()}
    ids = np.concatenate([part["example_id"] for part in parts])
    if len(np.unique(ids)) != len(ids):
        raise ValueError("an example was answered twice")
    order = np.argsort(ids, kind="stable")
    return {
        name: np.concatenate([part[name] for part in parts])[order].astype(kind)
        for name, kind in OUTCOME_COLUMNS.items()
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
) -> EvalRecord:
    """Return the record of `rows` (all shards, sorted). It is complete only if every example was answered."""
    answered = len(rows["example_id"])
    clean_correct, robust = rows["clean_rank"] == 0, rows["robust"]
    distances = rows[spec.threat.norm.lower()][rows["attacked"] & ~robust]
    top5: Proportion | None = None
    if num_classes > _MANY_CLASSES and answered:
        top5 = proportion(int((rows["clean_rank"] < 5).sum()), answered)
    nothing = Proportion(successes=0, n=0, value=0.0, clopper_pearson=(0.0, 1.0), wilson=(0.0, 1.0))
    return EvalRecord(
        spec=spec,
        status="complete" if answered == spec.examples.count and not errors else "failed",
        clean=proportion(int(clean_correct.sum()), answered) if answered else nothing,
        robust=proportion(int(robust.sum()), answered) if answered else nothing,
        clean_top5=top5,
        median_distance=float(np.median(distances)) if len(distances) else None,
        errors=tuple(errors),
        cost=cost,
        provenance=provenance,
        outcomes_sha256=outcomes_sha256,
    )

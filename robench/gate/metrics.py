"""From the rows of one answer to what is compared: one value per example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robench.records import CertificateRecord, EvalRecord
from robench.store import Rows
from robench.threat_model import ThreatModel

#: At which radii certified accuracy is compared, as far as the baseline reaches.
RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

Summary = Literal["share", "median", "mean"]
Subject = Literal["clean", "attack", "certificate"]
"""What a value depends on: on the model alone, on an attack's strength, too, or on a certificate."""


@dataclass(frozen=True, eq=False)
class Metric:
    """One thing to compare."""

    name: str
    summary: Summary
    """How the examples' values become one: a share of true ones, a median or a mean of lengths."""
    subject: Subject
    examples: NDArray[np.int64]
    """(N,) ids, ascending."""
    values: NDArray[np.bool_] | NDArray[np.float64]
    """(N,): right or wrong, or a length in the norm's unit, which may be infinite. More is better for a model."""

    predictions: NDArray[np.int32] | None = None
    """(N,) classes, where one answer decides; -1 is an abstention."""

    @property
    def value(self) -> float:
        """Return the summary: a share in [0, 1] or a length."""
        if not len(self.values):
            return 0.0
        return float(np.median(self.values) if self.summary == "median" else np.mean(self.values))


def metrics_of(record: EvalRecord | CertificateRecord, rows: Rows) -> list[Metric]:
    """Return the metrics of an answer, whatever the record's own summary says."""
    return _of_attack(record, rows) if isinstance(record, EvalRecord) else _of_certificate(record, rows)


def _of_attack(record: EvalRecord, rows: Rows) -> list[Metric]:
    ids, title = rows["example_id"], record.spec.attack.title
    found = [
        Metric(
            "clean", "share", "clean", ids, rows["clean_rank"] < record.spec.decision.top_k, rows["clean_prediction"]
        ),
        Metric(title, "share", "attack", ids, rows["robust"], rows["adversarial_prediction"]),
    ]
    if record.distances is not None:
        length = np.where(rows["broken"], rows[record.spec.threat.norm.lower()], np.inf)
        reach = np.where(rows["attacked"], length, 0.0)
        found.append(Metric(f"{title} median {record.spec.threat.norm} distance", "median", "attack", ids, reach))
    return found


def _of_certificate(record: CertificateRecord, rows: Rows) -> list[Metric]:
    ids, name, correct = rows["example_id"], record.spec.certificate.name, rows["correct"]
    radius = np.where(correct, rows["radius"], 0.0)
    if not (rows["hits"] >= 0).any():  # no samples, no bound: a margin
        return [Metric(f"{name} mean", "mean", "certificate", ids, radius)]
    return [
        Metric(f"{name} correct", "share", "certificate", ids, correct, rows["prediction"]),
        *(Metric(f"{name} certified at {r:g}", "share", "certificate", ids, radius > r) for r in RADII),
        Metric(f"{name} average radius", "mean", "certificate", ids, radius),
    ]


def worst_case(threat: ThreatModel, answers: list[Metric]) -> Metric:
    """Return which examples stand every attack; raise ValueError where the answers are of different examples."""
    ids = answers[0].examples
    if any(not np.array_equal(ids, other.examples) for other in answers):
        raise ValueError("the answers are of different examples")
    stands = np.logical_and.reduce([answer.values for answer in answers])
    return Metric(f"worst case under {threat}", "share", "attack", ids, stands)

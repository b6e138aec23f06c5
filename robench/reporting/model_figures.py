"""What is drawn on a model's page from its records: accuracy over epsilon, and how far boundaries and attacks lie."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from robench.records import Examples, canonical_hash
from robench.reporting.curves import Drawing, histogram, line_chart
from robench.store import Rows, StoredCertificate, StoredRecord, file_name
from robench.tables import natural


def model_drawings(
    answers: Iterable[StoredRecord], certificates: Iterable[StoredCertificate], outcomes: Callable[..., Rows]
) -> list[Drawing]:
    """Return the figures of one model; those that lack records are left out."""
    complete = [stored for stored in answers if stored.record.status == "complete"]
    return [
        *_over_epsilon(complete),
        *_nearest(complete, outcomes),
        *_radii((c for c in certificates if c.record.status == "complete"), outcomes),
    ]


def _over_epsilon(answers: Iterable[StoredRecord]) -> Iterator[Drawing]:
    """Yield robust accuracy over epsilon, where an attack was run at two epsilons or more on the same images."""
    groups: dict[str, dict[str, list[StoredRecord]]] = defaultdict(lambda: defaultdict(list))
    for stored in answers:
        spec = stored.record.spec
        if stored.record.distances is None and spec.until is None:
            place = canonical_hash([spec.examples.model_dump(mode="json"), spec.threat.norm])
            attack = canonical_hash(spec.model_dump(mode="json", exclude={"threat"}))
            groups[place][attack].append(stored)
    for own in groups.values():
        series = {}
        for group in sorted(own.values(), key=lambda g: natural(g[0].record.spec.attack.title)):
            group.sort(key=lambda s: s.record.spec.threat.epsilon)
            if len({s.record.spec.threat.epsilon for s in group}) > 1:
                title = group[0].record.spec.attack.title
                title = title if title not in series else f"{title} ({group[0].record.spec.identity[:6]})"
                series[title] = [(0.0, group[0].record.clean.value)] + [
                    (float(s.record.spec.threat.epsilon), s.record.robust.value) for s in group
                ]
        if series:
            spec = next(iter(own.values()))[0].record.spec
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["attack", "epsilon", "share"])
            writer.writerows([name, f"{x:.10g}", f"{y:.10g}"] for name, points in series.items() for x, y in points)
            yield Drawing(
                name=f"epsilon-{_suffix(spec.examples)}-{spec.threat.norm.lower()}",
                title=f"Accuracy over epsilon, {spec.threat.norm}",
                caption=f"{_described(spec.examples)}, lines join what was measured",
                charts=(line_chart("", series, x_title=f"epsilon, {spec.threat.norm}"),),
                csv=text.getvalue(),
            )


def _nearest(answers: Iterable[StoredRecord], outcomes: Callable[..., Rows]) -> Iterator[Drawing]:
    """Yield histograms of minimum norms, one for each attack and choice of images."""
    seen = set()
    for stored in answers:
        spec = stored.record.spec
        key = canonical_hash([spec.model_dump(mode="json", exclude={"threat"}), spec.threat.norm])
        if stored.record.distances is None or key in seen:
            continue
        seen.add(key)
        rows = outcomes(stored.record)
        found = rows["attacked"] & rows["broken"]
        lengths = np.asarray(rows[spec.threat.norm.lower()][found], np.float64)
        if len(lengths):
            yield histogram(
                f"nearest-{_suffix(spec.examples)}-{spec.threat.norm.lower()}-{file_name(spec.attack.title)}-{key[:6]}",
                f"Minimum norms, {spec.attack.title}",
                f"{_described(spec.examples)}: {spec.threat.norm} distance of the nearest adversarial example, where "
                f"one was found ({len(lengths):,} of {int(rows['attacked'].sum()):,} images that were right)",
                lengths,
                x_title=f"{spec.threat.norm} distance",
            )


def _radii(certificates: Iterable[StoredCertificate], outcomes: Callable[..., Rows]) -> Iterator[Drawing]:
    """Yield histograms of effective margins and of certified radii."""
    for stored in certificates:
        spec = stored.record.spec
        rows = outcomes(stored.record)
        radius = np.asarray(rows["radius"], np.float64)
        radius = radius[rows["correct"] & (radius > 0) & np.isfinite(radius)]
        if not len(radius):
            continue
        margin = spec.certificate.entry == "effective-margin"
        what = "Effective margins" if margin else f"Certified radii, {spec.certificate.name}"
        sigma: Any = spec.certificate.parameters.get("sigma")
        yield histogram(
            f"{'margins' if margin else 'radii'}-{_suffix(spec.examples)}-{spec.identity[:6]}",
            what + (f", noise {sigma:g}" if sigma else ""),
            f"{_described(spec.examples)}: of the {len(radius):,} images that are right with a radius above 0",
            radius,
            x_title="L2 distance",
        )


def _suffix(examples: Examples) -> str:
    return f"{file_name(examples.dataset)}-{examples.split}-{examples.count}-{examples.ids_sha256[:6]}"


def _described(examples: Examples) -> str:
    return f"{examples.count:,} {examples.split} images of {examples.dataset}"

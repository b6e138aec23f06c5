"""Certified accuracy and radii: one table per data set, examples and certificate.

Rows are models, ranked by the average certified radius, in which wrong predictions and abstentions count 0. What a
radius guarantees, and for which function, is the certificate's own sentence, which stands above the table: a margin is
no guarantee, and a certificate of the smoothed model says nothing of one forward pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robench.catalog import LeaderboardEntry
from robench.leaderboards.minimum_norm import mean_cell
from robench.leaderboards.robustness import described_by, share_cell
from robench.records import CertificateSpec, canonical_hash
from robench.store import Results, StoredCard, StoredCertificate, file_name
from robench.tables import Cell, Column, Curve, Curves, Table, competition_ranks, natural, proportion_cell

#: Radii of the columns; those that no model reaches are left out.
_RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
#: A curve's points: finer than any drawing, and its file stays small.
_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Certified:
    """A model with its answer."""

    name: str
    note: str | None
    card: StoredCard | None
    stored: StoredCertificate
    correct: NDArray[np.bool_]
    abstained: NDArray[np.bool_]
    radius: NDArray[np.float64]
    """0 where it abstains."""
    samples: NDArray[np.int64]

    @property
    def average(self) -> float:
        """Return the average certified radius."""
        return self.stored.record.average_radius

    @property
    def beyond(self) -> str | None:
        """Return what is wrong with radii that are on average larger than an image can have: a network that all but
        collapsed to a constant has such margins, because a margin is a linear extrapolation.
        """
        farthest = math.sqrt(math.prod(self.card.card.input_shape)) if self.card else math.inf
        if self.average <= farthest:
            return None
        return f"{self.average:.1e} on average, where no two images are farther apart than {farthest:.4g}"


def certification(results: Results) -> list[Table]:
    """Return a table for every (data set, examples, certificate) that has records."""
    groups: dict[str, list[StoredCertificate]] = defaultdict(list)
    for stored in results.certificates:
        spec = stored.record.spec
        question = [spec.examples.model_dump(mode="json"), spec.certificate.model_dump(mode="json"), spec.precision]
        groups[canonical_hash(question)].append(stored)
    names = [table_name(group[0].record.spec) for group in groups.values()]
    tables = []
    for (key, group), name in zip(groups.items(), names, strict=True):
        unique = name if names.count(name) == 1 else f"{name}-{key[:6]}"
        noise = float(group[0].record.spec.certificate.parameters.get("sigma", 0.0))
        entry = group[0].record.spec.certificate.entry
        tables.append((natural(entry), noise, build_table(unique, group, results)))
    return [table for *_, table in sorted(tables, key=lambda t: (*t[:2], natural(t[2].name)))]


def table_name(spec: CertificateSpec) -> str:
    """Return `certification-cohen-mnist-0.25`: certificate, data set, noise; the count follows where not all images."""
    examples, sigma = spec.examples, spec.certificate.parameters.get("sigma")
    parts = ["certification", file_name(spec.certificate.name.partition(":")[0]), file_name(examples.dataset)]
    parts += [f"{sigma:g}"] if sigma else []
    parts += [examples.split] if examples.split != "test" else []
    parts += [str(examples.count)] if examples.count != examples.split_size else []
    return "-".join(parts)


def build_table(name: str, group: Sequence[StoredCertificate], results: Results) -> Table:
    """Return the table of records that share examples and certificate."""
    models = list(_models(group, results))
    unranked = sorted((c for c in models if c.beyond), key=lambda c: natural(c.name))
    rows_of = sorted((c for c in models if not c.beyond), key=lambda c: (-c.average, natural(c.name)))
    spec, guarantee = group[0].record.spec, group[0].record.guarantee
    radii = [r for r in _RADII if any((c.radius[c.correct] > r).any() for c in rows_of)]
    by_radius = any((c.radius > 0).any() for c in rows_of)
    if not by_radius:
        rows_of.sort(key=lambda c: (-c.stored.record.correct.value, natural(c.name)))
    ranks = competition_ranks(c.average if by_radius else c.stored.record.correct.value for c in rows_of)
    noise = spec.certificate.parameters.get("sigma")
    shown = f"{spec.examples.count:,} of the {spec.examples.split_size:,} {spec.examples.split} images"
    return Table(
        name=name,
        title=f"{spec.examples.dataset}, {spec.certificate.name}" + (f", noise {noise:g}" if noise else ""),
        caption=shown,
        columns=columns(radii),
        rows=(
            *(row(c, radii, rank=Cell(value=rank)) for c, rank in zip(rows_of, ranks, strict=True)),
            *(row(c, radii, rank=Cell(note=c.beyond)) for c in unranked),
        ),
        ranked_by="average" if by_radius else "correct",
        figures=(curves(rows_of),) if by_radius and rows_of else (),
        reading=(guarantee, _reading(spec)),
    )


def _reading(spec: CertificateSpec) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in spec.certificate.parameters.items())
    return (
        f"Settings: {settings}; seed {spec.seed}, {spec.precision}. Radii and distances are L2 on the [0, 1] scale of "
        "pixels. Shares are of all images unless the column says that those on which the certificate abstains are left "
        "out, as some papers print it."
    )


def _models(group: Sequence[StoredCertificate], results: Results) -> Iterator[Certified]:
    ids = [stored.record.spec.model.id for stored in group]
    for stored in sorted(group, key=lambda s: s.path):
        model = stored.record.spec.model
        card, note = described_by(model, results, namesakes=ids.count(model.id))
        rows = results.outcomes(stored.record)
        yield Certified(
            model.id, note, card, stored, rows["correct"], rows["prediction"] < 0, rows["radius"], rows["samples"]
        )


def columns(radii: Sequence[float]) -> tuple[Column, ...]:
    """Return the columns for these radii."""
    fixed = [
        ("rank", "#", "rank", "By average radius; equals share the better rank."),
        ("model", "Model", "model", "How it was made, how to use it."),
        ("average", "Average radius", "distance", "Mean radius over all images, 0 where wrong or abstained (ACR)."),
        ("correct", "Correct", "accuracy", "Certified prediction correct; abstentions count as wrong."),
        ("plain", "One pass", "accuracy", "Correct by one forward pass without noise."),
        ("abstained", "Abstained", "accuracy", "Images on which the certificate gives no answer."),
        ("median", "Median radius", "distance", "Of the correct images."),
        ("mean", "Mean radius", "distance", "Of the correct images."),
        ("std", "Spread", "distance", "Standard deviation of the radius over the correct images."),
        ("maximum", "Largest", "distance", "Of the correct images."),
    ]
    made = [Column(key=k, title=t, role=r, description=d) for k, t, r, d in fixed]  # type: ignore[arg-type]
    made += [
        Column(
            key=f"at {radius:g}",
            title=f"> {radius:g}",
            role="accuracy",
            description=f"Certified accuracy: correct with a radius above {radius:g}, of all images.",
        )
        for radius in radii
    ]
    made += [
        Column(
            key=f"answered at {radius:g}",
            title=f"> {radius:g}, of answered",
            role="accuracy",
            description="The same, of the images on which the certificate does not abstain.",
        )
        for radius in radii
    ]
    samples = Column(key="samples", title="Samples", role="amount", description="Noisy copies per image, on average.")
    gap = Column(
        key="gap",
        title="Premise gap",
        role="distance",
        description="How far the probabilities are from the Gaussian average that they are supposed to be (L2).",
    )
    return (*made, samples, gap)


def row(certified: Certified, radii: Sequence[float], *, rank: Cell) -> tuple[Cell, ...]:
    """Return a model's cells, in the order of :func:`columns`."""
    record, path = certified.stored.record, certified.stored.path
    correct, answered = certified.correct, ~certified.abstained
    own = record.radii
    reached = [correct & (certified.radius > radius) for radius in radii]
    return (
        rank,
        Cell(value=certified.name, model=certified.name if certified.card else None, note=certified.note),
        mean_cell(_finite(np.where(correct, certified.radius, 0.0))),
        proportion_cell(record.correct, record=path),
        proportion_cell(record.plain, record=path),
        proportion_cell(record.abstained, record=path),
        Cell(value=own.median, n=own.n, record=path) if own else Cell(),
        Cell(value=own.mean, n=own.n, record=path) if own else Cell(),
        Cell(value=own.std, n=own.n, record=path) if own else Cell(),
        Cell(value=own.maximum, n=own.n, record=path) if own else Cell(),
        *(share_cell(hits) for hits in reached),
        *(share_cell(hits[answered]) if answered.any() else Cell() for hits in reached),
        Cell(value=round(float(certified.samples.mean()), 1) if len(certified.samples) else 0.0),
        Cell(value=record.premise_gap, record=path) if record.premise_gap is not None else Cell(),
    )


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def curves(models: Sequence[Certified]) -> Curves:
    """Return which share of all images is certified beyond each radius, model by model."""
    names = [c.name for c in models]
    drawn = []
    for c in models:
        title = c.name if names.count(c.name) == 1 else f"{c.name} ({c.note})"
        total = len(c.radius)
        radius = np.sort(_finite(c.radius[c.correct & (c.radius > 0)]))
        shown = np.unique(np.linspace(0, len(radius), min(len(radius), _STEPS) + 1).round().astype(int)[1:])
        # From a radius on, only those that are larger are certified.
        left = (len(radius) - shown) / max(1, total)
        start = len(radius) / max(1, total)
        drawn.append(Curve(title=title, x=(0.0, *radius[shown - 1].tolist()), y=(start, *left.tolist()), n=total))
    furthest = [c.x[-1] for c in drawn]
    return Curves(
        name="curve",
        title="Certified accuracy",
        caption="Share of all images whose prediction is correct with a radius above each value",
        x_title="L2 radius",
        y_title="certified, %",
        curves=tuple(drawn),
        x_end=max([*furthest, 1e-6]),
    )


ENTRY = LeaderboardEntry(
    name="certification",
    build=certification,
    summary="Models ranked by how far their predictions are certified, or their margins.",
    source="Cohen et al., arXiv:1902.02918; average certified radius: Zhai et al., arXiv:2001.02378",
)

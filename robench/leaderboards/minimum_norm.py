"""How far the nearest adversarial example lies: one table per data set, examples and norm.

Attacks that look for the minimum norm (DDN, DeepFool, FAB, Carlini and Wagner's) say for each image at which distance
it falls, so one run of theirs holds the robust accuracy at every epsilon. Rows are models, ranked by the median
distance to the nearest example that any of these attacks found, image by image. The median is over all attacked images,
where one that was not broken lies infinitely far: leaving it out would make a model look weaker the less was found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.catalog import LeaderboardEntry
from robench.errors import UnsafeFile
from robench.leaderboards.robustness import attack_key, attack_titles, described_by, share_cell
from robench.records import EvalSpec, Examples, canonical_hash
from robench.statistics import mean_interval, median_ranks
from robench.store import Results, StoredCard, StoredRecord, file_name
from robench.tables import Cell, Column, Curve, Curves, Table, competition_ranks, natural, proportion_cell

#: A curve's points: finer than any drawing, and its file stays small.
_STEPS = 1000
#: The drawing ends where this share of what was found lies: one far example must not flatten all others.
_DRAWN = 0.99

_READING = (
    "Robust accuracy at any epsilon follows from these distances: an image counts as robust at every epsilon that is "
    "smaller than its distance. robench eval with another --threat reads it off, without computing anything.",
    "The median is over all images that were right without an attack, one that was never broken lying infinitely far "
    "(∞: at least half were not broken). The papers' means are beside it: of the images that were broken, and of all "
    "images with 0 where nothing was found. Intervals are 95 %: of medians by order statistics, of means normal.",
)


@dataclass(frozen=True, eq=False)
class Reach:
    """How far the nearest adversarial examples are, of every example of the table `(N,)`."""

    attacked: NDArray[np.bool_]
    """Right without an attack."""
    distance: NDArray[np.float64]
    """Infinite where none was found."""
    relative: NDArray[np.float64]
    """L2 distance over the image's L2 norm, of what was found."""

    @property
    def found(self) -> NDArray[np.bool_]:
        """Return which attacked examples were broken."""
        return self.attacked & np.isfinite(self.distance)

    @property
    def median(self) -> float:
        """Return the median over the attacked examples, infinite where at least half were not broken."""
        attacked = self.distance[self.attacked]
        return float(np.median(attacked)) if len(attacked) else 0.0


@dataclass(frozen=True, eq=False)
class Contestant:
    """A model with the answers of the minimum-norm attacks."""

    name: str
    note: str | None
    card: StoredCard | None
    answers: Mapping[str, StoredRecord]
    """By the key of their attack."""
    reaches: Mapping[str, Reach]
    nearest: Reach
    """Over all its attacks."""


def minimum_norm(results: Results) -> list[Table]:
    """Return a table for every (data set, examples, norm) that has records of minimum-norm attacks."""
    groups: dict[str, list[StoredRecord]] = defaultdict(list)
    for stored in results.records:
        record = stored.record
        if record.status == "complete" and record.distances is not None:
            spec = record.spec
            question = [spec.examples.model_dump(mode="json"), spec.decision.model_dump(mode="json"), spec.threat.norm]
            groups[canonical_hash(question)].append(stored)
    names = [table_name(group[0].record.spec.examples, group[0].record.spec.threat.norm) for group in groups.values()]
    tables = []
    for (key, group), name in zip(groups.items(), names, strict=True):
        unique = name if names.count(name) == 1 else f"{name}-{key[:6]}"
        tables.append(build_table(unique, group, results))
    return sorted(tables, key=lambda table: natural(table.name))


def table_name(examples: Examples, norm: str) -> str:
    """Return `minimum-norm-mnist-l2`; the split and the count follow where not all test images."""
    parts = ["minimum-norm", file_name(examples.dataset), norm.lower()]
    parts += [examples.split] if examples.split != "test" else []
    parts += [str(examples.count)] if examples.count != examples.split_size else []
    return "-".join(parts)


def build_table(name: str, group: Sequence[StoredRecord], results: Results) -> Table:
    """Return the table of records that share examples and norm."""
    attacks = attack_titles(stored.record.spec for stored in group)
    contestants = sorted(contestants_of(group, results), key=lambda c: (-c.nearest.median, natural(c.name)))
    ranked = [c for c in contestants if len(c.answers) == len(attacks) and c.nearest.attacked.any()]
    others = sorted((c for c in contestants if c not in ranked), key=lambda c: natural(c.name))
    ranks = competition_ranks(c.nearest.median for c in ranked)
    spec = group[0].record.spec
    shown = f"{spec.examples.count:,} of the {spec.examples.split_size:,} {spec.examples.split} images"
    return Table(
        name=name,
        title=f"{spec.examples.dataset}, nearest in {spec.threat.norm}",
        caption=f"{shown}, each moved as little as the attacks can to be misclassified",
        columns=columns(attacks, spec),
        rows=(
            *(row(c, attacks, rank=rank) for c, rank in zip(ranked, ranks, strict=True)),
            *(row(c, attacks, rank=None) for c in others),
        ),
        ranked_by="median",
        figures=figures([*ranked, *others], attacks, spec.threat.norm),
        reading=_READING,
    )


def contestants_of(group: Sequence[StoredRecord], results: Results) -> list[Contestant]:
    """Return the models of these records."""
    by_model: dict[str, dict[str, StoredRecord]] = defaultdict(dict)
    for stored in sorted(group, key=lambda s: s.path):
        spec = stored.record.spec
        # Records that differ in epsilon alone have the same distances: any of them will do.
        by_model[canonical_hash(spec.model.model_dump(mode="json"))].setdefault(attack_key(spec), stored)
    ids = [next(iter(answers.values())).record.spec.model.id for answers in by_model.values()]
    found = []
    for answers in by_model.values():
        model = next(iter(answers.values())).record.spec.model
        card, note = described_by(model, results, namesakes=ids.count(model.id))
        reaches = {key: reach_of(stored, results) for key, stored in answers.items()}
        found.append(Contestant(model.id, note, card, answers, reaches, nearest(answers, reaches, results)))
    return found


def reach_of(stored: StoredRecord, results: Results) -> Reach:
    """Return what one attack found, in the norm that it was asked for."""
    rows = results.outcomes(stored.record)
    found = rows["attacked"] & rows["broken"]
    length = rows[stored.record.spec.threat.norm.lower()]
    return Reach(rows["attacked"], np.where(found, length, np.inf), np.where(found, rows["relative_l2"], 0.0))


def nearest(answers: Mapping[str, StoredRecord], reaches: Mapping[str, Reach], results: Results) -> Reach:
    """Return the nearest that any attack found, example by example; raise UnsafeFile for rows of other examples."""
    records = [stored.record for stored in answers.values()]
    ids = [results.outcomes(record)["example_id"] for record in records]
    for record, own in zip(records, ids, strict=True):
        if not np.array_equal(own, ids[0]):
            raise UnsafeFile(
                f"records {records[0].spec.identity} and {record.spec.identity} name the same examples, but their "
                f"outcomes hold different ones; delete both and evaluate {record.spec.model.id} again"
            )
    all_reaches = list(reaches.values())
    distances = np.stack([reach.distance for reach in all_reaches])
    best = distances.argmin(0)
    relative = np.stack([reach.relative for reach in all_reaches])
    every = np.arange(distances.shape[1])
    return Reach(all_reaches[0].attacked, distances[best, every], relative[best, every])


#: What is said of the distances of one attack, or of all together: key, title, description.
_STATISTICS = (
    ("median", "median", "Half of the attacked images fall within this distance."),
    ("mean_found", "mean, found", "Of the images that were broken."),
    ("mean_all", "mean, all", "Of all images, as the papers print it: 0 where nothing was found."),
    (
        "relative",
        "relative",
        "Mean of L2 distance over the image's L2 norm, of those broken (DeepFool's rho).",
    ),
    ("found", "found", "Share of the attacked images that were broken, at whatever distance."),
)


def columns(attacks: Mapping[str, str], spec: EvalSpec) -> tuple[Column, ...]:
    """Return the columns for these attacks."""
    fixed = (
        Column(key="rank", title="#", role="rank", description="By median; equals share the better rank."),
        Column(key="model", title="Model", role="model", description="How it was made, how to use it."),
    )
    own = [
        Column(
            key=key,
            title=f"Nearest {title}" if key != "found" else "Found",
            role="accuracy" if key == "found" else "distance",
            description=f"All attacks together, in {spec.threat.norm}. {text}",
        )
        for key, title, text in _STATISTICS
    ]
    clean = Column(key="clean", title="Clean", role="accuracy", description="Images correct without an attack.")
    single = [
        Column(
            key=f"{attack} {key}",
            title=f"{attack} {title}",
            role="accuracy" if key == "found" else "distance",
            description=f"{attack} alone. {text}",
        )
        for attack in attacks.values()
        for key, title, text in _STATISTICS
    ]
    return (*fixed, *own, clean, *single)


def row(contestant: Contestant, attacks: Mapping[str, str], *, rank: int | None) -> tuple[Cell, ...]:
    """Return a model's cells, in the order of :func:`columns`."""
    missing = [title for key, title in attacks.items() if key not in contestant.answers]
    first = next(iter(contestant.answers.values()))
    single: list[Cell] = []
    for key in attacks:
        if key in contestant.answers:
            single += statistics(contestant.reaches[key], contestant.answers[key])
        else:
            single += [Cell(note="not evaluated"), *[Cell()] * (len(_STATISTICS) - 1)]
    lack = f"without {', '.join(missing)}" if missing else "right on no image"
    return (
        Cell(value=rank, note=None if rank else f"not ranked: {lack}"),
        Cell(value=contestant.name, model=contestant.name if contestant.card else None, note=contestant.note),
        *statistics(contestant.nearest, None),
        proportion_cell(first.record.clean, record=first.path),
        *single,
    )


def statistics(reach: Reach, stored: StoredRecord | None) -> list[Cell]:
    """Return the cells of :data:`_STATISTICS`."""
    record = stored.path if stored else None
    attacked, found = int(reach.attacked.sum()), reach.found
    ordered, ranks = np.sort(reach.distance[reach.attacked]), median_ranks(attacked)
    low, high = (float(ordered[ranks[0]]), float(ordered[ranks[1]])) if ranks else (None, None)
    median = Cell(value=reach.median, low=low, high=high, n=attacked, record=record) if attacked else Cell()
    return [
        median,
        mean_cell(reach.distance[found]),
        mean_cell(np.where(found, reach.distance, 0.0)),
        mean_cell(reach.relative[found]),
        share_cell(found[reach.attacked]) if attacked else Cell(),
    ]


def mean_cell(values: NDArray[np.float64]) -> Cell:
    """Return the cell of a mean of distances, an empty one where there are none."""
    if not len(values):
        return Cell()
    mean, low, high = mean_interval(values)
    return Cell(value=mean, low=max(0.0, low), high=high, n=len(values))


def figures(contestants: Sequence[Contestant], attacks: Mapping[str, str], norm: str) -> tuple[Curves, ...]:
    """Return the attack curves: of the nearest of all attacks, and where there are several of each one."""
    names = [c.name for c in contestants]
    labels = [c.name if names.count(c.name) == 1 else f"{c.name} ({c.note})" for c in contestants]
    named = dict(zip(labels, contestants, strict=True))
    together = attack_curves("curve", "all attacks", norm, {label: c.nearest for label, c in named.items()})
    if len(attacks) == 1:
        return (together,)
    single = []
    for key, title in attacks.items():
        own = {label: c.reaches[key] for label, c in named.items() if key in c.reaches}
        single.append(attack_curves(f"curve-{file_name(title)}", title, norm, own))
    return (together, *single)


def attack_curves(name: str, title: str, norm: str, reaches: Mapping[str, Reach]) -> Curves:
    """Return which share of the attacked images is broken within each distance, model by model."""
    found = np.concatenate([reach.distance[reach.found] for reach in reaches.values()])
    curves: list[dict[str, Any]] = []
    for model, reach in reaches.items():
        count = int(reach.attacked.sum())
        distances = np.sort(reach.distance[reach.found])
        shown = np.unique(np.linspace(0, len(distances), min(len(distances), _STEPS) + 1).round().astype(int)[1:])
        x, y = distances[shown - 1], shown / max(1, count)
        curves.append({"title": model, "x": (0.0, *x.tolist()), "y": (0.0, *y.tolist()), "n": count})
    return Curves(
        name=name,
        title=f"Attack curves, {title}",
        caption=f"Share of the attacked images that {title} can break within each distance",
        x_title=f"{norm} distance",
        y_title="broken, %",
        curves=tuple(Curve(**curve) for curve in curves),
        x_end=float(np.quantile(found, _DRAWN)) if len(found) else 1.0,
    )


ENTRY = LeaderboardEntry(
    name="minimum-norm",
    build=minimum_norm,
    summary="Models ranked by how far the nearest adversarial examples are.",
    source="Moosavi-Dezfooli et al., DeepFool, arXiv:1511.04599; Rony et al., arXiv:1811.09600",
)

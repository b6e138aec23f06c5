"""Accuracy over epsilon: one table per data set, examples, norm and attack that was run at several epsilons.

Rows are models, ranked by their average from 0 to the largest epsilon: the area under the curve of robust accuracy,
which is the clean accuracy at 0 and linear between what was measured, over its width. One epsilon alone may suit one
model: the average does not depend on which was chosen. (Attacks that look for the minimum norm have whole curves: see
the tables of minimum norms.) Noise without a bound, which has a scale instead, has tables of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from robench.catalog import LeaderboardEntry
from robench.errors import UnsafeFile
from robench.leaderboards.robustness import attack_key, attack_titles, current_and_former, described_by
from robench.leaderboards.transfer import average_over_epsilon
from robench.planning import is_bounded
from robench.records import EvalSpec, canonical_hash
from robench.statistics import mean_interval
from robench.store import Results, StoredCard, StoredRecord, file_name
from robench.tables import Cell, Column, Curve, Curves, Table, competition_ranks, natural, proportion_cell
from robench.threat_model import epsilon_text

_READING = (
    "Average is the area under the curve of robust accuracy from epsilon 0, where it is the clean accuracy, to the "
    "largest epsilon, over its width; between two epsilons the curve is a straight line. It is of one attack: what "
    "another would have left is in the tables of single epsilons. A model that lacks an epsilon has no rank.",
)


@dataclass(frozen=True, eq=False)
class Contestant:
    """A model with its answers, by epsilon."""

    name: str
    note: str | None
    card: StoredCard | None
    answers: Mapping[Fraction, StoredRecord]
    average: NDArray[np.float64]
    """Of each example `(N,)`, over the epsilons of its answers."""


def over_epsilon(results: Results) -> list[Table]:
    """Return a table for every (data set, examples, norm, attack) with answers at two epsilons or more."""
    groups: dict[str, list[StoredRecord]] = defaultdict(list)
    for stored in results.records:
        record, spec = stored.record, stored.record.spec
        if record.status == "complete" and record.distances is None and spec.until is None:
            question = [spec.examples.model_dump(mode="json"), spec.threat.norm, attack_key(spec)]
            groups[canonical_hash(question)].append(stored)
    several = {key: current_and_former(group, results)[0] for key, group in groups.items()}
    several = {key: group for key, group in several.items() if len({s.record.spec.threat.epsilon for s in group}) > 1}
    titles = attack_titles(group[0].record.spec for group in several.values())
    names = {key: table_name(group[0].record.spec) for key, group in several.items()}
    tables = []
    for key, group in several.items():
        # Attacks that share a name and differ in their parameters must not share a file.
        unique = names[key] if list(names.values()).count(names[key]) == 1 else f"{names[key]}-{key[:6]}"
        tables.append(build_table(unique, group, titles[attack_key(group[0].record.spec)], results))
    return sorted(tables, key=lambda table: natural(table.name))


def table_name(spec: EvalSpec) -> str:
    """Return `epsilon-mnist-linf-pgd-40`; the split and the count follow where not all test images."""
    examples = spec.examples
    parts = ["epsilon", file_name(examples.dataset), spec.threat.norm.lower() if is_bounded(spec) else "noise"]
    parts += [file_name(spec.attack.title)]
    parts += [examples.split] if examples.split != "test" else []
    parts += [str(examples.count)] if examples.count != examples.split_size else []
    return "-".join(parts)


def build_table(name: str, group: Sequence[StoredRecord], title: str, results: Results) -> Table:
    """Return the table of one attack's answers."""
    spec = group[0].record.spec
    epsilons = sorted({s.record.spec.threat.epsilon for s in group})
    contestants = sorted(contestants_of(group, results), key=lambda c: (-float(c.average.mean()), natural(c.name)))
    ranked = [c for c in contestants if len(c.answers) == len(epsilons)]
    others = sorted((c for c in contestants if c not in ranked), key=lambda c: natural(c.name))
    drawn = [c for c in (*ranked, *others) if len(c.answers) > 1]
    ranks = competition_ranks(float(c.average.mean()) for c in ranked)
    what = spec.threat.norm if is_bounded(spec) else "noise"
    shown = f"{spec.examples.count:,} of the {spec.examples.split_size:,} {spec.examples.split} images"
    return Table(
        name=name,
        title=f"{spec.examples.dataset} over epsilon, {what}, {title}",
        caption=f"{shown}, {what} from 0 to {epsilon_text(epsilons[-1])}",
        columns=columns(epsilons, title),
        rows=(
            *(row(c, epsilons, rank=rank) for c, rank in zip(ranked, ranks, strict=True)),
            *(row(c, epsilons, rank=None) for c in others),
        ),
        ranked_by="average",
        figures=(curves(drawn, what, title),) if drawn else (),
        reading=_READING,
    )


def contestants_of(group: Sequence[StoredRecord], results: Results) -> list[Contestant]:
    """Return the models of these records; raise UnsafeFile for rows of other examples."""
    by_model: dict[str, dict[Fraction, StoredRecord]] = defaultdict(dict)
    for stored in sorted(group, key=lambda s: (s.record.spec.threat.epsilon, s.path)):
        spec = stored.record.spec
        by_model[canonical_hash(spec.model.model_dump(mode="json"))][spec.threat.epsilon] = stored
    ids = [next(iter(answers.values())).record.spec.model.id for answers in by_model.values()]
    found = []
    for answers in by_model.values():
        rows = [results.outcomes(stored.record) for stored in answers.values()]
        first = next(iter(answers.values()))
        if any(not np.array_equal(own["example_id"], rows[0]["example_id"]) for own in rows):
            name = first.record.spec.model.id
            raise UnsafeFile(
                f"records of {name} at different epsilons name the same examples, but their outcomes hold different "
                f"ones; delete {', '.join(str(s.path) for s in answers.values())} and evaluate {name} again"
            )
        average = average_over_epsilon(tuple(answers), rows[0]["attacked"], [own["robust"] for own in rows])
        model = first.record.spec.model
        card, note = described_by(model, results, namesakes=ids.count(model.id))
        found.append(Contestant(model.id, note, card, answers, average))
    return found


def columns(epsilons: Sequence[Fraction], title: str) -> tuple[Column, ...]:
    """Return the columns for these epsilons."""
    return (
        Column(key="rank", title="#", role="rank", description="By average; equals share the better rank."),
        Column(key="model", title="Model", role="model", description="How it was made, how to use it."),
        Column(
            key="average",
            title="Average",
            role="accuracy",
            description="Area under the curve from epsilon 0 to the largest, over its width.",
        ),
        Column(key="clean", title="Clean", role="accuracy", description="Images correct without an attack."),
        *(
            Column(
                key=f"at {epsilon_text(epsilon)}",
                title=f"At {epsilon_text(epsilon)}",
                role="accuracy",
                description=f"Images still correct after {title} at epsilon {epsilon_text(epsilon)}.",
            )
            for epsilon in epsilons
        ),
    )


def row(contestant: Contestant, epsilons: Sequence[Fraction], *, rank: int | None) -> tuple[Cell, ...]:
    """Return a model's cells, in the order of :func:`columns`."""
    own = contestant.answers
    missing = [epsilon_text(epsilon) for epsilon in epsilons if epsilon not in own]
    first = next(iter(own.values()))
    average, low, high = mean_interval(contestant.average)
    return (
        Cell(value=rank, note=f"not ranked: without epsilon {', '.join(missing)}" if missing else None),
        Cell(value=contestant.name, model=contestant.name if contestant.card else None, note=contestant.note),
        # An average over fewer epsilons is another one.
        Cell(note="not at every epsilon")
        if missing
        else Cell(value=average, low=max(0.0, low), high=min(1.0, high), n=len(contestant.average)),
        proportion_cell(first.record.clean, record=first.path),
        *(
            proportion_cell(own[epsilon].record.robust, record=own[epsilon].path)
            if epsilon in own
            else Cell(note="not evaluated")
            for epsilon in epsilons
        ),
    )


def curves(contestants: Sequence[Contestant], what: str, title: str) -> Curves:
    """Return robust accuracy over epsilon, model by model."""
    names = [c.name for c in contestants]
    drawn = []
    for c in contestants:
        clean = next(iter(c.answers.values())).record.clean
        points = [(0.0, clean.value), *((float(e), s.record.robust.value) for e, s in c.answers.items())]
        drawn.append(
            Curve(
                title=c.name if names.count(c.name) == 1 else f"{c.name} ({c.note})",
                x=tuple(x for x, _ in points),
                y=tuple(y for _, y in points),
                n=clean.n,
            )
        )
    return Curves(
        name="curve",
        title="Accuracy over epsilon",
        caption=f"Share of all images that are still correct after {title}; lines join what was measured",
        x_title=f"epsilon, {what}",
        y_title="correct, %",
        curves=tuple(drawn),
        x_end=max(curve.x[-1] for curve in drawn),
        linear=True,
    )


ENTRY = LeaderboardEntry(
    name="epsilon",
    build=over_epsilon,
    summary="Models ranked by their accuracy over all epsilons at which one attack was run.",
    source="Madry et al., arXiv:1706.06083, figure 6 (curves); Roth et al., arXiv:1805.08736, appendix 7.3 (averages)",
)

"""Who is fooled by images that were made to fool another: one matrix per data set, examples, threat model and attack.

Entry (t, s) is the accuracy of target t on the adversarial images of source s, the first column the clean accuracy of
the target, the diagonal white-box (Roth et al., arXiv:1805.08736, appendix 7.3). Where the sources were attacked at
several epsilons, one more matrix averages over them: the area under each entry's curve from 0, where it is the clean
accuracy, to the largest epsilon.

Targets are ranked by the worst case: images that stay correct whatever source they were made on. A model that has not
seen the images of every source of its matrix has no rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.catalog import LeaderboardEntry
from robench.errors import UnsafeFile
from robench.leaderboards.robustness import attack_key, attack_titles, described_by, share_cell
from robench.records import EvalSpec, ModelIdentity, canonical_hash
from robench.statistics import mean_interval
from robench.store import Results, StoredTransfer, file_name
from robench.tables import Cell, Column, Grid, Table, competition_ranks, natural
from robench.threat_model import epsilon_text

_READING = (
    "Each row is a model that classifies, each column the model on which the images were made. Where both are the same "
    "the attack saw the model that it fools (white-box); elsewhere the images only transfer. A model that does worse "
    "on another's images than on its own was not attacked well, or hides its gradients.",
    "Images are also made of examples that the source gets wrong, and an image counts as correct only if the target "
    "was right without an attack, too. Compare down a column: these models saw the same images.",
)


@dataclass(frozen=True, eq=False)
class Entrant:
    """A target and how it does; arrays are per example `(N,)`: right or not, or averages of that over epsilons."""

    model: ModelIdentity
    clean: NDArray[Any]
    """Without an attack."""
    entries: Mapping[str, NDArray[Any]]
    """On the images of a source, by the source's key."""
    files: Mapping[str, Path]
    """Records of the entries; averages have none."""
    worst: NDArray[Any]
    """On the images of all its sources."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """All transfers of one attack under one threat model on one choice of examples."""

    source: EvalSpec
    """One of the evaluations that made images."""
    epsilons: tuple[Fraction, ...]
    """One, or those that it averages over, ascending."""
    sources: Mapping[str, ModelIdentity]
    """By key."""
    entrants: Mapping[str, Entrant]
    """By the key of the target."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How a matrix is shown."""

    matrix: Matrix
    sources: Sequence[str]
    """Keys of the columns, in order."""
    names: Mapping[str, str]
    """By the keys of models."""
    results: Results


def transfer(results: Results) -> list[Table]:
    """Return a table for every matrix, and one for every attack that was run at several epsilons, in order of name."""
    by_attack: dict[str, dict[Fraction, list[StoredTransfer]]] = defaultdict(lambda: defaultdict(list))
    for stored in results.transfers:
        source = stored.record.spec.source
        facts = source.model_dump(mode="json", exclude={"model", "threat"})
        by_attack[canonical_hash([facts, source.threat.norm])][source.threat.epsilon].append(stored)
    titles = attack_titles(stored.record.spec.source for stored in results.transfers)
    tables = []
    for key, by_epsilon in by_attack.items():
        matrices = [matrix_of(by_epsilon[epsilon], results) for epsilon in sorted(by_epsilon)]
        if len(matrices) > 1:
            matrices.append(average(matrices))
        tables += [(key, table_of(matrix, titles, results)) for matrix in matrices if matrix.entrants]
    names = [table.name for _, table in tables]
    # Data and attacks that share a name and differ in content must not share a file.
    tables = [(k, t if names.count(t.name) == 1 else replace(t, name=f"{t.name}-{k[:6]}")) for k, t in tables]
    return sorted((table for _, table in tables), key=lambda table: natural(table.name))


def model_key(model: ModelIdentity) -> str:
    """Return what makes two models the same row or column."""
    return canonical_hash(model.model_dump(mode="json"))


def matrix_of(group: Sequence[StoredTransfer], results: Results) -> Matrix:
    """Return the matrix of transfers that differ in source and target alone; raise UnsafeFile for other examples."""
    by_target: dict[str, dict[str, StoredTransfer]] = defaultdict(dict)
    for stored in sorted(group, key=lambda s: s.path):
        spec = stored.record.spec
        by_target[model_key(spec.target)][model_key(spec.source.model)] = stored
    first = group[0].record
    ids, entrants = results.outcomes(first)["example_id"], {}
    for target, answers in by_target.items():
        rows = {source: results.outcomes(stored.record) for source, stored in answers.items()}
        for source, own in rows.items():
            if not np.array_equal(own["example_id"], ids):
                raise UnsafeFile(
                    f"{answers[source].path} and {group[0].path} name the same examples, but their outcomes hold "
                    "different ones; delete both and run robench transfer again"
                )
        entries = {source: own["robust"] for source, own in rows.items()}
        entrants[target] = Entrant(
            model=next(iter(answers.values())).record.spec.target,
            clean=next(iter(rows.values()))["attacked"],
            entries=entries,
            files={source: stored.path for source, stored in answers.items()},
            worst=np.all(list(entries.values()), axis=0),
        )
    sources = {model_key(s.record.spec.source.model): s.record.spec.source.model for s in group}
    return Matrix(first.spec.source, (first.spec.source.threat.epsilon,), sources, entrants)


def average(matrices: Sequence[Matrix]) -> Matrix:
    """Return the area under each entry's curve over epsilon, over its width; only of what every matrix has.

    From 0, where an entry is the clean accuracy, to the largest epsilon, by trapezoids.
    """
    epsilons = tuple(epsilon for matrix in matrices for epsilon in matrix.epsilons)
    entrants = {}
    for target, last in matrices[-1].entrants.items():
        if all(target in matrix.entrants for matrix in matrices):
            own = [matrix.entrants[target] for matrix in matrices]
            shared = [source for source in last.entries if all(source in entrant.entries for entrant in own)]
            if shared:
                entries = {s: average_over_epsilon(epsilons, last.clean, [e.entries[s] for e in own]) for s in shared}
                worst = [np.all([e.entries[s] for s in shared], axis=0) for e in own]
                entrants[target] = Entrant(
                    last.model, last.clean, entries, {}, average_over_epsilon(epsilons, last.clean, worst)
                )
    present = {source for entrant in entrants.values() for source in entrant.entries}
    sources = {key: model for key, model in matrices[-1].sources.items() if key in present}
    return Matrix(matrices[-1].source, epsilons, sources, entrants)


def average_over_epsilon(
    epsilons: Sequence[Fraction], clean: NDArray[np.bool_], right: Sequence[NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Return per example the mean over epsilon of being right, linear between the epsilons."""
    places = [0.0, *map(float, epsilons)]
    heights = [clean.astype(np.float64), *(mask.astype(np.float64) for mask in right)]
    strips = zip(places, places[1:], heights, heights[1:], strict=False)
    area = sum((end - begin) * (low + high) / 2 for begin, end, low, high in strips)
    found: NDArray[np.float64] = np.asarray(area) / places[-1]
    return found


def table_of(matrix: Matrix, titles: Mapping[str, str], results: Results) -> Table:
    """Return a matrix as a table with its heat map."""
    names = _names([*(e.model for e in matrix.entrants.values()), *matrix.sources.values()])
    place = {key: (-float(e.worst.mean()), natural(names[key])) for key, e in matrix.entrants.items()}
    complete = [key for key, entrant in matrix.entrants.items() if set(entrant.entries) == set(matrix.sources)]
    ranked = sorted(complete, key=lambda key: place[key])
    others = sorted(set(matrix.entrants) - set(ranked), key=lambda key: natural(names[key]))
    ranks = competition_ranks(float(matrix.entrants[key].worst.mean()) for key in ranked)
    order = [*ranked, *others]
    # Columns in the order of the rows, so that the white-box entries are the diagonal.
    sources = [key for key in order if key in matrix.sources]
    sources += sorted(set(matrix.sources) - set(sources), key=lambda key: natural(names[key]))
    layout = Layout(matrix, sources, names, results)
    spec, title = matrix.source, titles[attack_key(matrix.source)]
    threat, detail = _described_threat(matrix)
    shown = f"{spec.examples.count:,} of the {spec.examples.split_size:,} {spec.examples.split} images"
    return Table(
        name=_table_name(matrix),
        title=f"{spec.examples.dataset}, transfer under {threat}",
        caption=f"{shown}, {title}{detail}",
        columns=_columns([names[key] for key in sources]),
        rows=(
            *(_row(layout, key, rank=rank) for key, rank in zip(ranked, ranks, strict=True)),
            *(_row(layout, key, rank=None) for key in others),
        ),
        ranked_by="worst_case",
        figures=(_heat_map(layout, order),),
        reading=_READING,
    )


def _names(models: Iterable[ModelIdentity]) -> dict[str, str]:
    """Return what each model is called; those that share a name say their weights."""
    by_key = {model_key(model): model for model in models}
    ids = [model.id for model in by_key.values()]
    return {
        key: model.id if ids.count(model.id) == 1 else f"{model.id} (weights {model.weights_sha256[:8]})"
        for key, model in by_key.items()
    }


def _described_threat(matrix: Matrix) -> tuple[str, str]:
    """Return the threat model for the title, and what the caption adds."""
    if len(matrix.epsilons) == 1:
        return str(matrix.source.threat), ""
    shown = ", ".join(epsilon_text(epsilon) for epsilon in matrix.epsilons)
    norm, last = matrix.source.threat.norm, epsilon_text(matrix.epsilons[-1])
    return f"{norm}, average up to {last}", f", averaged over epsilon from 0 to {last} (measured at {shown})"


def _table_name(matrix: Matrix) -> str:
    """Return `transfer-mnist-linf-0.3-pgd`; the split and the count follow where not all test images."""
    spec = matrix.source
    radius = epsilon_text(matrix.epsilons[-1]).replace("/", "-")
    parts = ["transfer", file_name(spec.examples.dataset), spec.threat.norm.lower()]
    parts += [radius, spec.attack.entry] if len(matrix.epsilons) == 1 else ["average", radius, spec.attack.entry]
    parts += [spec.examples.split] if spec.examples.split != "test" else []
    parts += [str(spec.examples.count)] if spec.examples.count != spec.examples.split_size else []
    return "-".join(parts)


def _columns(sources: Sequence[str]) -> tuple[Column, ...]:
    return (
        Column(key="rank", title="#", role="rank", description="By worst case; equals share the better rank."),
        Column(key="model", title="Model", role="model", description="The model that classifies."),
        Column(
            key="worst_case",
            title="Worst case",
            role="accuracy",
            description="Images correct whatever source they were made on, decided image by image.",
        ),
        Column(key="clean", title="Clean", role="accuracy", description="Images correct without an attack."),
        *(
            Column(key=f"on {name}", title=f"On {name}", role="accuracy", description=f"Images made on {name}.")
            for name in sources
        ),
    )


def _row(layout: Layout, target: str, *, rank: int | None) -> tuple[Cell, ...]:
    entrant, of = layout.matrix.entrants[target], len(layout.sources)
    missing = [layout.names[source] for source in layout.sources if source not in entrant.entries]
    card, note = described_by(entrant.model, layout.results, namesakes=1)
    return (
        Cell(value=rank, note=f"not ranked: without the images of {', '.join(missing)}" if missing else None),
        Cell(value=layout.names[target], model=entrant.model.id if card else None, note=note),
        _cell(entrant.worst, note=f"over {len(entrant.entries)} of {of} sources" if missing else None),
        _cell(entrant.clean),
        *(_entry(layout, target, source) for source in layout.sources),
    )


def _entry(layout: Layout, target: str, source: str) -> Cell:
    entrant = layout.matrix.entrants[target]
    if source not in entrant.entries:
        return Cell(note="not evaluated")
    note = "white-box" if source == target else None
    if _are_twins(entrant.model, layout.matrix.sources[source], layout.results):
        note = "retrained: the same recipe, another seed"
    return replace(_cell(entrant.entries[source], note=note), record=entrant.files.get(source))


def _cell(right: NDArray[Any], *, note: str | None = None) -> Cell:
    """Return the cell of a share, or of an average of shares with the normal interval of its mean."""
    if right.dtype == np.bool_:
        return share_cell(right, note=note)
    mean, low, high = mean_interval(right)
    return Cell(value=mean, low=max(0.0, low), high=min(1.0, high), n=len(right), note=note)


def _are_twins(one: ModelIdentity, other: ModelIdentity, results: Results) -> bool:
    """Tell whether two models were trained alike but for the seed: the diagonal of a matrix without white boxes."""
    cards = [described_by(model, results, namesakes=1)[0] for model in (one, other)]
    recipes = [card.card.recipe for card in cards if card and card.card.recipe]
    if len(recipes) < 2 or one.weights_sha256 == other.weights_sha256:
        return False
    return {**recipes[0], "seed": None} == {**recipes[1], "seed": None}


def _heat_map(layout: Layout, targets: Sequence[str]) -> Grid:
    entrants, names = layout.matrix.entrants, layout.names
    return Grid(
        name="heat-map",
        title="Heat map",
        caption="Accuracy of the row's model on images that were made on the column's; outlined where both are one",
        corner=("accuracy of",),
        rows=tuple((names[target],) for target in targets),
        columns=("clean", *(names[source] for source in layout.sources)),
        cells=tuple(
            (_cell(entrants[target].clean), *(_entry(layout, target, source) for source in layout.sources))
            for target in targets
        ),
        heat=True,
    )


ENTRY = LeaderboardEntry(
    name="transfer",
    build=transfer,
    summary="Models ranked by how they do on images that were made to fool the others, and themselves.",
    source="Roth et al., Structured Gradient Regularization, arXiv:1805.08736, appendix 7.3",
)

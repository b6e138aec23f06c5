"""Which model withstands all attacks together: one table per data set, examples and threat model.

Rows are models, ranked by the worst case: the share of images that are classified correctly after *every*
attack, decided image by image. No single attack's accuracy is lower. It is what an adversary achieves who
picks the best attack for each image (the ensemble of Croce and Hein, arXiv:2003.01690, section 5).

A worst case over fewer attacks is an easier one. So a model that lacks an attack which another model of the
table has gets no rank, and a note that names the attack. Evaluations that failed, or were stopped before they
were complete, never count; they are listed.

Sequential evaluations, which stop when they know enough, have tables of their own, one for each width and seed. With
one seed all attacks draw the examples in the same order, so what all of them have is what the shortest has; the worst
case is taken over that, with the interval that holds at any stopping.

Noise without a bound (lrc-noise) is no adversary of the ball's: it has tables of its own, by its scale.

A worst case is no better than its attacks: the flags of the records' diagnostics stand beside it.

Ranks say more than the images can bear where models are alike. So all ranked models are compared pair by pair, on the
same images, by exact McNemar tests with Holm's correction for the number of pairs: models that no test takes apart
share a group, and every rank has the best and the worst one that the tests allow beside it.

What was measured with weights that a model no longer has, or with an attack whose version has gone up since, does not
count; it is the table's history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.catalog import LeaderboardEntry
from robench.confidence_sequences import bounds
from robench.errors import UnsafeFile
from robench.findings import CROSS_ENTROPY_ALONE, loss_of
from robench.planning import is_bounded
from robench.records import Decision, Diagnostic, EvalRecord, EvalSpec, ModelCard, ModelIdentity, canonical_hash
from robench.statistics import exceeds, groups_of, possible_ranks, separated, wilson
from robench.store import Results, StoredCard, StoredRecord, file_name
from robench.tables import (
    Cell,
    Column,
    Comparison,
    Curve,
    Curves,
    Grid,
    Table,
    competition_ranks,
    natural,
    proportion_cell,
)
from robench.threat_model import epsilon_text

#: The diagnostics that follow from a record's rows; all others need a look at the model.
FROM_ROWS = frozenset({"eight-bit"})

_UNKNOWN = Cell(note="not every attack of the table was run")

_READING = (
    "Worst case counts an image only if the model is right after every attack of the table, decided image by image. "
    "It is never above the strongest single attack: attacks fool different images, and an adversary may pick the best "
    "one for each.",
    "Reliability names what gave an evaluation away as too weak: gradients that are zero, a loss that does not rise, "
    "longer or gradient-free attacks that still break more. A flag goes where another attack of the same model passes "
    "the check. Looked at is a sample of the images, so a model without flags is not proven sound. An attack on the "
    "cross-entropy alone is called far above the worst case where that is lower by significantly more than two points.",
    "A model that was not put through all attacks of the table has no rank, because fewer attacks make an easier test.",
)
_READING_GROUPS = (
    "Groups say which differences are real. Every two ranked models are compared on the same images by an exact "
    "McNemar test, and Holm's procedure keeps the chance of even one wrong separation in the table at 5 %. Models that "
    "share a letter could not be taken apart; the small numbers below a rank are the best and the worst rank that the "
    "tests allow. More images would take more models apart."
)


@dataclass(frozen=True, eq=False)
class Contestant:
    """A model with its answers in one table."""

    answers: Mapping[str, StoredRecord]
    """Complete ones, by the key of their attack."""
    unfinished: Mapping[str, StoredRecord]
    """Failed or partial ones."""
    card: StoredCard | None
    """Only if it describes these weights."""
    name: str
    note: str | None
    robust: NDArray[np.bool_]
    """(N,): correct after every attack, of the examples that all answers have."""
    far_above: frozenset[str] = frozenset()
    """Keys of the attacks on the cross-entropy alone that leave far more standing than all attacks together."""

    @property
    def sequential(self) -> bool:
        """Tell whether it stopped when it knew enough, on examples of its own."""
        return next(iter(self.answers.values())).record.spec.until is not None

    @property
    def worst_case(self) -> float:
        """Return the share of examples that stand all attacks this model has been through."""
        return float(self.robust.mean())


def robustness(results: Results) -> list[Table]:
    """Return a table for every (data set, examples, threat model) that has records, in order of name."""
    groups: dict[str, list[StoredRecord]] = defaultdict(list)
    for stored in results.records:
        spec = stored.record.spec
        question: list[Any] = [spec.examples.model_dump(mode="json"), str(spec.threat)]
        question += [] if is_bounded(spec) else ["noise"]
        question += rule(spec.decision)
        question += [spec.until, spec.seed] if spec.until is not None else []
        groups[canonical_hash(question)].append(stored)
    names = [table_name(group[0].record.spec) for group in groups.values()]
    tables = []
    for (key, group), name in zip(groups.items(), names, strict=True):
        # Data that share a name and differ in content must not share a file.
        unique = name if names.count(name) == 1 else f"{name}-{key[:6]}"
        tables.append(build_table(unique, group, results))
    return sorted(tables, key=lambda table: natural(table.name))


def table_name(spec: EvalSpec) -> str:
    """Return `robustness-mnist-linf-0.3` or `noise-mnist-0.3`; split and count follow where not all test images."""
    examples = spec.examples
    radius = epsilon_text(spec.threat.epsilon).replace("/", "-")
    dataset = file_name(examples.dataset)
    parts = ["robustness", dataset, spec.threat.norm.lower()] if is_bounded(spec) else ["noise", dataset]
    parts += [radius]
    parts += [examples.split] if examples.split != "test" else []
    parts += [str(examples.count)] if examples.count != examples.split_size else []
    parts += rule(spec.decision)
    parts += [f"until-{spec.until:g}"] if spec.until is not None else []
    return "-".join(parts)


def rule(decision: Decision) -> list[str]:
    """Return what makes another classifier of the same network, or another idea of being right: `top-5`, `votes-100`.

    Its clean accuracy is another, too, so its answers stand in a table of their own. Repeats only measure the spread.
    """
    return [
        *([f"top-{decision.top_k}"] if decision.top_k > 1 else []),
        *([f"votes-{decision.votes}"] if decision.votes > 1 else []),
        *([f"sigma-{decision.sigma:g}"] if decision.sigma > 0 else []),
    ]


def _rule_in_words(decision: Decision) -> str:
    """Return the same for a reader, after a comma; nothing where one pass and the largest logit decide."""
    told = [f"right where the label is among the {decision.top_k} largest logits"] if decision.top_k > 1 else []
    if decision.votes > 1 or decision.sigma > 0:
        noise = f" under noise of {decision.sigma:g}" if decision.sigma > 0 else ""
        told.append(f"decided by {decision.votes} vote{'s' if decision.votes > 1 else ''}{noise}")
    return "".join(f"; {part}" for part in told)


def build_table(name: str, group: list[StoredRecord], results: Results) -> Table:
    """Return the table of records that share examples and threat model."""
    group, former = current_and_former(group, results)
    # An attack that failed for every model is a column, too: without an answer to it nobody has a rank.
    attacks = attack_titles(s.record.spec for s in group)
    contestants = sorted(contestants_of(group, results), key=lambda c: (-c.worst_case, natural(c.name)))
    ranked = [c for c in contestants if len(c.answers) == len(attacks)]
    others = sorted((c for c in contestants if c not in ranked), key=lambda c: natural(c.name))
    ranks = competition_ranks(c.worst_case for c in ranked)
    spec = group[0].record.spec
    grouped = spec.until is None
    places = standings([c.robust for c in ranked]) if grouped else []
    everybody = [*ranked, *others]
    figures: list[Grid | Curves] = (
        [contributions(everybody, attacks, results)] if len(attacks) > 1 and contestants else []
    )
    figures += over_decay_length(everybody, attacks)
    figures += [history(former, group)] if former else []
    radius = epsilon_text(spec.threat.epsilon)
    shown = f"{spec.examples.count:,} of the {spec.examples.split_size:,} {spec.examples.split} images"
    if spec.until is not None:
        shown = f"Drawn from {shown} until a 95 % interval is no wider than {100 * spec.until:g} %"
    under = str(spec.threat) if is_bounded(spec) else f"noise of scale {radius}"
    changed = (
        f"changed by at most {radius} in {spec.threat.norm} norm" if is_bounded(spec) else f"with {under}, unbounded"
    )
    return Table(
        name=name,
        title=", ".join(
            [f"{spec.examples.dataset} under {under}"]
            + [part.replace("-", " ") for part in rule(spec.decision)]
            + (["sequential"] if spec.until is not None else [])
        ),
        caption=f"{shown}, each {changed}{_rule_in_words(spec.decision)}",
        columns=columns(attacks, grouped=grouped),
        rows=tuple(
            row(c, attacks, rank=rank, standing=standing) for c, rank, standing in zip_longest(everybody, ranks, places)
        ),
        ranked_by="worst_case",
        remarks=tuple(remark(s.record) for s in group if s.record.status != "complete"),
        warnings=tuple(f"{c.name}: {told}" for c in everybody for told in warnings(c)),
        figures=tuple(figures),
        reading=(*_READING, _READING_GROUPS) if grouped else _READING,
        comparison=comparison(everybody, attacks, results) if grouped and len(everybody) > 1 else None,
    )


def current_and_former(
    group: Iterable[StoredRecord], results: Results
) -> tuple[list[StoredRecord], list[StoredRecord]]:
    """Return the records that count, and those that later weights or versions have superseded.

    Weights are former where the model's card describes others that were evaluated here, too; an attack is where a
    complete record of a later version of it, or of its library, is in the table.
    """
    group = list(group)
    evaluated = {(s.record.spec.model.id, s.record.spec.model.weights_sha256) for s in group}
    described = {name: card.card.weights.sha256 for name, card in results.cards.items()}
    latest: dict[str, tuple[Any, ...]] = {}
    for stored in group:
        if stored.record.status == "complete":
            key = lasting_key(stored.record.spec)
            latest[key] = max(latest.get(key, ()), _version(stored.record.spec))
    counting: list[StoredRecord] = []
    former: list[StoredRecord] = []
    for stored in group:
        spec = stored.record.spec
        weights = described.get(spec.model.id, spec.model.weights_sha256)
        outdated = spec.model.weights_sha256 != weights and (spec.model.id, weights) in evaluated
        outdated |= _version(spec) < latest.get(lasting_key(spec), ())
        (former if outdated else counting).append(stored)
    return counting, former


def lasting_key(spec: EvalSpec) -> str:
    """Return what a search keeps when its code gets a new version."""
    return canonical_hash({**_search(spec), "version": None, "backend": spec.attack.library})


def _version(spec: EvalSpec) -> tuple[Any, ...]:
    return spec.attack.version, natural(spec.attack.backend)


def standings(robust: Sequence[NDArray[np.bool_]]) -> list[tuple[str, tuple[int, int]]]:
    """Return for each model, the best first, the letters of its groups and the ranks that the tests allow."""
    if not robust:
        return []
    right = np.stack(robust)
    apart = separated(right)
    letters = [" ".join(_letter(number) for number in own) for own in groups_of(apart)]
    return list(zip(letters, possible_ranks(right, apart), strict=True))


def _letter(number: int) -> str:
    """Return A, B, ..., Z, AA, AB, ..."""
    above, own = divmod(number, 26)
    return (_letter(above - 1) if above else "") + chr(ord("A") + own)


def comparison(contestants: Sequence[Contestant], attacks: Mapping[str, str], results: Results) -> Comparison:
    """Return which images each model gets right, without an attack and after all of them."""
    records = [next(iter(c.answers.values())).record for c in contestants]
    rows = results.outcomes(records[0])
    for record in records[1:]:
        if not np.array_equal(results.outcomes(record)["example_id"], rows["example_id"]):
            raise UnsafeFile(
                f"records {records[0].spec.identity} and {record.spec.identity} name the same examples, but their "
                f"outcomes hold different ones; delete both and evaluate {records[0].spec.model.id} and "
                f"{record.spec.model.id} again"
            )
    names = [c.name for c in contestants]
    labels = [
        name if names.count(name) == 1 else f"{name} ({c.note})" for name, c in zip(names, contestants, strict=True)
    ]
    return Comparison(
        examples=records[0].spec.examples,
        ids=rows["example_id"].astype("<u4").tobytes(),
        labels=rows["label"].astype("<u2").tobytes(),
        models=tuple(labels),
        clean=tuple(_bits(results.outcomes(record)["attacked"]) for record in records),
        standing=tuple(_bits(c.robust) for c in contestants),
        attacks=tuple(attacks.values()),
    )


def _bits(mask: NDArray[np.bool_]) -> bytes:
    return np.packbits(mask, bitorder="little").tobytes()


def history(former: Sequence[StoredRecord], current: Sequence[StoredRecord]) -> Grid:
    """Return what was answered before, each beside what is answered now, where the same was asked again."""

    def asked(stored: StoredRecord) -> tuple[str, str]:
        return stored.record.spec.model.id, lasting_key(stored.record.spec)

    again = {asked(stored) for stored in former}
    shown = [(s, "counts") for s in current if asked(s) in again] + [(s, "former") for s in former]
    order = sorted(
        ((s, state) for s, state in shown if s.record.status == "complete"),
        key=lambda item: (
            natural(item[0].record.spec.model.id),
            natural(item[0].record.spec.attack.title),
            item[0].record.provenance.finished,
            item[0].path,
        ),
    )
    rows, cells = [], []
    for stored, state in order:
        spec, record = stored.record.spec, stored.record
        version = (
            spec.attack.version if spec.attack.backend == "native" else f"{spec.attack.version}, {spec.attack.backend}"
        )
        rows.append(
            (
                spec.model.id,
                spec.attack.title,
                spec.model.weights_sha256[:8],
                str(version),
                record.provenance.finished[:10],
                state,
            )
        )
        cells.append(tuple(proportion_cell(p, record=stored.path) for p in (record.clean, record.robust)))
    return Grid(
        name="history",
        title="History",
        caption="Answers that later weights or a later version of the attack have superseded, and what counts now",
        corner=("Model", "Attack", "Weights", "Version", "Answered", "State"),
        rows=tuple(rows),
        columns=("clean", "robust"),
        cells=tuple(cells),
    )


def contestants_of(group: Iterable[StoredRecord], results: Results) -> list[Contestant]:
    """Return the models that have at least one complete record."""
    by_model: dict[str, list[StoredRecord]] = defaultdict(list)
    for stored in group:
        by_model[canonical_hash(stored.record.spec.model.model_dump(mode="json"))].append(stored)
    ids = [records[0].record.spec.model.id for records in by_model.values()]
    found = []
    for records in by_model.values():
        answers = {attack_key(s.record.spec): s for s in records if s.record.status == "complete"}
        if not answers:
            continue
        model = records[0].record.spec.model
        described, note = described_by(model, results, namesakes=ids.count(model.id))
        unfinished = {attack_key(s.record.spec): s for s in records if s.record.status != "complete"}
        robust = intersection([s.record for s in answers.values()], results)
        far = _far_above(answers, robust, results)
        found.append(Contestant(answers, unfinished, described, model.id, note, robust, far))
    return found


def _far_above(answers: Mapping[str, StoredRecord], worst: NDArray[np.bool_], results: Results) -> frozenset[str]:
    """Return which attacks on the cross-entropy are far above the worst case, as the diagnostic of that name has it.

    An evaluation's own diagnostic knows the attacks that were there before it; a table knows all.
    """
    followers = {key: s.record for key, s in answers.items() if loss_of(s.record.spec) == "ce"}
    common = common_examples([s.record for s in answers.values()], results)
    far = set()
    for key, record in followers.items():
        rows = results.outcomes(record)
        more = rows["robust"][np.isin(rows["example_id"], common)] & ~worst
        if exceeds(int(more.sum()), len(worst), CROSS_ENTROPY_ALONE):
            far.add(key)
    return frozenset(far)


def described_by(model: ModelIdentity, results: Results, *, namesakes: int) -> tuple[StoredCard | None, str | None]:
    """Return the card that describes these weights, and what a reader must know beside the model's name.

    `namesakes` is how many different models of the table have that name.
    """
    card = results.cards.get(model.id)
    described = card if card and card.card.weights.sha256 == model.weights_sha256 else None
    notes = [described.card.scale] if described and described.card.scale else []
    if namesakes > 1 or (card and not described):
        notes.append(f"weights {model.weights_sha256[:8]}")
    return described, "; ".join(notes) or None


def intersection(records: list[EvalRecord], results: Results) -> NDArray[np.bool_]:
    """Return which examples stand every attack, of those that all records have.

    Raises UnsafeFile if the rows are of different examples; sequential ones may be the beginnings of one drawing.
    """
    rows = [results.outcomes(record) for record in records]
    common = common_examples(records, results)
    stands = np.ones(len(common), dtype=np.bool_)
    for record, own in zip(records, rows, strict=True):
        shared = np.isin(own["example_id"], common)
        whole = record.sequence is not None or shared.all()
        if not (whole and np.array_equal(own["example_id"][shared], common)):
            raise UnsafeFile(
                f"records {records[0].spec.identity} and {record.spec.identity} name the same examples, but "
                f"their outcomes hold different ones; delete both and evaluate {record.spec.model.id} again"
            )
        stands &= own["robust"][shared]
    return stands


def common_examples(records: Iterable[EvalRecord], results: Results) -> NDArray[np.int64]:
    """Return the examples that all records have: those of the shortest, where they stopped early."""
    return min((results.outcomes(record)["example_id"] for record in records), key=len)


def worst_case_interval(robust: NDArray[np.bool_], record: EvalRecord) -> tuple[float, float]:
    """Return the 95 % interval of the worst case: of a sequential evaluation the one that holds at any stopping."""
    successes, n = int(robust.sum()), len(robust)
    if record.sequence is None:
        return wilson(successes, n)
    low, high = bounds(successes, n, record.sequence.of)
    return low / record.sequence.of, high / record.sequence.of


def contributions(contestants: Sequence[Contestant], attacks: Mapping[str, str], results: Results) -> Grid:
    """Return which share of the images each attack breaks: in all, as the first one, and as the only one.

    The first one is the cheapest that breaks the image: attacks stand in the order of their passes on this table.
    """
    order = sorted(attacks, key=lambda key: (_passes(key, contestants), natural(attacks[key])))
    rows, cells = [], []
    for contestant in contestants:
        own = [key for key in order if key in contestant.answers]
        common = common_examples((s.record for s in contestant.answers.values()), results)
        broken = [fallen(contestant.answers[key].record, common, results) for key in own]
        first, times = first_breaker(broken), np.sum(broken, axis=0)
        for position, key in enumerate(own):
            rows.append((contestant.name, attacks[key]))
            alone = share_cell(broken[position] & (times == 1)) if len(own) == len(order) else _UNKNOWN
            cells.append((share_cell(broken[position]), share_cell(first == position), alone))
    return Grid(
        name="contributions",
        title="Which attack breaks what",
        caption=(
            "Share of all images that an attack breaks; that it is the first to break, the cheapest attack being tried "
            "first; and that no other attack of the table breaks"
        ),
        corner=("Model", "Attack"),
        rows=tuple(rows),
        columns=("breaks", "first", "alone"),
        cells=tuple(cells),
    )


def over_decay_length(contestants: Sequence[Contestant], attacks: Mapping[str, str]) -> list[Curves]:
    """Return accuracy over the decay length of correlated noise, where there is noise of several lengths.

    That is figure 3 of Roth et al., arXiv:1805.08736.
    """
    drawn = []
    for contestant in contestants:
        points = sorted(
            (float(s.record.spec.attack.parameters["decay_length"]), s.record.robust.value)
            for key, s in contestant.answers.items()
            if key in attacks and s.record.spec.attack.parameters.get("decay_length") is not None
        )
        if len(dict(points)) == len(points) > 1:
            title = contestant.name if contestant.card else " ".join(filter(None, (contestant.name, contestant.note)))
            x, y = zip(*points, strict=True)
            drawn.append(Curve(title=title, x=x, y=y, n=len(contestant.robust)))
    if not drawn:
        return []
    return [
        Curves(
            name="decay-length",
            title="Accuracy over decay length",
            caption="Share of all images that are still correct after noise, by how far the noise correlates",
            x_title="decay length, pixels",
            y_title="correct, %",
            curves=tuple(drawn),
            x_end=max(curve.x[-1] for curve in drawn),
            linear=True,
        )
    ]


def fallen(record: EvalRecord, examples: NDArray[np.int64], results: Results) -> NDArray[np.bool_]:
    """Return which of the `examples` `(N,)` were right without the attack and fell to it."""
    rows = results.outcomes(record)
    found: NDArray[np.bool_] = (rows["attacked"] & ~rows["robust"])[np.isin(rows["example_id"], examples)]
    return found


def first_breaker(broken: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Return for each example `(N,)` the position of the first attack that breaks it, -1 where none does."""
    table = np.stack(broken)
    return np.where(table.any(0), table.argmax(0), -1)


def share_cell(hits: NDArray[np.bool_], *, note: str | None = None) -> Cell:
    """Return the cell of a share of examples."""
    low, high = wilson(int(hits.sum()), len(hits))
    return Cell(value=float(hits.mean()), low=low, high=high, n=len(hits), note=note)


def _passes(key: str, contestants: Iterable[Contestant]) -> float:
    """Return what an attack took per image, on average over the models that have been through it."""
    costs = [passes_per_example(c.answers[key].record) for c in contestants if key in c.answers]
    return sum(costs) / max(1, len(costs))


def attack_key(spec: EvalSpec) -> str:
    """Return what makes two searches the same column: all that can change the answer."""
    return canonical_hash(_search(spec))


def _search(spec: EvalSpec) -> dict[str, Any]:
    """Return the facts of a search by name; what the attack is called comes first."""
    return {
        "title": spec.attack.title,
        **spec.attack.model_dump(mode="json", exclude={"parameters"}),
        **spec.attack.parameters,
        "seed": spec.seed,
        "precision": spec.precision,
        **{f"decision {name}": value for name, value in spec.decision.model_dump(mode="json").items()},
        "until": spec.until,
    }


def attack_titles(specs: Iterable[EvalSpec]) -> dict[str, str]:
    """Return each attack's title by its key, in order of title; those that share a name say what differs."""
    facts = {attack_key(spec): _search(spec) for spec in specs}
    titles = {}
    for key, own in facts.items():
        namesakes = [other for other in facts.values() if other["title"] == own["title"]]
        names = dict.fromkeys(name for other in namesakes for name in other)
        differing = [f for f in names if any(other.get(f) != own.get(f) for other in namesakes)]
        details = ", ".join(f"{f}={own.get(f)}" for f in differing)
        titles[key] = f"{own['title']} ({details})" if details else own["title"]
    return dict(sorted(titles.items(), key=lambda item: natural(item[1])))


def columns(attacks: Mapping[str, str], *, grouped: bool) -> tuple[Column, ...]:
    """Return the columns for these attacks; models are `grouped` where they were shown the same examples."""
    group = Column(
        key="group", title="Group", role="label", description="Models that share a letter: no test takes them apart."
    )
    return (
        Column(key="rank", title="#", role="rank", description="By worst case; equals share the better rank."),
        Column(
            key="model",
            title="Model",
            role="model",
            description="How it was made, how to use it.",
        ),
        Column(key="architecture", title="Architecture", role="label", description="The network."),
        Column(key="trained_against", title="Trained against", role="label", description="The adversary it saw."),
        Column(
            key="worst_case",
            title="Worst case",
            role="accuracy",
            description="Images still correct after every attack, decided image by image.",
        ),
        *((group,) if grouped else ()),
        Column(
            key="reliability",
            title="Reliability",
            role="label",
            description="Signs that the attacks were too weak for this model, on a sample of the images.",
        ),
        Column(key="clean", title="Clean", role="accuracy", description="Images correct without an attack."),
        *(
            Column(key=title, title=title, role="accuracy", description=f"Images still correct after {title}.")
            for title in attacks.values()
        ),
        Column(
            key="fooled_most_by", title="Fooled most by", role="label", description="The strongest attack, if one is."
        ),
        Column(key="parameters", title="Parameters", role="amount", description="Numbers in the network."),
        Column(key="training_seconds", title="Training", role="amount", unit="s", description="Wall time."),
        Column(
            key="passes",
            title="Passes",
            role="amount",
            description="Forward and backward passes per image, all attacks together.",
        ),
        Column(
            key="evaluation_seconds",
            title="Evaluation",
            role="amount",
            unit="s",
            description="Wall time, all attacks together.",
        ),
    )


def row(
    contestant: Contestant,
    attacks: Mapping[str, str],
    *,
    rank: int | None,
    standing: tuple[str, tuple[int, int]] | None,
) -> tuple[Cell, ...]:
    """Return a model's cells, in the order of :func:`columns`; `standing` are its groups and possible ranks."""
    grouped = not contestant.sequential
    letters, (best, worst) = standing or (None, (None, None))
    own = {key: contestant.answers[key] for key in attacks if key in contestant.answers}
    missing = [title for key, title in attacks.items() if key not in own]
    first = next(iter(own.values()))
    fewest = min(stored.record.robust.successes for stored in own.values())
    strongest = [attacks[key] for key, stored in own.items() if stored.record.robust.successes == fewest]
    n, card = len(contestant.robust), contestant.card.card if contestant.card else None
    low, high = worst_case_interval(contestant.robust, first.record)
    costs = [stored.record.cost for stored in own.values()]
    top5 = first.record.clean_top5
    return (
        Cell(value=rank, low=best, high=worst, note=f"not ranked: without {', '.join(missing)}" if missing else None),
        Cell(value=contestant.name, model=contestant.name if card else None, note=contestant.note),
        Cell(value=first.record.spec.model.architecture.name),
        Cell(value=trained_against(card)),
        Cell(
            value=contestant.worst_case,
            low=low,
            high=high,
            n=n,
            note=f"over {len(own)} of {len(attacks)} attacks" if missing else None,
        ),
        *((Cell(value=letters),) if grouped else ()),
        reliability_cell(contestant),
        proportion_cell(
            first.record.clean,
            record=first.path,
            note=f"top-5 {top5.value:.2%}" if top5 is not None else None,
        ),
        *(attack_cell(contestant, key) for key in attacks),
        Cell(value=strongest[0] if len(strongest) == 1 else f"{len(strongest)} attacks alike"),
        Cell(value=card.parameter_count if card else None),
        Cell(value=card.training_seconds if card else None),
        Cell(value=sum(passes_per_example(stored.record) for stored in own.values())),
        Cell(value=sum(cost.seconds for cost in costs)),
    )


def flags(contestant: Contestant) -> list[Diagnostic]:
    """Return the flags that no attack on this model has cleared, as raised against the strongest attack.

    A flag says of one attack that it was too weak. Where another one of the model's attacks passed the same check, or
    they broke together what was found missing, the worst case does not suffer from it.
    """
    strongest_first = sorted(contestant.answers.values(), key=lambda s: (s.record.robust.successes, s.path))
    made = [d for stored in strongest_first for d in stored.record.diagnostics if not _made_good(d, contestant)]
    passed = {d.name for d in made if d.verdict == "ok"}
    raised = {d.name: d for d in reversed(made) if d.verdict == "flag" and d.name not in passed}
    return [raised[name] for name in dict.fromkeys(d.name for d in made) if name in raised]


def _made_good(flag: Diagnostic, contestant: Contestant) -> bool:
    """Tell whether a flag of an attack far above the worst case is none of the table's, whose worst case is no better.

    What the flag says was left is of a sample, so the worst case may be above it by as much as the flag itself allows.
    """
    if flag.name != "ce-above-worst" or flag.verdict != "flag" or flag.robust_then is None:
        return False
    left = flag.robust_then
    return not exceeds(round(left.n * contestant.worst_case) - left.successes, left.n, CROSS_ENTROPY_ALONE)


def reliability_cell(contestant: Contestant) -> Cell:
    """Return the names of the flags; no value where nothing was looked at."""
    raised = flags(contestant)
    if raised:
        return Cell(value=", ".join(d.name for d in raised), warning="\n".join(warnings(contestant)))
    made = [d for stored in contestant.answers.values() for d in stored.record.diagnostics]
    looked_at = any(d.verdict == "ok" and d.name not in FROM_ROWS for d in made)
    return Cell(value="no flags") if looked_at else Cell(note="not examined")


def warnings(contestant: Contestant) -> list[str]:
    """Return one line for each flag, with what a stronger attack left."""
    return [
        f"{d.name}: {d.evidence}"
        + (f" ({d.robust_then.successes} of {d.robust_then.n} still stand)" if d.robust_then else "")
        for d in flags(contestant)
    ]


def attack_cell(contestant: Contestant, key: str) -> Cell:
    """Return the accuracy under one attack, or why there is none."""
    if key in contestant.answers:
        answer = contestant.answers[key]
        notes = ["far above the worst case"] if key in contestant.far_above else []
        if answer.record.sequence is None:
            return proportion_cell(answer.record.robust, record=answer.path, note="; ".join(notes) or None)
        share, sequence = answer.record.robust, answer.record.sequence
        note = "; ".join([f"{share.n:,} of {sequence.of:,}, sequential", *notes])
        return Cell(value=share.value, low=sequence.low, high=sequence.high, n=share.n, record=answer.path, note=note)
    if key not in contestant.unfinished:
        return Cell(note="not evaluated")
    record = contestant.unfinished[key].record
    return Cell(note="failed" if record.status == "failed" else f"stopped at {record.robust.n:,}")


def passes_per_example(record: EvalRecord) -> float:
    """Return the mean number of forward and backward passes of an evaluation's examples."""
    return (record.cost.forward_passes + record.cost.backward_passes) / record.robust.n


def trained_against(card: ModelCard | None) -> str | None:
    """Return the training's threat model, "nothing" for standard training, None where it is unknown."""
    if card is None or (card.threat is None and card.recipe is None):
        return None
    return str(card.threat) if card.threat else "nothing"


def remark(record: EvalRecord) -> str:
    """Return one line on an evaluation that failed or was stopped."""
    question = f"{record.spec.model.id} under {record.spec.attack.title}"
    if record.status == "partial":
        answered = f"{record.robust.n:,} of {record.spec.examples.count:,} images"
        return f"{question} was stopped after {answered} and does not count: asked again, it goes on from there"
    reasons = [f"{e.kind} in {e.count} examples from {e.first_id} on: {e.message}" for e in record.errors[:1]]
    more = f" (and {len(record.errors) - 1} more)" if len(record.errors) > 1 else ""
    return f"{question} failed and does not count: {''.join(reasons) or 'no reason recorded'}{more}"


ENTRY = LeaderboardEntry(
    name="robustness",
    build=robustness,
    summary="Models ranked by worst case over the attacks, example by example.",
    source="Croce and Hein, Reliable evaluation of adversarial robustness, arXiv:2003.01690, section 5",
)

"""The table of verdicts: each number of the baseline against the same question's new answer.

Two gates share it. The *model* gate asks whether new weights are worse: less accuracy or shorter distances fail. The
*engine* gate asks whether robench itself changed: on frozen weights robust accuracy and distances must not rise (a
weaker attack), clean accuracy and certificates must not move; what rounding explains does not count.

A number is worse, or better, where the answers to the same examples differ by more than chance, all metrics of the run
taken together, *and* by more than the tolerance. An answer that is not there, or is one to another question, fails: a
gate that passes on nothing guards nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robench.errors import UserError
from robench.gate.baseline import (
    Answer,
    Answered,
    Baseline,
    Entry,
    Question,
    answered_by,
    conditions_text,
    load,
    question_text,
)
from robench.gate.metrics import Metric, Subject, Summary, worst_case
from robench.gate.paired_tests import beyond_rounding, change_interval, holm, mcnemar, signed_rank
from robench.records import CertificateRecord, EvalRecord, EvalSpec, ModelIdentity
from robench.registry import find_card, identity_of, is_reference
from robench.store import Store, file_name
from robench.workspace import Workspace

Kind = Literal["better", "same", "worse", "not comparable", "missing", "damaged"]
Gate = Literal["model", "engine"]

#: What lets the gate pass.
PASSING: frozenset[Kind] = frozenset({"better", "same"})

#: Two lengths of the same example that differ by less, relative to the longer, are equal for the engine gate.
_LENGTH_ROUNDING = 0.01


@dataclass(frozen=True)
class Rules:
    """When a number is worse."""

    gate: Gate = "model"
    tolerance: float = 1.0
    """Points of a share, percent of a length: a change up to this is none."""
    alpha: float = 0.01
    """Probability at most of calling any metric worse or better in a run where none changed."""
    fast: bool = False
    """Examples were drawn until it was clear."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """One line of the table."""

    model: str
    question: str
    metric: str
    kind: Kind
    before: float | None = None
    now: float | None = None
    summary: Summary = "share"
    subject: Subject = "attack"
    n: int | None = None
    change: tuple[float, float] | None = None
    """95 % interval of the change of a share."""
    p: float | None = None
    """That chance alone makes such a difference, before Holm's adjustment."""
    reason: str = ""
    """What happened and what to do; empty where the numbers say it."""
    lost: NDArray[np.int64] | None = None
    """Ids of the examples that were right and are wrong now (engine gate: that stand and fell before)."""
    read_as: NDArray[np.int32] | None = None
    """The same examples' classes now, where one answer decides."""
    spec: Question | None = None
    """The new answer's question."""

    @property
    def passes(self) -> bool:
        """Tell whether the gate may pass."""
        return self.kind in PASSING


@dataclass(frozen=True)
class Check:
    """A whole check."""

    rules: Rules
    baseline: str
    verdicts: tuple[Verdict, ...]

    @property
    def passes(self) -> bool:
        """Tell whether nothing got worse, and everything is there."""
        return all(verdict.passes for verdict in self.verdicts)

    def count(self, kind: Kind) -> int:
        """Return how many verdicts are of that kind."""
        return sum(verdict.kind == kind for verdict in self.verdicts)


@dataclass(frozen=True)
class Candidates:
    """Where new answers are looked for."""

    store: Store
    workspace: Workspace
    names: Mapping[str, str]
    """The model that stands for each of the baseline's; those that are not in it are not checked."""
    identities: Mapping[str, ModelIdentity]
    """Of the models that were loaded to answer anew; the others' follow from their cards or their newest records."""
    problems: Mapping[str, str]
    """Why a model could not be asked anew."""


def check(baseline: Baseline, path: Path, candidates: Candidates, rules: Rules) -> Check:
    """Return the verdicts on all questions of a baseline that was read from `path`."""
    verdicts: list[Verdict] = []
    for name, candidate in candidates.names.items():
        entries = [entry for entry in baseline.entries if entry.model == name]
        verdicts += _of_model(entries, path.parent, candidate, candidates, rules=rules)
    return Check(rules, str(path), tuple(judged(verdicts, rules)))


def _of_model(
    entries: Sequence[Entry], folder: Path, candidate: str, candidates: Candidates, *, rules: Rules
) -> Iterator[Verdict]:
    """Yield one model's verdicts, those with numbers still to be judged."""
    if candidate in candidates.problems:
        yield Verdict(
            model=candidate, question="", metric="model", kind="damaged", reason=candidates.problems[candidate]
        )
        return
    pairs: list[tuple[Answered, Answered]] = []
    for entry in entries:
        problem = Verdict(model=candidate, question=entry.question, metric="answer", kind="damaged")
        try:
            before = load(entry, folder)
            asked = before.record.spec
            identity = asked.model if rules.gate == "engine" else _identity(candidate, candidates)
            if rules.gate == "engine":
                _same_weights(candidate, identity, candidates)
            answer = _answer(asked.model_copy(update={"model": identity}), candidates)
            if isinstance(answer, _Absent):
                yield replace(problem, kind=answer.kind, reason=answer.reason)
                continue
            now = answered_by(answer, candidates.store)
        except UserError as error:
            yield replace(problem, reason=str(error))
            continue
        pairs.append((before, now))
    yield from _compared(pairs, candidate, rules, complete=len(pairs) == len(entries))


@dataclass(frozen=True)
class _Absent:
    """Why there is no answer that counts."""

    kind: Kind
    reason: str


def _identity(model: str, candidates: Candidates) -> ModelIdentity:
    """Return the weights to check: those that were just asked, those of the card, or those of the newest record."""
    if model in candidates.identities:
        return candidates.identities[model]
    if not is_reference(model):
        return identity_of(find_card(model, candidates.workspace)[1])
    own = [r for r in _records_of(model, candidates.store) if r.spec.model.id == model]
    if not own:
        raise UserError(f"there is no record of {model} in {candidates.store.root}; robench check --measure makes them")
    return max(own, key=lambda r: r.provenance.finished).spec.model


def _same_weights(model: str, frozen: ModelIdentity, candidates: Candidates) -> None:
    if is_reference(model):
        return
    now = identity_of(find_card(model, candidates.workspace)[1])
    if now != frozen:
        raise UserError(
            f"{model} is a frozen reference, and is not what the baseline measured (weights {now.weights_sha256[:8]}, "
            f"not {frozen.weights_sha256[:8]}); restore model_zoo/{model}, or run robench baseline set"
        )


def _records_of(model: str, store: Store, kind: Literal["records", "certificates"] | None = None) -> Iterator[Answer]:
    """Yield a model's answers; raise UserError for a damaged file."""
    for folder in (kind,) if kind else ("records", "certificates"):
        of: type[Answer] = EvalRecord if folder == "records" else CertificateRecord
        for path in sorted((store.root / folder / file_name(model)).glob("*.json")):
            yield of.from_json(path.read_text("utf-8", "replace"), origin=str(path))


def _answer(asked: Question, candidates: Candidates) -> Answer | _Absent:
    """Return the complete answer to a question, or why there is none."""
    store = candidates.store
    found = store.find(asked) if isinstance(asked, EvalSpec) else store.find_certificate(asked)
    if found is not None and found.status == "complete":
        return found
    kind: Literal["records", "certificates"] = "records" if isinstance(asked, EvalSpec) else "certificates"
    same_weights = [r for r in _records_of(asked.model.id, store, kind) if r.spec.model == asked.model]
    for record in [*same_weights, *([found] if found else [])]:
        if record.spec == asked:
            return _Absent("missing", _unfinished(record))
    near = [(differences(asked, record.spec), record) for record in same_weights if _akin(asked, record.spec)]
    if near:
        differing, record = min(near, key=lambda pair: len(pair[0]))
        return _Absent("not comparable", _other_question(asked, differing, record))
    return _Absent(
        "missing",
        f"{asked.model.id} (weights {asked.model.weights_sha256[:8]}) was not asked: {question_text(asked)}; "
        "run robench check --measure",
    )


def _unfinished(record: Answer) -> str:
    if record.status == "failed":
        cause = f" ({record.errors[0].kind}: {record.errors[0].message})" if record.errors else ""
        return f"the evaluation failed{cause}; put that right and run it again"
    n = record.robust.n if isinstance(record, EvalRecord) else record.correct.n
    return f"the evaluation was stopped at {n:,} of {record.spec.examples.count:,} examples; run it again to the end"


def _akin(asked: Question, other: Question) -> bool:
    """Tell whether somebody may have meant the one question by the other."""
    if isinstance(asked, EvalSpec) and isinstance(other, EvalSpec):
        return asked.attack.entry == other.attack.entry and asked.threat == other.threat
    if isinstance(asked, EvalSpec) or isinstance(other, EvalSpec):
        return False
    return asked.certificate.entry == other.certificate.entry


def differences(asked: Question, other: Question) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two questions differ, with both values."""
    before, now = (_flat(spec.model_dump(mode="json", exclude={"model"})) for spec in (asked, other))
    return {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, own in value.items():
        found |= _flat(own, f"{prefix}{key}.") if isinstance(own, dict) else {f"{prefix}{key}": own}
    return found


def _other_question(asked: Question, differing: Mapping[str, tuple[Any, Any]], record: Answer) -> str:
    own, planned = record.spec.examples.count, asked.examples.count
    if own != planned:
        relation = "fewer" if own < planned else "more"
        return (
            f"{own:,} examples were evaluated, {relation} than the {planned:,} of the baseline; evaluate those "
            "(robench check --measure)"
        )
    told = [f"{key} is {now}, was {before}" for key, (before, now) in differing.items() if "ids_sha256" not in key]
    return (
        f"another question was asked: {'; '.join(told[:3]) or 'other examples'}; ask the baseline's "
        "(robench check --measure), or move the baseline: robench baseline set"
    )


def _compared(
    pairs: Sequence[tuple[Answered, Answered]], candidate: str, rules: Rules, *, complete: bool
) -> Iterator[Verdict]:
    """Yield the numbers side by side: clean accuracy once, each attack, the worst case, each certificate."""
    seen: set[tuple[Any, ...]] = set()
    groups: dict[tuple[Any, ...], list[tuple[Metric, Metric, EvalSpec]]] = defaultdict(list)
    for before, now in pairs:
        spec, answered = before.record.spec, now.record.spec
        for old, new in zip(before.metrics, now.metrics, strict=True):
            key: tuple[Any, ...] = (spec.examples, spec.precision, getattr(spec, "decision", None))
            if old.subject == "clean":
                if key in seen:
                    continue
                seen.add(key)
            if old.subject == "certificate" and not old.values.any() and not new.values.any():
                continue
            if old.subject == "attack" and old.summary == "share" and isinstance(answered, EvalSpec):
                groups[(*key, answered.threat)].append((old, new, answered))
            asked = conditions_text(spec) if old.subject == "clean" else question_text(spec)
            yield paired(old, new, candidate, answered, asked=asked, rules=rules)
    for (*_, threat), answers in groups.items():
        if len(answers) > 1 and complete:
            olds, news, specs = zip(*answers, strict=True)
            old, new = worst_case(threat, [*olds]), worst_case(threat, [*news])
            yield paired(old, new, candidate, specs[0], asked=conditions_text(specs[0]), rules=rules)


def paired(old: Metric, new: Metric, model: str, spec: Question, *, asked: str, rules: Rules) -> Verdict:
    """Return two columns side by side with their p-value; the verdict comes when all p-values are known."""
    if not np.array_equal(old.examples, new.examples):
        reason = (
            "the rows are of other examples although the question is the same; delete the record and evaluate again"
        )
        return Verdict(model=model, question=asked, metric=old.name, kind="damaged", reason=reason)
    n = len(old.values)
    lost, gained = _changed(old, new)
    worse = lost if rules.gate == "model" or old.subject != "attack" else gained
    return Verdict(
        model=model,
        question=asked,
        metric=old.name,
        kind="same",
        before=old.value,
        now=new.value,
        summary=old.summary,
        subject=old.subject,
        n=n,
        change=change_interval(len(lost), len(gained), n) if old.summary == "share" else None,
        p=_P_VALUES[rules.gate](old, new),
        lost=worse if old.summary == "share" else None,
        read_as=None if new.predictions is None else new.predictions[np.isin(new.examples, worse)],
        spec=spec,
    )


def _changed(old: Metric, new: Metric) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids of the examples whose value fell, and of those whose value rose."""
    before, now = old.values.astype(np.float64), new.values.astype(np.float64)
    return old.examples[now < before], old.examples[now > before]


def _differences(old: Metric, new: Metric) -> NDArray[np.float64]:
    """Return now less before, 0 where both are infinite."""
    before, now = old.values.astype(np.float64), new.values.astype(np.float64)
    same = before == now
    return np.where(same, 0.0, np.where(same, 0.0, now) - np.where(same, 0.0, before))


def _p_of_model(old: Metric, new: Metric) -> float:
    if old.summary == "share":
        lost, gained = _changed(old, new)
        return mcnemar(len(lost), len(gained))
    return signed_rank(_differences(old, new))


def _p_of_engine(old: Metric, new: Metric) -> float:
    """Frozen weights: nothing but rounding may change an answer."""
    lost, gained = map(len, _changed(old, new))
    if old.summary == "share":
        moved = abs(gained - lost) if old.subject == "attack" else gained + lost
        return beyond_rounding(moved, len(old.values))
    differences = _differences(old, new)
    size = np.maximum(np.abs(old.values), np.abs(new.values))
    far = np.abs(differences) > np.where(np.isfinite(size), _LENGTH_ROUNDING * size, 0.0)
    if old.subject == "certificate":
        return beyond_rounding(int(far.sum()), len(old.values))
    return signed_rank(np.where(far, differences, 0.0))


_P_VALUES: Mapping[Gate, Callable[[Metric, Metric], float]] = {"model": _p_of_model, "engine": _p_of_engine}


def judged(verdicts: Sequence[Verdict], rules: Rules) -> list[Verdict]:
    """Return the verdicts, now that all p-values are known: Holm's procedure over all metrics of the run."""
    measured = [v for v in verdicts if v.p is not None]
    adjusted = dict(zip(map(id, measured), holm([v.p or 0.0 for v in measured]), strict=True))
    return [_decided(v, adjusted[id(v)], rules) if v.p is not None else v for v in verdicts]


def _decided(verdict: Verdict, adjusted: float, rules: Rules) -> Verdict:
    change = change_of(verdict)
    clear, large = adjusted <= rules.alpha, abs(change) > rules.tolerance + 1e-9
    if rules.gate == "engine" and verdict.subject != "attack":
        return replace(verdict, kind="worse", reason=_MOVED[verdict.subject]) if clear else verdict
    if not large:
        return verdict
    if rules.gate == "engine":
        kind: Kind = "worse" if change > 0 else "better"
        return replace(verdict, kind=kind, reason=_STRENGTH[kind]) if clear else verdict
    if not clear:
        return replace(verdict, reason=_undecided(verdict, change)) if change < 0 else verdict
    return replace(verdict, kind="worse" if change < 0 else "better")


_MOVED: Mapping[Subject, str] = {
    "clean": "the model's answers moved on frozen weights; look for a change of preprocessing, layers or torch",
    "certificate": "the certificate moved on frozen weights; look for a change of its noise, its bound or torch",
}
_STRENGTH: Mapping[Kind, str] = {
    "worse": "the attack got weaker on frozen weights; look for a change of its steps, its loss or its gradients",
    "better": "the attack got stronger; if that is meant, raise its version and run robench baseline set",
}


def change_of(verdict: Verdict) -> float:
    """Return the change in the unit of the tolerance: points of a share, percent of a length."""
    before, now = verdict.before or 0.0, verdict.now or 0.0
    if before == now:
        return 0.0
    if verdict.summary == "share":
        return 100 * (now - before)
    if np.isinf(before):
        return -100.0
    return 100 * (now - before) / before if before else float(np.inf)


def _undecided(verdict: Verdict, change: float) -> str:
    unit = "points" if verdict.summary == "share" else "%"
    return f"{-change:.1f} {unit} less may be chance on {verdict.n:,} examples; evaluate more to know"

"""`robench check --fast`: the baseline's attacks on randomly drawn examples, only until it is clear.

The baseline's answers are on record, so only the new model is attacked. What was answered is kept: `robench eval` goes
on from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robench.cli import answering
from robench.cli.measuring import Measuring, current
from robench.cli.options import resolve_device
from robench.errors import EvaluationFailed, RobenchError, UserError
from robench.gate.baseline import Answered, Baseline, conditions_text, load, question_text
from robench.gate.metrics import Metric, worst_case
from robench.gate.paired_tests import Race
from robench.gate.verdicts import Check, Kind, Rules, Verdict
from robench.planning import journal_key
from robench.records import EvalSpec, Examples
from robench.store import Rows, Store

if TYPE_CHECKING:
    from robench.evaluation.worker import Worker

#: Examples between two looks: as few as a batch takes without getting slower.
_AT_A_TIME = {"cpu": 64, "cuda": 512}


@dataclass(eq=False)
class Question:
    """One number of a model: clean accuracy, or what stands all of the baseline's attacks under a threat model."""

    metric: Metric
    """The baseline's."""
    specs: list[EvalSpec]
    """The attacks that decide it; the first one alone tells clean accuracy."""
    race: Race
    answers: dict[int, bool] = field(default_factory=dict)
    before: int = 0

    def add(self, example: int, before: bool) -> None:
        """Count an example, unless it is decided already."""
        if self.race.decision is None:
            self.race.add(before, self.answers[example])
            self.before += before


def race(
    baseline: Baseline,
    path: Path,
    names: Mapping[str, str],
    rules: Rules,
    *,
    measuring: Measuring,
    budget: int | None,
) -> Check:
    """Return the verdicts on clean accuracy and on the worst case under each threat model, as far as they are known."""
    loaded = {old: [load(e, path.parent) for e in baseline.entries if e.model == old] for old in names}
    attacks = {old: [a for a in answers if isinstance(a.record.spec, EvalSpec)] for old, answers in loaded.items()}
    if not any(attacks.values()):
        raise UserError(f"{path} has no attack to race with; leave out --fast")
    count = sum(len(_questions(own, Race(0.01, 0.01))) for own in attacks.values())
    fresh = Race(rules.tolerance / 100, rules.alpha / count)
    verdicts = []
    for old, new in names.items():
        try:
            verdicts += list(_of_model(new, _questions(attacks[old], fresh), measuring, budget))
        except RobenchError as error:
            verdicts.append(Verdict(model=new, question="", metric="model", kind="missing", reason=str(error)))
    return Check(rules, str(path), tuple(verdicts))


def _questions(answers: Sequence[Answered], fresh: Race) -> list[Question]:
    """Return the numbers to race for, all of them undecided."""
    clean: dict[tuple[Any, ...], Question] = {}
    robust: dict[tuple[Any, ...], list[tuple[EvalSpec, Metric]]] = defaultdict(list)
    for answered in answers:
        spec = answered.record.spec
        assert isinstance(spec, EvalSpec)
        key = (spec.examples, spec.precision, spec.decision)
        metrics = answered.metrics
        clean.setdefault(key, Question(metrics[0], [spec], Race(fresh.tolerance, fresh.alpha)))
        robust[(*key, spec.threat)].append((spec, metrics[1]))
    found = list(clean.values())
    for (*_, threat), own in robust.items():
        metric = own[0][1] if len(own) == 1 else worst_case(threat, [m for _, m in own])
        found.append(Question(metric, [spec for spec, _ in own], Race(fresh.tolerance, fresh.alpha)))
    return found


def _of_model(name: str, questions: Sequence[Question], measuring: Measuring, budget: int | None) -> Iterator[Verdict]:
    groups: dict[Examples, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.specs[0].examples].append(question)
    for own in groups.values():
        of = _run(name, own, measuring, budget)
        for question in own:
            yield _verdict(name, question, of)


def _run(name: str, questions: Sequence[Question], measuring: Measuring, budget: int | None) -> int:
    """Draw examples until every number is decided, one is worse, or the budget is spent; return its size."""
    from robench.evaluation.sampling import drawing_order

    spec = questions[0].specs[0]
    job, options = measuring.job(name, spec)
    device = resolve_device(options.device)
    asking = Asking(job, options, measuring.store)
    order = drawing_order(job.ids, spec.seed)[:budget]
    size = _AT_A_TIME[device.type]
    before = {id(q): dict(zip(q.metric.examples.tolist(), q.metric.values.tolist(), strict=True)) for q in questions}
    for start in range(0, len(order), size):
        drawn = order[start : start + size]
        for question in questions:
            if question.race.decision is None:
                question.answers = asking.answers(question, drawn)
        for example in drawn.tolist():
            for question in questions:
                question.add(example, before[id(question)][example])
        decisions = [question.race.decision for question in questions]
        if "worse" in decisions or None not in decisions:
            break
    return len(order)


class Asking:
    """One model whose examples are attacked in any order; what is known is not asked again."""

    def __init__(self, job: answering.Job, options: answering.Options, store: Store) -> None:
        """Prepare; torch and the model come with the first example that is not known."""
        self.job, self.options, self.store = job, options, store
        self._workers: dict[str, Worker] = {}
        self._known: dict[str, dict[str, NDArray[Any]]] = {}

    def answers(self, question: Question, drawn: NDArray[np.int64]) -> dict[int, bool]:
        """Return which examples are right: unattacked, or after every attack."""
        if question.metric.subject == "clean":
            spec = question.specs[0]
            rows = self.rows(spec, drawn)
            right = rows["clean_rank"] < spec.decision.top_k
        else:
            found = [self.rows(spec, drawn) for spec in question.specs]
            rows, right = found[0], np.logical_and.reduce([own["robust"] for own in found])
        return dict(zip(rows["example_id"].tolist(), right.tolist(), strict=True))

    def rows(self, asked: EvalSpec, drawn: NDArray[np.int64]) -> Rows:
        """Return the examples' rows in ascending order, computing and keeping those that are not known."""
        spec = current(asked, self.job.identity)
        assert isinstance(spec, EvalSpec)
        if spec != asked.model_copy(update={"model": spec.model}):
            raise UserError(
                f"{asked.attack.title} is version {spec.attack.version} now, the baseline has {asked.attack.version}: "
                "not comparable; evaluate and run robench baseline set"
            )
        if spec.identity not in self._known:
            record = self.store.find(spec)
            journal = self.store.journal_read(journal_key(spec))
            self._known[spec.identity] = dict(self.store.outcomes(record)) if record else journal
        known = self._known[spec.identity]
        missing = drawn[~np.isin(drawn, known["example_id"])]
        if len(missing):
            made = self._asked(spec, missing)
            known = {name: np.concatenate([known[name], made[name]]) for name in known}
            self._known[spec.identity] = known
        wanted = np.isin(known["example_id"], drawn)
        order = np.argsort(known["example_id"][wanted])
        return {name: values[wanted][order] for name, values in known.items()}

    def _asked(self, spec: EvalSpec, ids: NDArray[np.int64]) -> Rows:
        from robench.evaluation.shards import Shard

        result = self._worker(spec)(Shard(spec, ids))
        if result.error is not None:
            raise EvaluationFailed(f"{spec.attack.title}: {result.error.kind}: {result.error.message}")
        self.store.journal_write(journal_key(spec), result.rows, cost=result.cost, notes=result.notes)
        return result.rows

    def _worker(self, spec: EvalSpec) -> Worker:
        from robench.classifier import keep_large_buffers
        from robench.datasets import open_split
        from robench.evaluation.worker import Worker

        if spec.precision not in self._workers:
            self.store.check_writable()
            keep_large_buffers()
            self._workers[spec.precision] = Worker(
                answering.checked_model(self.job, self.options),
                self.job.images,
                device=resolve_device(self.options.device),
                precision=spec.precision,
                training=lambda: open_split(self.job.dataset, "train", self.options.workspace),
            )
        return self._workers[spec.precision]


def _asked(question: Question) -> str:
    """Return what a number is of; that of a single attack is told from others by all of its question."""
    alone = question.metric.subject == "attack" and len(question.specs) == 1
    return question_text(question.specs[0]) if alone else conditions_text(question.specs[0])


def _verdict(model: str, question: Question, of: int) -> Verdict:
    race, decision = question.race, question.race.decision
    drawn = max(1, race.drawn)
    kind: Kind = "worse" if decision == "worse" else "same"
    told = {
        "worse": f"clear after {race.drawn:,} of {of:,} examples",
        "not worse": f"a loss of {100 * race.tolerance:g} points is refuted after {race.drawn:,} of {of:,} examples",
        None: f"undecided after {race.drawn:,} of {of:,} examples",
    }
    return Verdict(
        model=model,
        question=_asked(question),
        metric=question.metric.name,
        kind=kind,
        before=question.before / drawn,
        now=(question.before - race.lost + race.gained) / drawn,
        n=race.drawn,
        reason=told[decision],
    )

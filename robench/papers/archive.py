"""What the records have to say of a cell: the one place where an answer is looked for, and refused.

A number is shown only from a complete record of the weights that the model's card describes, made by the attack as it
is now. What failed, was stopped, or belongs to other weights gives a reason instead.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench import planning
from robench.errors import UnsafeFile, UserError
from robench.papers.definitions import Facts, threats_of
from robench.records import (
    AttackIdentity,
    CertificateRecord,
    Decision,
    Diagnostic,
    EvalRecord,
    EvalSpec,
    Examples,
    ModelCard,
    ModelIdentity,
    Proportion,
    Provenance,
    TransferRecord,
)
from robench.softmax_lines import Lines
from robench.statistics import deviation_interval, mean_interval, median_ranks, wilson
from robench.store import Results, Rows
from robench.threat_model import ThreatModel

#: The share of images with an infinite margin that a mean may leave out.
FEW_INFINITE = 0.01


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A number with what stands behind it; shares are in percent."""

    value: float
    low: float | None
    """Its 95 % interval; None where there is none."""
    high: float | None
    n: int
    """Images that it is of."""
    examples: Examples
    records: tuple[Path, ...]
    commands: tuple[str, ...]
    percent: bool
    flags: tuple[Diagnostic, ...] = ()
    """What the records' own diagnostics raise against them."""
    notes: tuple[str, ...] = ()
    """What a reader must know of how the number was taken."""


@dataclass(frozen=True, kw_only=True)
class NoAnswer:
    """Why there is no number."""

    reason: str


@dataclass(frozen=True)
class Stored:
    """Any record with what all kinds of them have."""

    path: Path
    record: EvalRecord | TransferRecord | CertificateRecord
    model: ModelIdentity
    """Whose answer it is."""
    examples: Examples

    @property
    def status(self) -> str:
        """Return `complete`, `partial` or `failed`."""
        return "complete" if isinstance(self.record, TransferRecord) else self.record.status

    @property
    def provenance(self) -> Provenance:
        """Return how it was made."""
        return self.record.provenance


class Archive:
    """The records by model."""

    def __init__(self, results: Results) -> None:
        """Sort the records of all kinds by the model that they are of."""
        self.results = results
        self.by_model: Mapping[str, list[Stored]] = defaultdict(list)
        for stored in results.records:
            spec = stored.record.spec
            self.by_model[spec.model.id].append(Stored(stored.path, stored.record, spec.model, spec.examples))
        for moved in results.transfers:
            target, source = moved.record.spec.target, moved.record.spec.source
            self.by_model[target.id].append(Stored(moved.path, moved.record, target, source.examples))
        for certified in results.certificates:
            asked = certified.record.spec
            self.by_model[asked.model.id].append(Stored(certified.path, certified.record, asked.model, asked.examples))

    def answer(self, facts: Facts, card: ModelCard, *, source: ModelCard | None = None) -> Answer | NoAnswer:
        """Return what is known of a cell of this model, or why it is not."""
        try:
            return _MEASURES[facts.measure or ""](self, facts, card, source)
        except Unanswered as missing:
            return NoAnswer(reason=str(missing))
        except UnsafeFile:
            raise  # rows that are gone, or that their record contradicts: no page should be made of them
        except UserError as error:
            # An attack without a form for this norm, a certificate that is not there: the table's own mistake.
            return NoAnswer(reason=str(error))

    def rows(self, stored: Stored) -> Rows:
        """Return a record's rows."""
        return self.results.outcomes(stored.record)

    def attacked(self, facts: Facts, card: ModelCard, threat: ThreatModel) -> Stored:
        """Return the record of an attack, or raise what is wrong with those that there are."""
        attack = _attack(facts, threat)

        def asks(record: Any) -> bool:
            return isinstance(record, EvalRecord) and _asks(record.spec, facts, threat)

        def is_current(record: Any) -> bool:
            return bool(record.spec.attack.version == attack.version)

        return self._one(facts, card, asks, is_current)

    def transferred(self, facts: Facts, card: ModelCard, source: ModelCard, threat: ThreatModel) -> Stored:
        """Return the record of a transfer."""
        attack = _attack(facts, threat)

        def asks(record: Any) -> bool:
            if not isinstance(record, TransferRecord):
                return False
            spec = record.spec.source
            same_search = spec.attack.entry == attack.entry and _same(spec.attack.parameters, attack.parameters)
            return same_search and spec.model.id == source.id and (spec.threat, spec.seed) == (threat, 0)

        def is_current(record: Any) -> bool:
            spec = record.spec.source
            of_source = spec.model.weights_sha256 == source.weights.sha256
            return bool(of_source and spec.attack.version == attack.version)

        return self._one(facts, card, asks, is_current)

    def certified(self, facts: Facts, card: ModelCard) -> Stored:
        """Return the record of a certificate."""
        asked = _certificate(facts.certificate or "")

        def asks(record: Any) -> bool:
            if not isinstance(record, CertificateRecord):
                return False
            found = record.spec.certificate
            same = bool(found.entry == asked.entry and record.spec.seed == 0)
            return same and _same(found.parameters, asked.parameters)

        def is_current(record: Any) -> bool:
            return bool(record.spec.certificate.version == asked.version)

        return self._one(facts, card, asks, is_current)

    def _one(
        self, facts: Facts, card: ModelCard, asks: Callable[[Any], bool], is_current: Callable[[Any], bool]
    ) -> Stored:
        """Return the record that answers, of several the one of most images."""
        candidates = [
            s
            for s in self.by_model.get(card.id, [])
            if s.examples.split == facts.split and s.examples.dataset == card.dataset and asks(s.record)
        ]
        own = [s for s in candidates if s.model.weights_sha256 == card.weights.sha256]
        current = [s for s in own if is_current(s.record)]
        complete = [s for s in current if s.status == "complete"]
        if complete:
            return self._looked_at(min(complete, key=_largest_first))
        raise Unanswered(_why_not(candidates, own, current))

    def clean(self, card: ModelCard, threats: Sequence[ThreatModel]) -> tuple[Stored, Proportion]:
        """Return the clean accuracy of a model on the test split.

        Of several records it is from one under the table's own threats, so that a row's numbers are of the same images;
        of these, or of all where there is none, from that of most images.
        """
        own = [
            s
            for s in self.by_model.get(card.id, [])
            if s.model.weights_sha256 == card.weights.sha256
            and (s.examples.split, s.examples.dataset, s.status) == ("test", card.dataset, "complete")
            and _is_plain(s.record)
        ]
        if not own:
            raise Unanswered("not evaluated")
        best = self._looked_at(min(own, key=lambda s: (_threat_of(s.record) not in threats, *_largest_first(s))))
        record = best.record
        return best, record.plain if isinstance(record, CertificateRecord) else record.clean

    def _looked_at(self, stored: Stored) -> Stored:
        """Return a record that its rows bear out; raise UnsafeFile for any other."""
        len(self.rows(stored)["example_id"])
        return stored


class Unanswered(Exception):
    """Its text says why."""


def check_lines(found: Lines | None, facts: Facts, card: ModelCard, threat: ThreatModel) -> None:
    """Raise Unanswered unless these are the straight lines that a figure asks for of a model."""
    if found is None:
        raise Unanswered("its outputs along lines are not kept")
    spec = found.spec
    if spec.model.weights_sha256 != card.weights.sha256:
        raise Unanswered("stale: the lines are of other weights")
    if (spec.examples.dataset, spec.examples.split) != (card.dataset, facts.split):
        raise Unanswered(f"its lines are of {spec.examples.split} images of {spec.examples.dataset}")
    if not _asks(spec, facts, threat):
        seed = f", seed {spec.seed}" if spec.seed else ""
        raise Unanswered(f"its lines are to the images of {spec.attack.title} under {spec.threat}{seed}")
    if spec.attack.version != _attack(facts, threat).version:
        raise Unanswered("stale: by an earlier version of the attack")


def _asks(spec: EvalSpec, facts: Facts, threat: ThreatModel) -> bool:
    """Tell whether this is the question, by whatever version of the attack."""
    attack = _attack(facts, threat)
    same_search = (spec.attack.entry, spec.attack.backend) == (attack.entry, attack.backend)
    asked = (spec.threat, spec.decision, spec.until, spec.seed) == (threat, _decision(facts), None, 0)
    return same_search and asked and _same(spec.attack.parameters, attack.parameters)


def _why_not(candidates: Sequence[Stored], own: Sequence[Stored], current: Sequence[Stored]) -> str:
    if current:
        worst = current[0].record
        if getattr(worst, "status", "") == "partial":
            return "stopped before it was complete: does not count"
        return "failed: does not count"
    if own:
        return "stale: by an earlier version of the attack"
    if candidates:
        return "stale: the record is of other weights"
    return "not evaluated"


def _largest_first(stored: Stored) -> tuple[int, bool, str]:
    return (-stored.examples.count, not stored.record.provenance.device.startswith("cpu"), stored.path.name)


def _threat_of(record: EvalRecord | TransferRecord | CertificateRecord) -> ThreatModel | None:
    if isinstance(record, CertificateRecord):
        return None
    return (record.spec.source if isinstance(record, TransferRecord) else record.spec).threat


def _is_plain(record: Any) -> bool:
    if isinstance(record, TransferRecord):
        return True
    if isinstance(record, CertificateRecord):
        return True
    return bool(record.spec.decision.plain and record.spec.decision.top_k == 1 and record.spec.until is None)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare parameters as they are written."""
    return bool(_plain(one) == _plain(other))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


@functools.cache
def _attack_of(text: str, threat: ThreatModel, decision: Decision) -> AttackIdentity:
    return planning.identify_attack(text, threat, decision)


_certificate = functools.cache(planning.identify_certificate)


def _decision(facts: Facts) -> Decision:
    return Decision(top_k=facts.top_k, votes=facts.votes, sigma=facts.sigma)


def _attack(facts: Facts, threat: ThreatModel) -> AttackIdentity:
    return _attack_of(facts.attack or "", threat, _decision(facts))


def _share(stored: Stored, share: Proportion) -> Answer:
    """Return a share in percent, with its score interval, as on all other pages."""
    return _percent([stored], share.wilson, value=share.value, n=share.n)


def _percent(stored: Sequence[Stored], bounds: tuple[float, float], *, value: float, n: int) -> Answer:
    return _answer(stored, (100 * bounds[0], 100 * bounds[1]), value=100 * value, n=n, percent=True)


def _answer(
    stored: Sequence[Stored], bounds: tuple[float, float] | None, *, value: float, n: int, percent: bool = False
) -> Answer:
    return Answer(
        value=value,
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        n=n,
        examples=stored[0].examples,
        records=tuple(s.path for s in stored),
        commands=tuple(dict.fromkeys(s.provenance.command for s in stored)),
        percent=percent,
        flags=tuple(d for s in stored if isinstance(s.record, EvalRecord) for d in s.record.diagnostics if _raised(d)),
    )


def _raised(diagnostic: Diagnostic) -> bool:
    return diagnostic.verdict == "flag"


def _clean(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    del source
    stored, share = archive.clean(card, threats_of(facts))
    # What says that an attack was weak says nothing of unchanged images.
    return replace(_share(stored, share), flags=())


def _robust(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    del source
    stored = archive.attacked(facts, card, threats_of(facts)[-1])
    assert isinstance(stored.record, EvalRecord)
    return _share(stored, stored.record.robust)


def _transfer(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    if source is None:
        raise Unanswered(f"the source {facts.source} is not trained")
    stored = archive.transferred(facts, card, source, threats_of(facts)[-1])
    assert isinstance(stored.record, TransferRecord)
    return _share(stored, stored.record.robust)


def _average(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    """Return the area under the curve over epsilon, from the clean accuracy at 0, over its width; by trapezoids."""
    if facts.source and source is None:
        raise Unanswered(f"the source {facts.source} is not trained")
    threats = threats_of(facts)
    found = [
        archive.transferred(facts, card, source, t) if source else archive.attacked(facts, card, t) for t in threats
    ]
    rows = [archive.rows(s) for s in found]
    if any(not np.array_equal(own["example_id"], rows[0]["example_id"]) for own in rows):
        raise Unanswered("its epsilons were attacked on different images")
    places = [0.0, *(t.radius for t in threats)]
    heights = [rows[0]["attacked"].astype(np.float64), *(own["robust"].astype(np.float64) for own in rows)]
    area = np.trapezoid(np.stack(heights), places, axis=0) / places[-1]
    mean, low, high = mean_interval(area)
    return _percent(found, (max(0.0, low), min(1.0, high)), value=mean, n=len(area))


def _distance(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    """Return a statistic over all images: 0 for those that are wrong anyway, the last distance where none was found."""
    del source
    threat = threats_of(facts)[-1]
    stored = archive.attacked(facts, card, threat)
    return _statistic(stored, distances(archive.rows(stored), threat), facts.statistic)


def distances(rows: Rows, threat: ThreatModel) -> NDArray[np.float64]:
    """Return how far the attacked images lie: 0 for those that are wrong anyway, the last distance where none was
    found.
    """
    return np.where(rows["attacked"], rows[threat.norm.lower()], 0.0)


def _relative(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    del source
    stored = archive.attacked(facts, card, threats_of(facts)[-1])
    assert isinstance(stored.record, EvalRecord)
    rows = archive.rows(stored)
    return _statistic(stored, rows["relative_l2"][rows["attacked"] & rows["broken"]], "mean")


def _certificate_statistic(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    del source
    stored = archive.certified(facts, card)
    rows = archive.rows(stored)
    everything = np.ones(len(rows["radius"]), dtype=np.bool_)
    chosen = {"all": everything, "correct": rows["correct"], "positive": rows["radius"] > 0}[facts.over]
    values = rows["radius"][chosen]
    finite = np.isfinite(values)
    left_out = int((~finite).sum())
    if left_out > FEW_INFINITE * len(values):
        raise Unanswered(f"infinite for {left_out:,} of {len(values):,} images, around which the network is constant")
    found = _statistic(stored, values[finite], facts.statistic)
    if left_out:
        told = f"without {left_out:,} of {len(values):,} images, around which the network is constant: infinitely far"
        found = replace(found, notes=(told,))
    # A margin is a linear extrapolation; that of a network which has all but collapsed to a constant leads nowhere.
    farthest = math.sqrt(math.prod(card.input_shape))
    if found.value > farthest:
        raise Unanswered(f"{found.value:.1e}, where no two images are farther apart than {farthest:.4g}")
    return found


def _certified_share(archive: Archive, facts: Facts, card: ModelCard, source: ModelCard | None) -> Answer:
    del source
    stored = archive.certified(facts, card)
    rows = archive.rows(stored)
    hits, n = int((rows["correct"] & (rows["radius"] >= (facts.radius or 0.0))).sum()), len(rows["radius"])
    return _percent([stored], wilson(hits, n), value=hits / n, n=n)


def _statistic(stored: Stored, values: NDArray[np.float64], name: str | None) -> Answer:
    """Return a statistic of values with its 95 % interval, where it has one."""
    n = len(values)
    if n == 0 or not np.isfinite(values).all():
        raise Unanswered("no image to take it over" if n == 0 else "not finite for some image")
    if name == "mean":
        mean, low, high = mean_interval(values)
        return _answer([stored], (low, high), value=mean, n=n)
    if name == "median":
        ranks, ordered = median_ranks(n), np.sort(values)
        bounds = (float(ordered[ranks[0]]), float(ordered[ranks[1]])) if ranks else None
        return _answer([stored], bounds, value=float(np.median(values)), n=n)
    if name == "std":
        return _answer([stored], deviation_interval(values), value=float(values.std()), n=n)
    return _answer([stored], None, value=float(values.max()), n=n)


_MEASURES: Mapping[str, Callable[[Archive, Facts, ModelCard, ModelCard | None], Answer]] = {
    "clean": _clean,
    "robust": _robust,
    "transfer": _transfer,
    "average": _average,
    "distance": _distance,
    "relative-distance": _relative,
    "certificate": _certificate_statistic,
    "certified": _certified_share,
}


def paths(answers: Iterable[Answer]) -> list[Path]:
    """Return the records behind answers, each once."""
    return list(dict.fromkeys(path for answer in answers for path in answer.records))

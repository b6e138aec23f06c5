"""The diagnostics: can one record's robust accuracy be believed? Pure: from the probes' findings and the record's rows.

There are two kinds of signs. A *symptom* is seen on the way (gradients that are exactly zero, a loss that does not
rise, a ball as large as the box that leaves examples standing, outputs that change): it is held against a record whose
attack follows what is broken, and against any other only if the stronger attacks that were run because of it show harm.
*Harm* is an example of the sample that the record calls robust and another attack broke, in the same ball, for the same
judge.

Every flag is a test, not a glance. A robust accuracy is called too high where the harm can hardly be chance if it were
at most one point too high (exact one-sided binomial test at 1 %): so with 50 examples 4 further ones are needed, with
128 examples 5. Attacks differ in luck by a point; what a reader would want to know begins above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from robench.evaluation.shards import Rows
from robench.findings import (
    CROSS_ENTROPY_ALONE,
    NO_RISE,
    SAME_OUTPUTS,
    TOO_HIGH,
    UNBROKEN_IN_BOX,
    ZERO_GRADIENTS,
    Findings,
    Role,
    loss_of,
)
from robench.planning import is_bounded
from robench.records import Diagnostic, EvalSpec
from robench.statistics import exceeds, proportion

#: An evaluation whose adversarial images are more often than this gone when they are saved as a file.
LOST_IN_8_BIT = 0.05

#: The parameters by which attacks on random models say how many passes each of their gradients is averaged over, and
#: AutoAttack's version that does.
_COPIES, _AVERAGING_VERSION = ("copies", "eot_copies"), "rand"

#: What is run because of a sign.
_WITHOUT_THE_SLOPE: tuple[Role, ...] = ("margin", "rescaled", "surrogate", "black-box", "long-black-box")
_BLACK_BOX: tuple[Role, ...] = ("black-box", "surrogate", "long-black-box")


class Attempt(NamedTuple):
    """What another attack broke in the same ball, for the same judge: a probe, or an evaluation of its own."""

    attack: str
    broken: frozenset[int]
    """Ids of examples; those outside of the sample do not matter."""


@dataclass(frozen=True)
class Case:
    """A record beside what is known of its model."""

    spec: EvalSpec
    rows: Rows
    findings: Findings
    sample: frozenset[int]
    """Examples of the findings that the record has answered."""
    standing: frozenset[int]
    """Those that it calls robust."""
    others: tuple[Attempt, ...] = ()
    """What other evaluations of the model on the same examples broke."""

    @classmethod
    def of(cls, spec: EvalSpec, rows: Rows, findings: Findings, others: Iterable[Attempt] = ()) -> Case:
        """Look up the sample in the record's rows."""
        known = np.isin(rows["example_id"], findings.ids) & rows["attacked"]
        sample, standing = rows["example_id"][known], rows["example_id"][known & rows["robust"]]
        return cls(spec, rows, findings, frozenset(sample.tolist()), frozenset(standing.tolist()), tuple(others))

    @property
    def follows_gradients(self) -> bool:
        """Tell whether the attack made backward passes, or does not say."""
        return bool((self.rows["backward_passes"][self.rows["attacked"]] != 0).any())

    @property
    def loss(self) -> Literal["ce", "margin"] | None:
        """Return whose gradient the attack follows (the DLR is a scaled margin); None where that is not said."""
        return loss_of(self.spec)

    def ran(self, roles: Iterable[Role]) -> tuple[Attempt, ...]:
        """Return what those probes of `roles` broke that ran."""
        runs = [self.findings.run(role) for role in roles]
        return tuple(Attempt(run.attack, frozenset(run.broken)) for run in runs if run)

    def harm(self, attempts: Iterable[Attempt]) -> frozenset[int]:
        """Return which examples that the record calls robust fell to these attacks."""
        return self.standing & {example for attempt in attempts for example in attempt.broken}

    def is_harmed(self, attempts: Iterable[Attempt], share: float = TOO_HIGH) -> bool:
        """Tell whether the record is too high by more than `share`, by these attacks."""
        return exceeds(len(self.harm(attempts)), len(self.sample), share)

    def strongest(self, attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
        """Return few of these attacks that do the harm of all; all where none does any."""
        chosen: list[Attempt] = []
        while missing := self.harm(attempts) - self.harm(chosen):
            chosen.append(max(attempts, key=lambda attempt: len(missing & attempt.broken)))
        return tuple(chosen) or tuple(attempts)

    def verdict(self, name: str, *, flag: bool, evidence: str, ran: Sequence[Attempt]) -> Diagnostic:
        """Return a verdict; a flag comes with those that `ran` and broke more, and what they left of the record.

        Of a flag that nothing broke more (a symptom alone) all that was tried is named.
        """
        harmful = [run for run in ran if self.standing & run.broken]
        harm, count = len(self.harm(ran)), len(self.sample)
        by = " + ".join(run.attack for run in harmful or ran)
        told = f"; {by} break{'s' if len(harmful or ran) == 1 else ''} {harm} of the {len(self.standing)} that it left"
        return Diagnostic(
            name=name,
            verdict="flag" if flag else "ok",
            evidence=evidence + (told if ran else ""),
            examples=count,
            stronger=by if flag and ran else None,
            robust_then=proportion(len(self.standing) - harm, count) if flag and ran else None,
        )


def diagnose(spec: EvalSpec, rows: Rows, findings: Findings, others: Iterable[Attempt] = ()) -> tuple[Diagnostic, ...]:
    """Return all diagnostics of one record, from its rows (one per example answered) and the findings on its model.

    `others` is what other evaluations of the same question but for the attack broke, as far as they are at hand.
    """
    case = Case.of(spec, rows, findings, others)
    problem = findings.problem or (None if case.sample else "none of the examples that were looked at was answered")
    if not is_bounded(spec):
        problem = f"{spec.attack.title} leaves the ball, in which everything else was looked at"
    if problem:
        named = [_not_applicable(name, problem) for name in CHECKS]
    else:
        named = [check(case) for check in CHECKS.values()]
    return (*named, eight_bit(case))


def zero_gradients(case: Case) -> Diagnostic:
    """Gradients that are exactly zero, or NaN: there is nothing that an attack could follow."""
    if not case.follows_gradients:
        return _without_gradients("zero-gradients", case)
    n = len(case.sample)
    dead = {loss: len(case.sample.intersection(ids)) for loss, ids in case.findings.zero_gradients.items()}
    return _symptom(
        case,
        "zero-gradients",
        seen={loss: exceeds(count, n, ZERO_GRADIENTS) for loss, count in dead.items()},
        evidence=f"the cross-entropy's gradient is exactly zero or not finite for {dead['ce']} of {n}, the margin's "
        f"for {dead['margin']}, at the image or along the attack",
        roles=_WITHOUT_THE_SLOPE,
    )


def loss_does_not_rise(case: Case) -> Diagnostic:
    """A loss that ends no higher than it began: steps too large, or a gradient that is not the loss's slope."""
    if not case.follows_gradients:
        return _without_gradients("loss-does-not-rise", case)
    n, flat = len(case.sample), len(case.sample.intersection(case.findings.no_rise))
    return _symptom(
        case,
        "loss-does-not-rise",
        seen={"ce": exceeds(flat, n, NO_RISE)},
        evidence=f"the cross-entropy of {flat} of {n} ends PGD-20 no higher than it began",
        roles=("longer", *_WITHOUT_THE_SLOPE),
    )


def epsilon_not_fatal(case: Case) -> Diagnostic:
    """A ball as large as the box holds an image of every class: what does not reach it does not search."""
    if not case.follows_gradients:
        return _without_gradients("epsilon-not-fatal", case)
    n = len(case.sample)
    left = {loss: len(case.sample.intersection(ids)) for loss, ids in case.findings.unbroken_in_box.items()}
    return _symptom(
        case,
        "epsilon-not-fatal",
        seen={loss: exceeds(count, n, UNBROKEN_IN_BOX) for loss, count in left.items()},
        evidence=f"in a ball as large as the box PGD on the cross-entropy leaves {left['ce']} of {n} standing, "
        f"followed by PGD on the margin {left['margin']}",
        roles=_WITHOUT_THE_SLOPE,
    )


def not_converged(case: Case) -> Diagnostic:
    """More steps, from another random point, still break more."""
    return _harm(case, "not-converged", ("reference", "longer"))


def black_box_stronger(case: Case) -> Diagnostic:
    """What follows no gradient, or that of another model, breaks what this attack could not."""
    return _harm(case, "black-box-stronger", _BLACK_BOX)


def ce_above_worst(case: Case) -> Diagnostic:
    """All that was tried together, probes and other evaluations, breaks much that the cross-entropy does not."""
    if case.loss != "ce":
        return _not_applicable("ce-above-worst", f"{case.spec.attack.title} does not follow the cross-entropy alone")
    tried = (*case.ran(get_args(Role)), *case.others)
    return case.verdict(
        "ce-above-worst",
        flag=case.is_harmed(tried, CROSS_ENTROPY_ALONE),
        evidence=f"{case.spec.attack.title} on the cross-entropy leaves {len(case.standing)} of {len(case.sample)}",
        ran=case.strongest(tried),
    )


def random_outputs(case: Case) -> Diagnostic:
    """A model that answers differently at every call: an attack must average over it, and one pass decides nothing."""
    gap, sigma = case.findings.output_gap, case.spec.decision.sigma
    if gap <= SAME_OUTPUTS and not sigma:
        return case.verdict(
            "random-outputs", flag=False, evidence="two calls on the same images answer the same", ran=()
        )
    parameters, decision = case.spec.attack.parameters, case.spec.decision
    averages = parameters.get("version") == _AVERAGING_VERSION or any(int(parameters.get(n) or 1) > 1 for n in _COPIES)
    seen = f"two calls differ by {gap:.1e} of the largest logit" if not sigma else f"noise of {sigma:g} is added"
    averaged = case.ran(("averaged",))
    decided = f"{decision.votes} votes and {decision.repeats} decisions" if not decision.plain else "a single pass"
    return case.verdict(
        "random-outputs",
        flag=decision.plain or not averages or case.is_harmed(averaged),
        evidence=f"{seen}, {decided} decided, and {case.spec.attack.title} "
        f"{'averages' if averages else 'does not average'} over the randomness",
        ran=averaged,
    )


def eight_bit(case: Case) -> Diagnostic:
    """Adversarial images that are none any more when they are saved as a file of 256 levels."""
    fallen = case.rows["attacked"] & ~case.rows["robust"]
    count, lost = int(fallen.sum()), int((fallen & ~case.rows["broken_in_8_bit"]).sum())
    if not count:
        return _not_applicable("eight-bit", "no example fell")
    if case.findings.output_gap > SAME_OUTPUTS or case.spec.decision.sigma:
        return _not_applicable("eight-bit", "the model answers differently at every call")
    return Diagnostic(
        name="eight-bit",
        verdict="flag" if exceeds(lost, count, LOST_IN_8_BIT) else "ok",
        evidence=f"{lost} of {count} adversarial images are classified correctly again after rounding to 256 levels",
        examples=count,
    )


#: By name, in the order in which they are shown.
CHECKS: dict[str, Callable[[Case], Diagnostic]] = {
    "zero-gradients": zero_gradients,
    "loss-does-not-rise": loss_does_not_rise,
    "epsilon-not-fatal": epsilon_not_fatal,
    "not-converged": not_converged,
    "black-box-stronger": black_box_stronger,
    "ce-above-worst": ce_above_worst,
    "random-outputs": random_outputs,
}


def _symptom(case: Case, name: str, *, seen: dict[str, bool], evidence: str, roles: Sequence[Role]) -> Diagnostic:
    """Return the verdict on a symptom: held against who follows that loss, else against who is harmed."""
    tried = case.ran(roles) if any(seen.values()) else ()
    harmed = case.is_harmed(tried)
    followed = case.loss is not None and seen.get(case.loss, False)
    return case.verdict(name, flag=harmed or followed, evidence=evidence, ran=tried)


def _harm(case: Case, name: str, roles: Sequence[Role]) -> Diagnostic:
    evidence = f"{case.spec.attack.title} leaves {len(case.standing)} of {len(case.sample)}"
    ran = case.ran(roles)
    return case.verdict(name, flag=case.is_harmed(ran), evidence=evidence, ran=ran)


def _without_gradients(name: str, case: Case) -> Diagnostic:
    return _not_applicable(name, f"{case.spec.attack.title} makes no backward passes")


def _not_applicable(name: str, reason: str) -> Diagnostic:
    return Diagnostic(name=name, verdict="not applicable", evidence=reason, examples=0)

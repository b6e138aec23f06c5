"""From what somebody asked to the list of questions (EvalSpec), and what they will cost. Pure, without torch."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from robench import backends, catalog
from robench.errors import UserError
from robench.records import (
    PLAIN,
    AttackIdentity,
    CertificateIdentity,
    CertificateSpec,
    Decision,
    EvalRecord,
    EvalSpec,
    Examples,
    ModelIdentity,
    Precision,
    Value,
)
from robench.threat_model import Norm, ThreatModel
from robench.workspace import PACKAGE

DEFAULT_SUITE = "baseline"

#: Of an image, that an attack averages over without being told how many: what HeatSmoothing takes on ImageNet
#: (arXiv:2010.02508, section 4). Each costs a pass a step.
_MOST_COPIES = 25


class Suite(Value):
    """A list of attacks under a name; those that have a form for one norm only stand under that norm."""

    summary: str
    source: str
    attacks: tuple[str, ...] = ()
    """Under every norm, and first."""
    linf: tuple[str, ...] = ()
    l2: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    """Whatever the threat model is."""

    @property
    def has_attacks(self) -> bool:
        """Tell whether it attacks at all."""
        return bool(self.attacks or self.linf or self.l2)

    def under(self, norm: Norm) -> tuple[str, ...]:
        """Return the attacks for one norm, in the order in which they run."""
        own: tuple[str, ...] = {"Linf": self.linf, "L2": self.l2}[norm]
        return (*self.attacks, *own)


@dataclass(frozen=True)
class Request:
    """What is to be known about one model on one set of examples."""

    model: ModelIdentity
    examples: Examples
    threats: Sequence[ThreatModel]
    attacks: Sequence[str] = ()
    """As typed: `pgd-20`, or with parameters `pgd-20:step_size=0.01,restarts=3`."""
    seed: int = 0
    precision: Precision = "fp32"
    decision: Decision = PLAIN
    until: float | None = None
    """Draw examples until the robust accuracy is known to within this; None: all of them."""
    suite: Suite | None = None
    """What runs before the attacks: under each threat model those of its norm."""
    backend: str = backends.NATIVE


@dataclass(frozen=True)
class Estimate:
    """What an evaluation will cost at most: an example that falls early costs less."""

    gradient_passes: int
    """A forward and a backward pass each, summed over the examples."""
    queries: int
    """Forward passes without a backward pass, summed over the examples."""
    seconds: float | None
    """From earlier evaluations of the same architecture on the same kind of device; None without any."""


def load_suite(name: str) -> Suite:
    """Return the suite of that name; its attacks are looked up at once, so a wrong one is an error of the file."""
    plugin = catalog.find("suites", name)
    try:
        suite = Suite.model_validate(plugin.facts)
        for attack in suite.attacks:
            attack_settings(attack)
        for certificate in suite.certificates:
            identify_certificate(certificate, sigma=1.0)
        for norm, own in (("Linf", suite.linf), ("L2", suite.l2)):
            for attack in own:
                identify_attack(attack, ThreatModel.parse(f"{norm}@1"))
    except (ValueError, UserError) as error:
        raise catalog.PluginError(plugin.path, f"is no valid suite: {error}") from None
    return suite


def attack_settings(text: str, decision: Decision = PLAIN) -> tuple[catalog.Plugin, dict[str, object]]:
    """Read `NAME` or `NAME:key=value,key=value`; return the attack and all its parameters.

    An attack on smoothed models that does not say its own noise takes that of the decision; then, unless it says how
    many noisy copies it averages, as many as vote, at most 25.
    """
    name, overrides = _assignments(text, "attack")
    plugin = catalog.find("attacks", name)
    inherited = _of_smoothing(decision) if "sigma" not in {*overrides, *plugin.preset} else {}
    own = plugin.parameters.keys() - plugin.preset.keys()
    return plugin, plugin.settings({**{k: v for k, v in inherited.items() if k in own}, **overrides})


def _of_smoothing(decision: Decision) -> dict[str, str]:
    """Return what attacks take over from a decision under noise, by parameter."""
    if decision.sigma == 0:
        return {}
    return {"sigma": str(decision.sigma), "copies": str(min(decision.votes, _MOST_COPIES))}


def is_weak_estimate(attack: AttackIdentity) -> bool:
    """Tell whether an attack on smoothed models follows a single noisy copy."""
    return bool(attack.parameters.get("sigma")) and attack.parameters.get("copies") == 1


def _assignments(text: str, kind: str) -> tuple[str, dict[str, str]]:
    """Read `NAME:key=value,key=value`; a value in brackets may hold commas."""
    name, colon, assignments = text.partition(":")
    example = {"attack": "steps=50,restarts=3", "certificate": "n=1000,alpha=0.01"}[kind]
    found: dict[str, str] = {}
    for assignment in re.split(r",(?![^\[]*\])", assignments) if colon else []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"{kind} {text!r}: {assignment!r} is not key=value; write {name}:{example}")
        found[key.strip()] = value.strip()
    return name.strip(), found


def identify_attack(
    text: str, threat: ThreatModel, decision: Decision = PLAIN, *, backend: str = backends.NATIVE
) -> AttackIdentity:
    """Return the attack with everything that can change its answer; refuse what it, or the backend, has no form for."""
    plugin, parameters = attack_settings(text, decision)
    if decision.top_k > 1 and "criterion" not in plugin.supplied:
        raise UserError(f"attack {plugin.name} has no form for top-{decision.top_k}, only for top-1")
    if threat.norm not in plugin.facts["norms"]:
        raise UserError(
            f"attack {plugin.name} has no form for {threat.norm}, only for {', '.join(plugin.facts['norms'])}"
        )
    name = canonical_name(plugin, parameters)
    implementation = backends.identify(backend, plugin, parameters, threat.norm)
    return AttackIdentity(name=name, entry=plugin.entry, parameters=parameters, **implementation)


def identify_certificate(text: str, *, sigma: float | None = None) -> CertificateIdentity:
    """Read `NAME` or `NAME:key=value,key=value`; `sigma` is the noise of those that do not say their own."""
    name, overrides = _assignments(text, "certificate")
    plugin = catalog.find("certificates", name)
    if sigma and "sigma" in plugin.parameters and "sigma" not in overrides and "sigma" not in plugin.preset:
        overrides["sigma"] = str(sigma)
    parameters = plugin.settings(overrides)
    return CertificateIdentity(
        name=_canonical(plugin, parameters, "certificates"),
        entry=plugin.entry,
        version=plugin.facts["version"],
        parameters=parameters,
    )


def guarantee_of(certificate: CertificateIdentity) -> str:
    """Return what a certificate's radii are, with its parameters' values."""
    text: str = catalog.find("certificates", certificate.entry).facts["guarantee"]
    return text.format(**certificate.parameters)


def is_minimum_norm(spec: EvalSpec) -> bool:
    """Tell whether the attack looks for the nearest adversarial example, whatever epsilon is."""
    content = spec.attack.parameters.get("stop_within_epsilon", False)
    return bool(catalog.find("attacks", spec.attack.entry).facts.get("minimum_norm", False)) and not content


def is_bounded(spec: EvalSpec) -> bool:
    """Tell whether epsilon bounds what counts: false for noise that has it as its scale."""
    return catalog.is_bounded(spec.attack.entry)


@functools.cache
def code_fingerprint() -> str:
    """Return 8 hexadecimal digits of the hash of everything that computes answers."""
    digest = hashlib.sha256()
    folders = ("attacks", "backends", "certification", "evaluation", "architectures")
    files = [p for folder in folders for p in (PACKAGE / folder).glob("*.py")]
    ground = "losses lp_geometry random_streams classifier compilation cpu_layers target voting smoothing_bounds"
    files += [PACKAGE / f"{name}.py" for name in ground.split()]
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def journal_key(spec: EvalSpec | CertificateSpec) -> str:
    """Return the name under which a question's finished shards wait for the others.

    Rows that other code computed never meet: after a change an interrupted evaluation begins anew.
    """
    return f"{spec.identity}.{code_fingerprint()}"


def canonical_name(plugin: catalog.Plugin, parameters: dict[str, object]) -> str:
    """Return the one name of an attack with these parameters, however it was typed.

    It is a preset's name only if all parameters are the preset's: `pgd-100:steps=1` is `pgd:steps=1`, and
    `pgd:steps=20` is `pgd-20`.
    """
    return _canonical(plugin, parameters, "attacks")


def _canonical(plugin: catalog.Plugin, parameters: Mapping[str, object], kind: str) -> str:
    family = [p for p in catalog.plugins(kind).values() if p.entry == plugin.entry]
    required = {key: parameters[key] for key, p in plugin.parameters.items() if p.required}
    for preset in family:
        if preset.preset and preset.settings(required) == parameters:
            return preset.name
    usual = catalog.find(kind, plugin.entry).settings(required)
    changed = [f"{key}={value}" for key, value in parameters.items() if value != usual[key]]
    return f"{plugin.entry}:{','.join(changed)}" if changed else plugin.entry


def plan(request: Request) -> list[EvalSpec]:
    """Return the questions in the order given, threat models outermost, each once.

    Raises UserError for a suite that has nothing for a threat model's norm.
    """
    specs = {}
    for threat in request.threats:
        own = request.suite.under(threat.norm) if request.suite else ()
        if request.suite and not own and not request.suite.certificates:
            raise UserError(f"the suite has no attack for {threat.norm} ({request.suite.summary}); choose another")
        for text in (*own, *request.attacks):
            spec = EvalSpec(
                model=request.model,
                examples=request.examples,
                threat=threat,
                attack=identify_attack(text, threat, request.decision, backend=request.backend),
                seed=request.seed,
                precision=request.precision,
                decision=request.decision,
                until=request.until,
            )
            backends.check(spec)
            specs[spec.identity] = spec
    return list(specs.values())


def estimate(
    spec: EvalSpec, earlier: Iterable[EvalRecord], device: str, *, classes: int = 2, done: int = 0
) -> Estimate:
    """Return the most that `spec` can still cost, in passes and, where something similar was measured, in seconds.

    Args:
        spec: the question.
        earlier: evaluations that were measured, of any model.
        device: the one that it will run on, as records name it.
        classes: how many the data set has; some attacks take a pass for each.
        done: examples that are answered already.
    """
    plugin = catalog.find("attacks", spec.attack.entry)
    gradients, queries = plugin.passes(spec.attack.parameters, classes=classes)
    rest = max(0, spec.examples.count - done)
    similar = [
        r.cost
        for r in earlier
        if r.spec.model.architecture == spec.model.architecture
        and r.spec.examples.dataset == spec.examples.dataset
        and r.provenance.device == device
        and r.cost.forward_passes
    ]
    if not similar:
        return Estimate(rest * gradients, rest * queries, None)
    # The gradient of an image costs about as much as its logits, so both kinds of pass are counted alike.
    per_pass = sum(c.seconds for c in similar) / sum(c.forward_passes + c.backward_passes for c in similar)
    return Estimate(rest * gradients, rest * queries, rest * (2 * gradients + queries) * per_pass)

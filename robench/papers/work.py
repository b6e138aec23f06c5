"""What it takes to fill a table: which models are to be made, and what is to be asked of them. Pure, without torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from robench import catalog, planning
from robench.errors import UserError
from robench.papers.definitions import (
    UNTRAINED,
    Facts,
    PaperTable,
    ScaleName,
    changes_at,
    has_recipe,
    load_table,
    model_of,
    scaled_name,
    scaled_recipe,
    threats_of,
)
from robench.recipe import Recipe
from robench.records import CertificateSpec, Decision, EvalSpec
from robench.threat_model import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Making:
    """A model that a table needs, or why it cannot be made."""

    model: str
    recipe: Recipe | None
    command: str
    """What makes this model alone."""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Questions about one model that share images and the way of deciding."""

    model: str
    split: str
    decision: Decision
    threat: ThreatModel | None
    """None: certificates only."""
    attacks: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Moving:
    """A matrix of transfers, or the part of it that a table has."""

    attack: str
    threat: ThreatModel
    pairs: tuple[tuple[str, str], ...]
    """(target, source)."""


def check_scale(table: str, scale: ScaleName) -> PaperTable:
    """Return the table; raise UserError where there is nothing to compute, or not at this scale."""
    found = load_table(table)
    if not any(facts.recipe and facts.needs is None for _, _, facts in found.entries()):
        raise UserError(f"table {table} has no row that robench computes ({found.summary}); see robench show {table}")
    if {f.measure for _, _, f in found.entries() if f.needs is None} == {"time"}:
        raise UserError(f"table {table} holds times; robench leaderboard {table} shows the commands that measure them")
    if found.kind == "hyperparameters":
        raise UserError(f"table {table} holds settings; robench leaderboard {table} shows ours beside them")
    if scale != "paper" and scale not in found.scales:
        raise UserError(f"table {table} has no {scale} scale; it has {', '.join(['paper', *found.scales])}")
    return found


def makings(table: str, scale: ScaleName) -> list[Making]:
    """Return the models of a table in the order in which they can be made: teachers first."""
    found = load_table(table)
    asked = [
        (model_of(facts), facts.recipe, facts.changes)
        for _, _, facts in found.entries()
        if facts.recipe and facts.needs is None and facts.measure not in UNTRAINED
    ]
    asked += [(source.model, source.recipe, source.changes) for source in found.sources]
    made: dict[str, Making] = {}
    for model, recipe, changes in asked:
        assert model is not None
        assert recipe is not None
        _make(model, recipe, changes, scale=scale, table=table, made=made)
    return list(made.values())


def _make(
    model: str, recipe: str, changes: tuple[str, ...], *, scale: ScaleName, table: str, made: dict[str, Making]
) -> None:
    name = scaled_name(model, scale)
    if name in made:
        return
    if not has_recipe(recipe):
        made[name] = Making(model=name, recipe=None, command="", problem=f"no recipe {recipe}")
        return
    try:
        resolved = scaled_recipe(recipe, changes, scale, table)
    except UserError as error:
        made[name] = Making(model=name, recipe=None, command="", problem=str(error))
        return
    own = scaled_recipe(recipe, changes, "paper", table)
    for other in (own.start, own.teacher):
        if other is not None and has_recipe(other):
            _make(other, other, (), scale=scale, table=table, made=made)
    made[name] = Making(
        model=name, recipe=resolved, command=command_for(name, recipe, changes_at(recipe, changes, scale, table))
    )


def command_for(model: str, recipe: str, changes: Iterable[str]) -> str:
    """Return the command that trains one model."""
    words = ["robench", "train", recipe, *(word for change in changes for word in ("--set", change))]
    return shlex.join([*words, *(["--out", model] if model != recipe else [])])


def askings(table: str, scale: ScaleName) -> list[Asking]:
    """Return the questions of a table, model by model, each once; those of transfers are :func:`movings`."""
    grouped: dict[tuple[str, str, Decision, ThreatModel | None], tuple[dict[str, None], dict[str, None]]] = {}
    for facts in _asked(load_table(table)):
        model = scaled_name(model_of(facts) or "", scale)
        decision = Decision(top_k=facts.top_k, votes=facts.votes, sigma=facts.sigma)
        attacked = facts.measure in {"robust", "distance", "relative-distance"}
        if attacked or (facts.measure == "average" and facts.source is None):
            assert facts.attack is not None
            for threat in threats_of(facts):
                grouped.setdefault((model, facts.split, decision, threat), ({}, {}))[0][facts.attack] = None
        if facts.measure in {"certificate", "certified"}:
            assert facts.certificate is not None
            grouped.setdefault((model, facts.split, Decision(), None), ({}, {}))[1][facts.certificate] = None
    return [
        Asking(
            model=model,
            split=split,
            decision=decision,
            threat=threat,
            attacks=tuple(attacks),
            certificates=tuple(certificates),
        )
        for (model, split, decision, threat), (attacks, certificates) in grouped.items()
    ]


def movings(table: str, scale: ScaleName) -> list[Moving]:
    """Return the transfers of a table."""
    grouped: dict[tuple[str, ThreatModel], dict[tuple[str, str], None]] = {}
    for facts in _asked(load_table(table)):
        if facts.source is None or facts.measure not in {"transfer", "average"}:
            continue
        pair = scaled_name(model_of(facts) or "", scale), scaled_name(facts.source, scale)
        for threat in threats_of(facts):
            grouped.setdefault((facts.attack or "", threat), {})[pair] = None
    return [Moving(attack=attack, threat=threat, pairs=tuple(pairs)) for (attack, threat), pairs in grouped.items()]


def _asked(table: PaperTable) -> list[Facts]:
    return [f for _, _, f in table.entries() if f.recipe and f.needs is None and f.measure not in UNTRAINED]


@dataclass(frozen=True)
class Passes:
    """What something takes at most: images through the network, with and without the way back."""

    gradient: int
    forward: int


def training_passes(recipe: Recipe) -> Passes | None:
    """Return what a training takes; None where the size of its data is not known without reading it."""
    data = catalog.plugins("datasets").get(recipe.dataset)
    if data is None or "images" not in data.facts:
        return None
    available = data.facts["images"]["train"] - data.facts["held_out"]
    images = min(recipe.train_examples or available, available)
    chosen = (recipe.defense, *recipe.regularizers)
    classes = len(data.facts["classes"]) or 1000
    each = sum(catalog.find("defenses", c.name).training_passes(c.parameters, classes=classes) for c in chosen)
    return Passes(each * images * recipe.total_epochs, 0)


def attack_passes(attack: str, dataset: str, examples: int | None, *, votes: int = 1) -> Passes | None:
    """Return what an attack takes at most; None where the size of its data is not known."""
    size = _size(dataset, examples)
    if size is None:
        return None
    plugin, parameters = planning.attack_settings(attack)
    return _attack_passes(plugin, parameters, *size, votes=votes)


def _attack_passes(
    plugin: catalog.Plugin, parameters: Mapping[str, Any], classes: int, examples: int, *, votes: int
) -> Passes:
    """Return what an attack takes at most.

    It searches the network itself; only the judge votes: on the image, on what was found, and on that in 8 bits. Where
    one pass decides, that is left out.
    """
    gradient, forward = plugin.passes(parameters, classes=classes)
    return Passes(gradient * examples, (forward + (3 * votes if votes > 1 else 0)) * examples)


def certificate_passes(certificate: str, dataset: str, examples: int | None) -> Passes | None:
    """Return what a certificate takes at most; None where the size of its data is not known."""
    size = _size(dataset, examples)
    if size is None:
        return None
    asked = planning.identify_certificate(certificate)
    forward, _ = catalog.find("certificates", asked.entry).passes(asked.parameters, classes=size[0])
    return Passes(0, forward * size[1])


def transfer_passes(examples: int) -> Passes:
    """Return what the target of a transfer takes at most: of the image, of what fooled the source, and of that in 8
    bits.
    """
    return Passes(0, 3 * examples)


def question_passes(spec: EvalSpec | CertificateSpec, *, classes: int) -> Passes:
    """Return what the answer to a question takes at most."""
    examples = spec.examples.count
    if isinstance(spec, CertificateSpec):
        asked = spec.certificate
        forward, _ = catalog.find("certificates", asked.entry).passes(asked.parameters, classes=classes)
        return Passes(0, forward * examples)
    plugin = catalog.find("attacks", spec.attack.entry)
    return _attack_passes(plugin, spec.attack.parameters, classes, examples, votes=spec.decision.votes)


def cell_passes(facts: Facts, dataset: str, examples: int | None) -> Passes | None:
    """Return what the answer to one cell takes at most; None where the size of its data is not known."""
    if facts.measure in {"certificate", "certified"}:
        return certificate_passes(facts.certificate or "", dataset, examples)
    if facts.attack is None or facts.measure == "clean":
        size = _size(dataset, examples)
        return Passes(0, size[1]) if size else None
    one = attack_passes(facts.attack, dataset, examples, votes=facts.votes)
    times = len(threats_of(facts))
    return Passes(times * one.gradient, times * one.forward) if one else None


def _size(dataset: str, examples: int | None) -> tuple[int, int] | None:
    """Return how many classes there are, and how many images are looked at."""
    data = catalog.plugins("datasets").get(dataset)
    if data is None or not (count := examples or data.facts.get("images", {}).get("test")):
        return None
    return len(data.facts["classes"]) or 1000, count


def datasets_of(table: str, scale: ScaleName) -> dict[str, str]:
    """Return what the models of a table classify, as their recipes say."""
    return {making.model: making.recipe.dataset for making in makings(table, scale) if making.recipe}


def evaluation_passes(table: str, scale: ScaleName) -> dict[str, list[Passes | None]]:
    """Return what the questions of a table take at most, each by itself, by the model that computes them; None where
    the size of its data is not known.

    Transfers are two kinds of work: a source makes its images once, and every target looks at them.
    """
    found = load_table(table)
    datasets = datasets_of(table, scale)
    asked: dict[str, list[Passes | None]] = {}
    for asking in askings(table, scale):
        if data := datasets.get(asking.model):
            own, examples = asked.setdefault(asking.model, []), found.examples_at(scale, data)
            own += [attack_passes(a, data, examples, votes=asking.decision.votes) for a in asking.attacks]
            own += [certificate_passes(c, data, examples) for c in asking.certificates]
    for moving in movings(table, scale):
        pairs = [pair for pair in moving.pairs if set(pair) <= datasets.keys()]
        for source in dict.fromkeys(source for _, source in pairs):
            passes = attack_passes(moving.attack, datasets[source], found.examples_at(scale, datasets[source]))
            asked.setdefault(source, []).append(passes)
        for target, _ in pairs:
            size = _size(datasets[target], found.examples_at(scale, datasets[target]))
            asked.setdefault(target, []).append(transfer_passes(size[1]) if size else None)
    return asked

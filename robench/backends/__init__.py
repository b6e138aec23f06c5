"""Backends: other libraries' attacks under robench's names and parameters, one file per library.

A backend is a thin adapter, ``search(model, images, labels, question) -> adversarial images``, and a table of what the
library can do that is read without importing it: what a question asks of a library is checked when it is planned,
before any work. The engine trusts a library no more than its own attacks: it measures distances and judges success.

The parameters are robench's. Each is

* translated: the library has it, every value means the same,
* fixed: the library does one thing (or a few), which must be what is asked for, or
* lacking: the library has no such thing. It must be turned off or left at its default, and then the record says so.

Where one value of a parameter decides what another may be, the library offers the attack in several forms.

A library draws its random numbers from the global generators, which are seeded by the examples of the batch and put
back afterwards: the same batch repeats exactly, another batch size may give other answers, and the record says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from robench import catalog
from robench.errors import UnknownName, UserError
from robench.records import AttackIdentity, EvalSpec

NATIVE = "native"


@dataclass(frozen=True)
class Offer:
    """One form in which a library has an attack."""

    norms: tuple[str, ...]
    translated: tuple[str, ...] = ()
    """Parameters that it has, whatever their value."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Parameters that it has no choice in, and the values that say what it does."""
    lacks: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of what it has not, and the value that turns that off. All that is not mentioned lacks, too."""
    notes: tuple[str, ...] = ()
    """What it does otherwise than robench, for the record."""

    def allows(self, name: str, usual: Any) -> tuple[Any, ...] | None:
        """Return the values that a parameter may have whose default is `usual`; None for any."""
        if name in self.translated:
            return None
        if name in self.fixed:
            return self.fixed[name]
        return tuple(dict.fromkeys([usual, self.lacks.get(name, usual)]))

    def ignored(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return the names of those parameters that ask for what the library has not."""
        mentioned = {*self.translated, *self.fixed, *(k for k, off in self.lacks.items() if parameters.get(k) == off)}
        return sorted(set(parameters) - mentioned)


def names() -> tuple[str, ...]:
    """Return all backends, robench's own first."""
    return (NATIVE, *catalog.plugins("backends"))


def offers(backend: str) -> Mapping[str, tuple[Offer, ...]]:
    """Return what a library offers, by the name of the attack's entry; raise UnknownName for an unknown backend."""
    if backend not in names():
        raise UnknownName("backend", backend, names())
    table = catalog.find("backends", backend).facts["offers"]
    return {attack: tuple(Offer(**form) for form in forms) for attack, forms in table.items()}


def norms(backend: str, attack: str) -> tuple[str, ...]:
    """Return the norms for which a library has an attack in any form."""
    return tuple(dict.fromkeys(norm for offer in offers(backend)[attack] for norm in offer.norms))


def offered(backend: str, attack: catalog.Plugin, parameters: Mapping[str, Any], norm: str) -> Offer:
    """Return what a library makes of an attack with these parameters; raise UserError where it cannot do that."""
    found = offers(backend)
    if attack.entry not in found:
        raise UserError(f"backend {backend} has no attack {attack.entry}; it has {', '.join(sorted(found))}")
    usual = catalog.find("attacks", attack.entry).settings()
    problems = []
    for offer in found[attack.entry]:
        problem = _mismatch(offer, norm, parameters, usual)
        if problem is None:
            return offer
        problems.append(problem)
    raise UserError(f"backend {backend} has {attack.entry} {', or '.join(dict.fromkeys(problems))}")


def _mismatch(offer: Offer, norm: str, parameters: Mapping[str, Any], usual: Mapping[str, Any]) -> str | None:
    """Return what keeps a form from being what is asked for, None for nothing."""
    if norm not in offer.norms:
        return f"for {', '.join(offer.norms)} only, not for {norm}"
    for name, value in parameters.items():
        allowed = offer.allows(name, usual[name])
        if allowed is not None and value not in allowed:
            return (
                f"with {' or '.join(f'{name}={_typed(choice)}' for choice in allowed)} only, not with {_typed(value)}"
            )
    return None


def identify(backend: str, attack: catalog.Plugin, parameters: Mapping[str, Any], norm: str) -> dict[str, Any]:
    """Return the fields of an AttackIdentity that name the implementation.

    Raises UserError where the library cannot do what is asked for, or is not installed.
    """
    if backend == NATIVE:
        return {"version": attack.facts["version"]}
    offered(backend, attack, parameters, norm)
    return {"version": catalog.find("backends", backend).facts["version"], "backend": f"{backend} {installed(backend)}"}


def installed(backend: str) -> str:
    """Return the version of a library that is installed; raise UserError, which says how to get it."""
    distribution = catalog.find("backends", backend).facts["distribution"]
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"backend {backend} is not installed; pip install {distribution}") from None


def check(spec: EvalSpec) -> None:
    """Raise UserError where a library cannot answer a question as it is put, whatever the attack."""
    if spec.attack.backend == NATIVE:
        return
    backend = spec.attack.library
    precisions = catalog.find("backends", backend).facts["precisions"]
    if spec.precision not in precisions:
        raise UserError(f"backend {backend} searches in {' or '.join(precisions)} only, not in {spec.precision}")
    if spec.decision.top_k != 1 or not spec.decision.plain:
        raise UserError(f"backend {backend} attacks top-1 decisions of one forward pass only; use backend {NATIVE}")


def attack_of(identity: AttackIdentity, norm: str) -> Callable[..., Any]:
    """Return the function that answers for `identity` in a norm, called as every attack is:
    ``attack(model, images, labels, *, threat, random, **parameters)``.

    Raises UserError where another version of the library is installed than the one that is asked for.
    """
    attack = catalog.find("attacks", identity.entry)
    if identity.backend == NATIVE:
        found: Callable[..., Any] = attack.load().attack
        return found
    if (here := f"{identity.library} {installed(identity.library)}") != identity.backend:
        raise UserError(f"backend {identity.backend} is asked for, but {here} is installed")
    offer = offered(identity.library, attack, identity.parameters, norm)
    notes = [f"{identity.library} {note}" for note in offer.notes]
    if ignored := offer.ignored(identity.parameters):
        notes.append(f"{identity.library} has no {', '.join(ignored)} of {identity.entry}, and goes without")
    notes.append(
        f"random numbers of {identity.library}, where it draws any, belong to the batch: another batch size may give "
        "other answers"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about what they import
        search = catalog.find("backends", identity.library).load().search
    # By name: this module is read where torch is not.
    adapted: Callable[..., Any] = importlib.import_module("robench.backends._running").Adapted(
        search, identity.library, identity.entry, bool(attack.facts.get("minimum_norm")), notes
    )
    return adapted


def _typed(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)

"""Models and records of the table atent-2, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from synthetic import card, first_of, put, sha, spec

from robench.papers.definitions import ScaleName, scaled_recipe
from robench.papers.filling import FilledTable, Filler
from robench.planning import identify_attack
from robench.records import EvalRecord, EvalSpec
from robench.store import Results, Store, StoredCard
from robench.threat_model import ThreatModel

LINF = "Linf@0.3"
PGD, CW = "pgd-20:step_size=0.01", "cw-linf"


class World:
    """A workspace in which records and cards are written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "reports")
        self.cards: dict[str, StoredCard] = {}

    def model(
        self,
        name: str,
        like: str | None = None,
        *,
        scale: ScaleName = "paper",
        table: str = "atent-2",
        settings: tuple[str, ...] = (),
        **changes: Any,
    ) -> None:
        """Write a card: of the recipe `like` with these settings at that scale, unless other values are given."""
        made = scaled_recipe(like, settings, scale, table) if like else None
        stored = card(self.folder / "zoo" / name, name, scale=made.scale if made else None)
        facts = {"recipe": made.model_dump(mode="json") if made else None, **changes}
        self.cards[name] = StoredCard(stored.folder, stored.card.model_copy(update=facts))

    def answer(self, model: str, attack: str, robust: Any, *, threat: str = LINF, **options: Any) -> EvalRecord:
        """Write the answer to a question."""
        asked = {k: options.pop(k) for k in ("weights", "version", "count", "split_size", "seed") if k in options}
        return put(self.store, question(model, attack, threat=threat, count=len(robust), **asked), robust, **options)

    @property
    def results(self) -> Results:
        return self.store.results(self.cards)

    def fill(self, table: str = "atent-2") -> FilledTable:
        return Filler(self.results).fill(table)


def question(model: str, attack: str, *, threat: str = LINF, version: int | None = None, **changes: Any) -> EvalSpec:
    identity = identify_attack(attack, ThreatModel.parse(threat))
    if version is not None:
        identity = identity.model_copy(update={"version": version})
    changes.setdefault("split_size", 10_000)
    return spec(model, threat=threat, **changes).model_copy(update={"attack": identity})


def full_world(folder: Path) -> World:
    """Two models at the paper's scale, one reduced, one smoke, one whose attack failed, one trained otherwise."""
    world = World(folder)
    scale: ScaleName
    everything = np.random.default_rng(0)
    for name, recipe, scale, n, robust in (
        ("trades-mnist", "trades-mnist", "paper", 10_000, 9607),
        ("mart-mnist", "mart-mnist", "paper", 10_000, 9300),
        ("atent-linf-mnist-reduced", "atent-linf-mnist", "reduced", 1000, 700),
        ("atent-sgd-mnist-smoke", "atent-sgd-mnist", "smoke", 50, 3),
    ):
        world.model(name, recipe, scale=scale)
        clean = first_of(n, n - n // 100)
        stands = first_of(n, robust)
        world.answer(name, PGD, stands, clean=clean)
        world.answer(name, CW, stands & (everything.random(n) > 0.01), clean=clean)
    world.model("atent-entropysgd-mnist", "atent-entropysgd-mnist")
    world.answer("atent-entropysgd-mnist", PGD, first_of(10_000, 100), clean=first_of(10_000, 9900))
    world.answer("atent-entropysgd-mnist", CW, first_of(10_000, 3000), clean=first_of(10_000, 9900), failed=True)
    return world


__all__ = ["CW", "LINF", "PGD", "World", "full_world", "question", "sha"]

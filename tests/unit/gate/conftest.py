"""A workspace with a baseline of made-up answers, and new answers to compare."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from robench.gate import baseline as baselines
from robench.gate.verdicts import Candidates, Rules, check
from robench.planning import identify_certificate
from robench.store import Store
from robench.workspace import Workspace
from tests import synthetic


@dataclass
class Bench:
    """One model, `m`, under its old and its new weights; it has no card, so its newest record says which are new."""

    place: Workspace
    store: Store
    path: object
    old: list = field(default_factory=list)
    problems: dict = field(default_factory=dict)

    def spec(self, weights="old", **changes):
        return synthetic.spec("m:factory", weights=weights, **{"count": 1000, **changes})

    def put(self, robust, weights="old", **options):
        names = ("attack", "count", "threat", "parameters", "seed", "dataset", "split_size")
        changes = {name: options.pop(name) for name in names if name in options}
        record = self._dated(synthetic.record, weights, options)
        question = self.spec(weights, **{"count": len(robust), **changes})
        outcomes = synthetic.rows(robust, clean=options.pop("clean", None))
        answer = record(question, outcomes, **options)
        self.store.write(answer, outcomes)
        if weights == "old":
            self.old.append(answer)
        return answer

    @staticmethod
    def _dated(make, weights, options):
        day = "2026-01-02" if weights == "old" else "2026-02-02"
        status = options.pop("status", None)

        def made(question, outcomes, **rest):
            answer = make(question, outcomes, **rest)
            provenance = answer.provenance.model_copy(update={"finished": f"{day}T00:00:00Z"})
            changes = {"provenance": provenance} | ({"status": status} if status else {})
            return answer.model_copy(update=changes)

        return made

    def set(self):
        self.path.write_text(baselines.made_of(self.old, self.store, self.path.parent).to_toml())
        return baselines.read(self.path)

    def check(self, **rules):
        known = baselines.read(self.path)
        models = dict.fromkeys(e.model for e in known.entries)
        candidates = Candidates(self.store, self.place, {m: m for m in models}, {}, self.problems)
        return check(known, self.path, candidates, Rules(**rules))


@pytest.fixture
def bench(tmp_path):
    store = Store(tmp_path / "reports")
    store.root.mkdir()
    place = Workspace(root=tmp_path, data_root=tmp_path / "data", user_zoo=tmp_path / "zoo")
    return Bench(place, store, store.root / "baseline.toml")


def standing(n, count, *, start=0):
    """A mask of `n` examples of which `count` stand, those before `start` not."""
    return (np.arange(n) >= start) & (np.arange(n) < start + count)


def cohen(sigma=0.25):
    return identify_certificate("cohen", sigma=sigma)

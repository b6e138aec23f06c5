"""One search answers every epsilon, exactly as a search at that epsilon would."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from robench.evaluation.campaign import Campaign, Execution
from robench.evaluation.deriving import at_epsilon, origin_of
from robench.planning import is_minimum_norm
from robench.records import Decision
from robench.store import Store
from robench.threat_model import ThreatModel
from tests.unit.evaluation.test_campaign import Watcher
from tests.unit.evaluation.test_merging import MADE

pytestmark = pytest.mark.usefixtures("nearest")


@pytest.fixture
def campaign(model, images, tmp_path):
    def make(folder="reports", command="robench eval"):
        made = MADE.model_copy(update={"command": command})
        execution = Execution(device=torch.device("cpu"), provenance=lambda: made, batch_size=64, shard_size=100)
        return Campaign(model, images, store=Store(tmp_path / folder), execution=execution, progress=Watcher())

    return make


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_derived_answer_is_the_computed_one(campaign, spec_of, norm):
    near, far = (spec_of("nearest", f"{norm}@{epsilon}") for epsilon in ("0.05", "0.15"))
    for (known, ids), (asked, _) in ((near, far), (far, near)):
        first, computed = campaign(known.identity), campaign(f"{known.identity} straight")
        (origin,) = first.answer([known], ids)
        (derived,) = first.answer([asked], ids)
        (expected,) = computed.answer([asked], ids)
        assert first.progress.computed == len(ids), "the second question costs nothing"
        assert computed.progress.computed == len(ids)
        assert origin.robust != derived.robust
        ignored = {"cost", "notes", "provenance", "diagnostics"}
        assert derived.model_dump(exclude=ignored) == expected.model_dump(exclude=ignored)
        assert derived.members, "credits at every distance survive a search at a smaller epsilon"
        assert derived.cost == origin.cost
        assert derived.notes == (
            f"follows from the rows of record {known.identity} ({known.threat}): the search does not depend on epsilon",
        )
        *looked_at, eight_bit = derived.diagnostics
        assert [d.name for d in derived.diagnostics] == [d.name for d in expected.diagnostics]
        assert eight_bit == expected.diagnostics[-1], "its own rows tell"
        assert {d.verdict for d in looked_at} == {"not applicable"}, "none of them was looked at, so none is ok"
        assert all(
            d.evidence.startswith(f"not examined: the rows are those of record {known.identity}") for d in looked_at
        )
        rows, straight = first.store.outcomes(derived), computed.store.outcomes(expected)
        assert all((rows[name] == straight[name]).all() for name in rows)


def test_a_derived_record_names_the_search_not_another_derived_record(campaign, spec_of):
    questions = [spec_of("nearest", f"Linf@{epsilon}")[0] for epsilon in ("0.15", "0.05", "0.1")]
    _, ids = spec_of()
    runs = campaign()
    origin, first = runs.answer(questions[:2], ids)
    (runs.store.record_path(origin.spec)).unlink()
    (second,) = campaign(command="robench again").answer(questions[2:], ids)
    assert second.notes == first.notes
    assert origin.spec.identity in second.notes[0]
    assert (second.provenance.command, second.provenance.code) == ("robench again", MADE.code)


def test_only_epsilon_may_differ(campaign, spec_of):
    asked, ids = spec_of("nearest", "Linf@0.05")
    runs = campaign()
    runs.answer([asked], ids)
    other = asked.model_copy(update={"threat": ThreatModel.parse("Linf@0.1")})
    assert origin_of(other, runs.store) is not None
    model = asked.model.model_copy(update={"weights_sha256": "1" * 64})
    newer = asked.attack.model_copy(update={"version": 2})
    for change in (
        {"threat": ThreatModel.parse("L2@0.1")},
        {"seed": 1},
        {"model": model},
        {"attack": newer},
        {"precision": "fp32"},
        {"until": 0.01},
        {"decision": Decision(top_k=2)},
        {"decision": Decision(votes=3, sigma=0.1)},
    ):
        assert origin_of(other.model_copy(update=change), runs.store) is None, change
    content = other.attack.model_copy(update={"parameters": {"stop_within_epsilon": True}})
    assert is_minimum_norm(other)
    assert not is_minimum_norm(other.model_copy(update={"attack": content})), "it looks at epsilon"
    (path,) = (runs.store.root / "records").glob("*/*.json")
    path.write_text("{")
    assert origin_of(other, runs.store) is None, "a damaged record implies nothing, and stops nothing"


def test_fixed_budgets_imply_nothing(campaign, spec_of):
    (near, ids), (far, _) = (spec_of("pgd-10", f"Linf@{epsilon}") for epsilon in ("0.05", "0.1"))
    runs = campaign()
    runs.answer([near], ids)
    runs.answer([far], ids)
    assert runs.progress.computed == 2 * len(ids)


def test_the_ball_has_the_tolerance_of_the_engine():
    length = np.array([0.1, 0.1 + 0.9e-6, 0.1 + 1.1e-6, 0.05, 0.05, 0.0])
    rows = {
        "linf": length,
        "attacked": np.array([1, 1, 1, 1, 1, 0], bool),
        "broken": np.array([1, 1, 1, 1, 0, 1], bool),
        "robust": np.ones(6, bool),
    }
    assert at_epsilon(rows, ThreatModel.parse("Linf@0.1"))["robust"].tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert rows["robust"].all(), "the origin's rows stay as they are"


def test_images_are_computed_where_they_are_to_be_saved(campaign, spec_of):
    (near, ids), (far, _) = (spec_of("nearest", f"Linf@{epsilon}") for epsilon in ("0.05", "0.1"))
    runs = campaign()
    runs.answer([near], ids)
    saving = campaign()
    saving.execution = dataclasses.replace(saving.execution, save_adversarials=True)
    saving.answer([far], ids)
    assert saving.progress.computed == len(ids)
    assert saving.files.path(far).exists()

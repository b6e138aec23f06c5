"""A record that says anything else than its rows is found out, whatever it says, and so are rows that cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import (
    card,
    certificate_spec,
    first_of,
    proportion,
    put,
    put_certificate,
    put_minimum_norm,
    put_timing,
    put_transfer,
    record,
    rows,
    spec,
)

from robench import cli
from robench.auditing import contradiction
from robench.errors import UnsafeFile, UserError
from robench.records import EvalRecord
from robench.statistics import wilson
from robench.store import Store

ROOT = Path(__file__).parents[2]
CLEAN = first_of(50, 48)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def honest(threat: str = "Linf@0.3") -> tuple[EvalRecord, dict[str, np.ndarray]]:
    asked, answers = spec("a", threat=threat), rows(first_of(50, 30), clean=CLEAN)
    answers[asked.threat.norm.lower()] = np.minimum(answers[asked.threat.norm.lower()], asked.threat.radius)
    return record(asked, answers), answers


def test_honest_records_of_every_kind_pass(store: Store) -> None:
    put(store, spec("a"), first_of(50, 30), clean=CLEAN)
    put_minimum_norm(store, spec("a", "ddn", threat="L2@0.5"), [*np.linspace(0.1, 2, 40), *[np.inf] * 10])
    put_transfer(store, spec("a"), spec("b").model, first_of(50, 20))
    put_certificate(store, certificate_spec())
    for hits in (0, 50):
        put(store, spec(f"all-{hits}"), first_of(50, hits))
    results = store.results({})
    for stored in (*results.records, *results.transfers, *results.certificates):
        assert contradiction(stored.record, store.outcomes(stored.record)) is None
    results.check()


@pytest.mark.parametrize("root", [ROOT / "reports", ROOT / "reports" / "engine"], ids=["reports", "engine"])
def test_every_committed_record_is_borne_out_by_its_rows(root: Path) -> None:
    results = Store(root).results({})
    assert results.records
    results.check()


SAYINGS: dict[str, tuple[dict[str, Any], str]] = {
    "robust": ({"robust": proportion(49, 50)}, "robust 49 of 50, by the rows 30 of 50"),
    "clean": ({"clean": proportion(50, 50)}, "clean 50 of 50, by the rows 48 of 50"),
    "of fewer": ({"robust": proportion(30, 49)}, "robust 30 of 49"),
    "another value": ({"robust": proportion(30, 50).model_copy(update={"value": 0.98})}, "robust share 0.98"),
    "another Wilson bound": (
        {"robust": proportion(30, 50).model_copy(update={"wilson": (0.59, 0.61)})},
        "Wilson bound of the robust share 0.59",
    ),
    "another exact interval": (
        {"robust": proportion(30, 50).model_copy(update={"clopper_pearson": wilson(30, 50)})},
        "robust 30 of 50 with the Clopper-Pearson interval",
    ),
    "another distance": ({"median_distance": 0.2}, "median distance 0.2, by the rows 0.3"),
    "no distance": ({"median_distance": None}, "median distance None"),
}


@pytest.mark.parametrize("case", SAYINGS)
def test_what_the_rows_do_not_say(case: str) -> None:
    answer, answers = honest()
    assert contradiction(answer, answers) is None
    changes, told = SAYINGS[case]
    assert told in (contradiction(answer.model_copy(update=changes), answers) or "")


@pytest.mark.parametrize("hits", [0, 1, 25, 49, 50])
@pytest.mark.parametrize("which", [0, 1])
def test_exact_intervals_are_told_from_their_neighbours(hits: int, which: int) -> None:
    answers = rows(first_of(50, hits))
    answer = record(spec("a"), answers)
    assert contradiction(answer, answers) is None
    bounds = list(answer.robust.clopper_pearson)
    bounds[which] = abs(bounds[which] - 1e-4)
    other = answer.robust.model_copy(update={"clopper_pearson": tuple(bounds)})
    assert "Clopper-Pearson" in (contradiction(answer.model_copy(update={"robust": other}), answers) or "")


def wrong_and_robust(answers: dict[str, np.ndarray]) -> None:
    answers["robust"][[49, 0]] = [True, False]


def nan_distance(answers: dict[str, np.ndarray]) -> None:
    answers["linf"][40] = np.nan


def negative_distance(answers: dict[str, np.ndarray]) -> None:
    answers["linf"][40] = -1.0


def outside(answers: dict[str, np.ndarray]) -> None:
    answers["linf"][40] = 0.31


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (wrong_and_robust, "example 49 is robust and was wrong without an attack"),
        (nan_distance, "example 40 fell at a distance of nan"),
        (negative_distance, "example 40 fell at a distance of -1"),
        (outside, r"example 40 fell at 0.31, outside Linf@0.3"),
    ],
)
def test_rows_that_cannot_be(spoil: Callable[[dict[str, np.ndarray]], None], told: str) -> None:
    _, answers = honest()
    spoil(answers)
    # Whoever edits rows can make the record that follows from them.
    assert told in (contradiction(record(spec("a"), answers), answers) or "")


def test_a_distance_of_examples_that_all_stand() -> None:
    answers = rows(first_of(50, 50))
    answer = record(spec("a"), answers)
    assert contradiction(answer, answers) is None
    said = answer.model_copy(update={"median_distance": 0.1})
    assert "median distance 0.1, by the rows None" in (contradiction(said, answers) or "")


def test_noise_without_a_bound_may_lie_anywhere() -> None:
    answers = rows(first_of(50, 30))
    answers["linf"] = np.where(answers["robust"], 0.0, 2.0)
    asked = spec("a", "lrc-noise")
    noise = asked.model_copy(update={"attack": asked.attack.model_copy(update={"entry": "lrc-noise"})})
    assert contradiction(record(noise, answers), answers) is None
    assert "outside" in (contradiction(record(spec("a", "pgd-20"), answers), answers) or "")


def test_minimum_norms(store: Store) -> None:
    answer = put_minimum_norm(store, spec("a", "ddn", threat="L2@0.5"), [*np.linspace(0.1, 2, 40), *[np.inf] * 10])
    answers = store.outcomes(answer)
    assert answer.distances is not None
    for changes, told in (
        ({"median": 0.1}, "median of all distances 0.1"),
        ({"mean_found": 0.1}, "mean distance 0.1"),
        ({"found": 50}, "50 of 50 were broken, by the rows 40 of 50"),
    ):
        said = answer.model_copy(update={"distances": answer.distances.model_copy(update=changes)})
        assert told in (contradiction(said, answers) or "")
    answers["l2"][45] = np.nan
    assert contradiction(answer, answers) is None, "it was not broken: whatever stands there is not read"
    answers["l2"][39] = np.nan
    assert "example 39 was broken at a distance of nan" in (contradiction(answer, answers) or "")


def test_certificates(store: Store) -> None:
    answer = put_certificate(store, certificate_spec())
    answers = store.outcomes(answer)
    assert answer.radii is not None
    for changes, told in (
        ({"average_radius": 5.0}, "average radius 5, by the rows 0.29"),
        ({"radii": answer.radii.model_copy(update={"maximum": 9.9})}, "maximum of the correct radii 9.9"),
        ({"radii": None}, "no radius is correct, by the rows 7"),
        ({"correct": proportion(10, 10)}, "correct 10 of 10, by the rows 7 of 10"),
    ):
        assert told in (contradiction(answer.model_copy(update=changes), answers) or "")
    # 100,100 samples at sigma 0.25 and alpha 0.001 reach 0.953.
    far = put_certificate(store, certificate_spec("b"), radius=[0.0, 0.0, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.96])
    told = contradiction(far, store.outcomes(far)) or ""
    assert "example 9 has a radius of 0.96, which 100,100 samples at sigma 0.25 cannot show" in told
    negative = put_certificate(store, certificate_spec("c"), radius=[-0.1, *[0.1] * 9])
    assert "example 0 has a radius of -0.1" in (contradiction(negative, store.outcomes(negative)) or "")


def test_the_remedy_for_a_damaged_record_is_a_command_that_there_is(store: Store) -> None:
    commands = {command.name for command in cli.app.registered_commands}
    put(store, spec("a"), first_of(50, 30))
    put_transfer(store, spec("a"), spec("b").model, first_of(50, 20))
    put_certificate(store, certificate_spec())
    put_timing(store, "a")
    for kind, read in (
        ("records", store.records),
        ("transfers", store.transfers),
        ("certificates", store.certificates),
        ("timings", store.timings),
    ):
        (path,) = (store.root / kind).rglob("*.json")
        path.write_text("{}")
        with pytest.raises(UserError) as told:
            list(read())
        (command,) = re.findall(r"run robench (\w+) again", str(told.value))
        assert command in commands


def test_labels_of_the_same_images_agree(store: Store) -> None:
    put(store, spec("a"), first_of(50, 30))
    answers = rows(first_of(50, 30))
    answers["label"] = (answers["label"] + 1) % 10
    answers["clean_prediction"] = answers["label"].copy()
    store.write(record(spec("b"), answers), answers)
    with pytest.raises(UnsafeFile, match=r"image 0 has the label 1, and 0 in .*; restore it, or delete it"):
        store.results({}).check()


def test_rows_are_of_images_of_the_split(store: Store) -> None:
    answers = rows(first_of(50, 30))
    answers["example_id"] = answers["example_id"] + 1
    store.write(record(spec("b"), answers), answers)
    with pytest.raises(UnsafeFile, match="images that a split of 50 has not"):
        store.results({}).check()


def test_the_leaderboard_names_the_file_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "reports")
    card(tmp_path / "model_zoo" / "a", "a")
    put(store, spec("a"), first_of(50, 30))
    path = store.record_path(spec("a"))
    said = json.loads(path.read_text())
    said["robust"] = json.loads(proportion(49, 50).model_dump_json())
    path.write_text(json.dumps(said))
    assert cli.run(["leaderboard", "--workspace", str(tmp_path)]) != 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{path}: robust 49 of 50, by the rows 30 of 50; restore it and" in told
    assert not (tmp_path / "reports" / "leaderboards").exists()

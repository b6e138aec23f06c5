"""Certified accuracy and radii, by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from synthetic import CERTIFIED_RADIUS as RADIUS
from synthetic import card, certificate_spec, put, put_certificate, spec

from robench.errors import UnsafeFile
from robench.evaluation.soundness import contradictions
from robench.leaderboards.certification import certification
from robench.records import CertificateSpec
from robench.store import Store
from robench.tables import Curves


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def asked(model: str = "a", certificate: str = "cohen", *, sigma: float = 0.25) -> CertificateSpec:
    return certificate_spec(model, certificate, sigma=sigma)


def cells(table, model):
    row = next(row for row in table.rows if row[1].value == model)
    return {column.key: cell for column, cell in zip(table.columns, row, strict=True)}


def test_statistics_by_hand(store: Store) -> None:
    put_certificate(store, asked())
    (table,) = certification(store.results({}))
    found = cells(table, "a")
    assert table.name.startswith("certification-cohen-")
    assert found["correct"].value == 0.7
    assert found["abstained"].value == 0.2
    assert found["plain"].value == 1.0
    assert found["average"].value == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.8) / 10)
    assert found["median"].value == pytest.approx(0.4)
    assert found["mean"].value == pytest.approx(2.9 / 7)
    assert found["maximum"].value == 0.8
    # A radius of exactly 0.5 is not above 0.5; the wrong answer's radius of 0.9 counts nowhere.
    assert (found["at 0.25"].value, found["at 0.5"].value, found["at 0.75"].value) == (0.5, 0.2, 0.1)
    assert "at 1" not in found
    assert found["answered at 0.25"].value == pytest.approx(5 / 8)
    assert found["samples"].value == 100_100
    assert "sigma 0.25" in table.reading[0]


def test_the_curve_falls_where_radii_end(store: Store) -> None:
    put_certificate(store, asked())
    (table,) = certification(store.results({}))
    (figure,) = table.figures
    assert isinstance(figure, Curves)
    (curve,) = figure.curves
    assert curve.y[0] == 0.7
    assert dict(zip(curve.x, curve.y, strict=True))[0.5] == pytest.approx(0.2)
    assert curve.y[-1] == 0.0


def test_models_of_one_question_share_a_table_and_other_noise_makes_another(store: Store) -> None:
    put_certificate(store, asked("a"))
    put_certificate(store, asked("b"), radius=[r * 1.05 for r in RADIUS])
    put_certificate(store, asked("a", sigma=0.5))
    first, second = certification(store.results({}))
    assert [row[1].value for row in first.rows] == ["b", "a"]
    assert [row[0].value for row in first.rows] == [1, 2]
    assert len(second.rows) == 1


def test_predictions_without_radii_rank_by_what_is_correct(store: Store) -> None:
    put_certificate(store, asked("a", "smoothed-prediction"), radius=[0.0] * 10)
    put_certificate(store, asked("b", "smoothed-prediction"), radius=[0.0] * 10, prediction=[1] * 10)
    (table,) = certification(store.results({}))
    assert [row[1].value for row in table.rows] == ["b", "a"]
    assert table.figures == ()


def test_written_once_and_damaged_rows_are_refused(store: Store) -> None:
    record = put_certificate(store, asked())
    before = hashlib.sha256(store.certificate_path(asked()).read_bytes()).hexdigest()
    put_certificate(store, asked(), radius=[0.0] * 10)
    assert hashlib.sha256(store.certificate_path(asked()).read_bytes()).hexdigest() == before
    assert store.find_certificate(asked()) == record
    store.outcomes_path(record).write_bytes(b"other")
    with pytest.raises(UnsafeFile, match="outcomes_sha256"):
        store.outcomes(record)


def test_an_attack_inside_a_radius_is_named(store: Store) -> None:
    record = put_certificate(store, asked())
    attack = put(store, spec("a", "ddn", threat="L2@1", count=10), np.zeros(10, bool))
    outcomes = {**store.outcomes(attack)}
    outcomes["broken"] = np.ones(10, bool)
    outcomes["attacked"] = np.ones(10, bool)
    outcomes["l2"] = np.full(10, 0.55)
    found = contradictions(record, store.outcomes(record), attack, outcomes)
    # Radii of 0.6 and 0.8 promise more; the wrong answer's 0.9 promises nothing of the label.
    assert [sentence.split(":")[0] for sentence in found] == ["example 8", "example 9"]
    assert "guarantees 0.8" in found[1]
    outcomes["l2"] = np.full(10, 0.81)
    assert contradictions(record, store.outcomes(record), attack, outcomes) == []


def test_margins_that_no_image_can_have_do_not_rank(store: Store, tmp_path: Path) -> None:
    known = {name: card(tmp_path / name, name) for name in ("collapsed", "sound")}
    for name, largest in (("sound", 200.0), ("collapsed", 1e20)):
        put_certificate(store, asked(name, "effective-margin"), radius=[*RADIUS[:-1], largest], prediction=[1] * 10)
    (table,) = certification(store.results(known))
    assert [row[1].value for row in table.rows] == ["sound", "collapsed"]
    rank, note = table.rows[1][0].value, table.rows[1][0].note
    assert rank is None
    assert note == "1.0e+19 on average, where no two images are farther apart than 28"
    (figure,) = table.figures
    assert isinstance(figure, Curves)
    assert [curve.title for curve in figure.curves] == ["sound"]

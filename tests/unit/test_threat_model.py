"""Radii are exact, and wrong ones are refused with the remedy."""

from __future__ import annotations

from fractions import Fraction

import pytest

from robench.errors import UserError
from robench.threat_model import ThreatModel, epsilon_text, fraction_text


@pytest.mark.parametrize(
    ("text", "norm", "epsilon", "shown"),
    [
        ("Linf@8/255", "Linf", Fraction(8, 255), "Linf@8/255"),
        ("linf@0.031", "Linf", Fraction(31, 1000), "Linf@0.031"),
        ("L2@0.5", "L2", Fraction(1, 2), "L2@0.5"),
        (" l2 @ 1/2 ", "L2", Fraction(1, 2), "L2@0.5"),
        ("L2@3", "L2", Fraction(3), "L2@3"),
        ("Linf@1e-3", "Linf", Fraction(1, 1000), "Linf@0.001"),
    ],
)
def test_reads_and_writes(text, norm, epsilon, shown):
    threat = ThreatModel.parse(text)
    assert (threat.norm, threat.epsilon, str(threat)) == (norm, epsilon, shown)
    assert ThreatModel.parse(str(threat)) == threat
    assert ThreatModel.model_validate_json(threat.model_dump_json()) == threat


def test_different_radii_are_different_questions():
    assert ThreatModel.parse("Linf@0.031") != ThreatModel.parse("Linf@8/255")
    assert ThreatModel.parse("L2@0.5") == ThreatModel.parse("L2@1/2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("8/255", "NORM@EPSILON"),
        ("L1@8/255", "NORM@EPSILON"),
        ("Linf@", "no number"),
        ("Linf@eight", "'eight' is no number"),
        ("Linf@8/0", "'8/0' is no number"),
        ("Linf@0", "must be positive"),
        ("Linf@-8/255", "must be positive"),
        ("Linf@nan", "'nan' is no number"),
        ("Linf@8", "write 8/255"),
    ],
)
def test_wrong_ones_are_refused(text, problem):
    with pytest.raises(UserError, match="threat model") as caught:
        ThreatModel.parse(text)
    assert problem in str(caught.value)


def test_fraction_text_is_exact():
    for value in (Fraction(8, 255), Fraction(1, 3), Fraction(3, 10), Fraction(31, 1000), Fraction(1)):
        assert Fraction(fraction_text(value)) == value


@pytest.mark.parametrize("text", ["24/255", "8/255", "0.3", "0.2", "2", "1/7"])
def test_readers_see_a_radius_as_it_is_written(text):
    value = Fraction(text)
    assert epsilon_text(value) == text
    assert str(ThreatModel(norm="L2", epsilon=value)) == f"L2@{text}"
    # What questions are hashed by stays as it was.
    assert ThreatModel(norm="L2", epsilon=value).model_dump(mode="json")["epsilon"] == fraction_text(value)

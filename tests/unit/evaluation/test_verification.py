"""Every way an answer can be invalid is found, and valid ones pass."""

from __future__ import annotations

import pytest
import torch

from robench.evaluation.verification import find_violation
from robench.threat_model import ThreatModel
from tests.models import pictures

LINF, L2 = ThreatModel.parse("Linf@8/255"), ThreatModel.parse("L2@0.5")
IMAGES = pictures(3).float()


def moved(by, row=1):
    changed = IMAGES.clone()
    changed[row, 0, 0, 0] += by
    return changed


@pytest.mark.parametrize(
    ("answer", "threat", "kind"),
    [
        (IMAGES[:2], LINF, "wrong-shape"),
        ((IMAGES * 255).to(torch.uint8), LINF, "wrong-shape"),
        (moved(float("nan")), LINF, "not-a-number"),
        (moved(float("inf")), LINF, "not-a-number"),
        (moved(0.7), LINF, "outside-box"),
        (moved(-0.7), LINF, "outside-box"),
        (moved(8 / 255 + 1e-5), LINF, "outside-ball"),
        (IMAGES + 0.5001 / 4, L2, "outside-ball"),
    ],
)
def test_violations_are_found(answer, threat, kind):
    violation = find_violation(answer, IMAGES, threat)
    assert violation is not None
    assert violation.kind == kind


def test_the_example_that_is_worst_is_named():
    assert "row 1" in find_violation(moved(0.04), IMAGES, LINF).message


@pytest.mark.parametrize("answer", [IMAGES, moved(8 / 255), moved(-8 / 255), IMAGES[:0]])
def test_valid_answers_pass(answer):
    assert find_violation(answer, IMAGES[: len(answer)], LINF) is None
    assert find_violation(IMAGES[: len(answer)] + 0.5 / 4, IMAGES[: len(answer)], L2) is None

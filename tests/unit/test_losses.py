"""Losses against their definitions."""

from __future__ import annotations

import pytest
import torch

from robench.losses import LOSSES, cross_entropy, difference_of_logits_ratio, margin

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 1.0], [0.0, 3.0, 1.0, -2.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def test_cross_entropy():
    expected = [-(row[y] - torch.logsumexp(row, 0)) for row, y in zip(LOGITS, LABELS, strict=True)]
    assert torch.allclose(cross_entropy(LOGITS, LABELS), torch.stack(expected))


def test_margin_is_positive_exactly_where_wrong():
    assert margin(LOGITS, LABELS).tolist() == [1.0 - 2.0, 3.0 - 1.0]


def test_dlr_by_hand_and_scale_free():
    # Row 0: -(2 - 1) / (2 - 0.5); row 1: -(1 - 3) / (3 - 0).
    assert difference_of_logits_ratio(LOGITS, LABELS).tolist() == pytest.approx([-1 / 1.5, 2 / 3])
    assert torch.allclose(
        difference_of_logits_ratio(7 * LOGITS, LABELS), difference_of_logits_ratio(LOGITS, LABELS)
    )
    with pytest.raises(ValueError, match="3 classes"):
        difference_of_logits_ratio(LOGITS[:, :2], torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, LABELS), logits)

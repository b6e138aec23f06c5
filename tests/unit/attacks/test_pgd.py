"""PGD against its definition written out: the first broken iterate, else the last, however often it is looked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.pgd import pgd
from robench.lp_geometry import project, steepest
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import SmallNet, pictures

#: Of a step, as a share of the radius.
LENGTH = 0.15


def written_out(model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, steps: int) -> Tensor:
    """Walk every example alone; stop at the first iterate that is misclassified."""
    found = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        current = image
        for _ in range(steps):
            current = current.detach().requires_grad_()
            logits = model(current)
            if logits.argmax(1) != label:
                break
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label), current)
            current = project(
                current.detach() + LENGTH * threat.radius * steepest(gradient, threat.norm), image, threat
            )
        found.append(current.detach())
    return torch.cat(found)


@pytest.mark.parametrize("interval", [1, 3, 7, 20])
@pytest.mark.parametrize("steps", [1, 7, 8, 9, 20])
@pytest.mark.parametrize(("norm", "radius"), [("Linf", "0.02"), ("L2", "0.1")])
def test_the_first_broken_iterate_counts_else_the_last(
    norm: str, radius: str, steps: int, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = SmallNet().eval().double().requires_grad_(False), pictures(40)
    labels, threat = model(images).argmax(1), ThreatModel(norm=norm, epsilon=radius)
    monkeypatch.setattr("robench.attacks._compaction.steps_between_looks", lambda device: interval)
    expected = written_out(model, images, labels, threat=threat, steps=steps)
    fell = model(expected).argmax(1) != labels
    assert steps < 20 or 5 <= fell.sum() <= 35, "some fall on the way and some stand"
    random, length = RandomStream(3, torch.arange(40)), LENGTH * threat.radius
    found = pgd(model, images, labels, threat=threat, random=random, steps=steps, step_size=length, start="image")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

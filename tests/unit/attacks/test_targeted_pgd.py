"""Targeted PGD on models whose every step is known."""

from __future__ import annotations

import pytest
import torch

from robench.attacks.targeted_pgd import NUMBERS, drawn_classes, targeted_pgd
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import Linear, pictures

LINF = ThreatModel(norm="Linf", epsilon=0.2)


def stream(count, seed=0):
    return RandomStream(seed, torch.arange(count))


def aims_of(labels, classes, restart=0):
    return drawn_classes(labels, stream(len(labels)).at("target", restart).integers(NUMBERS), classes)


def test_targets_are_uniform_among_the_other_classes():
    labels = torch.arange(5).repeat(4000)
    drawn = aims_of(labels, 5)
    assert (drawn != labels).all()
    for label in range(5):
        shares = torch.bincount(drawn[labels == label], minlength=5) / 4000
        # Five standard deviations of a share of a quarter.
        assert (shares - 0.25 * (torch.arange(5) != label)).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_first_step_is_the_sign_of_the_targets_gradient():
    model, images = Linear(4, 16), pictures(12)
    labels = model(images).argmax(1)
    aims = aims_of(labels, 4)
    found = targeted_pgd(
        model,
        images,
        labels,
        threat=LINF,
        random=stream(12),
        steps=1,
        step_size=0.05,
        start="image",
        stop_when_broken=False,
    )
    at = images.clone().requires_grad_()
    wanted = torch.log_softmax(model(at), 1).gather(1, aims[:, None]).sum()
    (gradient,) = torch.autograd.grad(wanted, at)
    torch.testing.assert_close(found, (images + 0.05 * gradient.sign()).clamp(0, 1))


def test_it_drives_a_linear_model_into_the_drawn_class():
    model, images = Linear(4, 16), pictures(30)
    labels = model(images).argmax(1)
    far = ThreatModel(norm="L2", epsilon=20.0)
    found = targeted_pgd(model, images, labels, threat=far, random=stream(30), steps=60, stop_when_broken=False)
    aims = aims_of(labels, 4)
    reached = model(found).argmax(1)
    # The box may forbid some classes everywhere; another one than the label and the target is reached in passing only.
    assert (reached == aims).float().mean() > 0.8


def test_more_restarts_draw_other_targets_and_never_help_the_defender():
    model, images = Linear(6, 16), pictures(60)
    labels = model(images).argmax(1)
    standing, near = [], ThreatModel(norm="Linf", epsilon=0.02)
    for restarts in (1, 2, 5):
        found = targeted_pgd(
            model, images, labels, threat=near, random=stream(60), steps=10, restarts=restarts, start="image"
        )
        assert (distance(found - images, "Linf") <= 0.02 + 1e-6).all()
        standing.append(model(found).argmax(1) == labels)
    assert (standing[1] <= standing[0]).all()
    assert (standing[2] <= standing[1]).all()
    assert standing[2].sum() < standing[0].sum()
    aims = [aims_of(labels, 6, restart) for restart in range(2)]
    assert (aims[0] != aims[1]).any()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_two_classes_have_one_target(norm):
    model, images = Linear(2, 16), pictures(20)
    labels = model(images).argmax(1)
    threat = ThreatModel(norm=norm, epsilon=1.01 * float(model.margins(images, labels, norm).max()))
    found = targeted_pgd(model, images, labels, threat=threat, random=stream(20), steps=100)
    assert (model(found).argmax(1) != labels).float().mean() > 0.9

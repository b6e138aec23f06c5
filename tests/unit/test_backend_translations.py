"""Robench's parameters mean the same in every library: what is deterministic agrees number by number."""

from __future__ import annotations

import pytest
import torch

from robench import backends, catalog
from robench.errors import UserError
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.records import AttackIdentity
from robench.threat_model import ThreatModel
from tests.models import SmallNet, pictures

NORMS = pytest.mark.parametrize("norm", ["Linf", "L2"])
GRADIENT_LIBRARIES = pytest.mark.parametrize("backend", ["foolbox", "art"])


@pytest.fixture(scope="module")
def model():
    return SmallNet().eval().float().requires_grad_(False)


def ask(backend, attack, model, threat, *, count=12, **overrides):
    """Return images, labels, and the answer of a backend; skip where its library is absent."""
    plugin = catalog.find("attacks", attack)
    parameters = plugin.settings(overrides)
    try:
        fields = backends.identify(backend, plugin, parameters, threat.norm)
    except UserError as error:
        pytest.skip(str(error))
    identity = AttackIdentity(name=attack, entry=attack, parameters=parameters, **fields)
    images = pictures(count).float()
    labels = model(images).argmax(1)
    random = RandomStream(0, torch.arange(count))
    found = backends.attack_of(identity, threat.norm)(model, images, labels, threat=threat, random=random, **parameters)
    return images, labels, found


@NORMS
@GRADIENT_LIBRARIES
def test_fgsm_is_the_same_step(model, backend, norm):
    threat = ThreatModel(norm=norm, epsilon="0.07")
    _, _, found = ask(backend, "fgsm", model, threat)
    _, _, own = ask("native", "fgsm", model, threat)
    assert torch.allclose(found, own, atol=1e-6)


@NORMS
@GRADIENT_LIBRARIES
@pytest.mark.parametrize("settings", [{"steps": 7}, {"steps": 4, "step_size": 0.02}, {"steps": 3, "step_size": 0.5}])
def test_pgd_walks_the_same_way(model, backend, norm, settings):
    threat = ThreatModel(norm=norm, epsilon="0.1")
    _, _, found = ask(backend, "pgd", model, threat, start="image", **settings)
    own = catalog.find("attacks", "pgd").load().attack
    images = pictures(12).float()
    random = RandomStream(0, torch.arange(12))
    walk = {"start": "image", "stop_when_broken": False, **settings}
    expected = own(model, images, model(images).argmax(1), threat=threat, random=random, **walk)
    assert torch.allclose(found, expected, atol=2e-6)


@NORMS
@GRADIENT_LIBRARIES
def test_a_random_start_is_a_random_point_of_the_ball(model, backend, norm):
    threat = ThreatModel(norm=norm, epsilon="0.1")
    images, _, found = ask(backend, "pgd", model, threat, count=60, steps=1, step_size=1e-6)
    length = distance(found - images, norm) / 0.1
    assert (length <= 1 + 1e-4).all()
    # Of 16 pixels: the largest of 16 uniform numbers (Linf), or U^(1/16) (L2); both have the mean 16/17.
    assert 0.9 < float(length.mean()) < 0.98
    images, _, found = ask(backend, "pgd", model, threat, steps=1, step_size=1e-6, start="image")
    assert float(distance(found - images, norm).max()) < 2e-6


@GRADIENT_LIBRARIES
def test_restarts_break_more(model, backend):
    threat = ThreatModel.parse("Linf@0.03")
    broken = []
    for restarts in (1, 8):
        _, labels, found = ask(backend, "pgd", model, threat, count=80, steps=2, step_size=0.003, restarts=restarts)
        broken.append(int((model(found).argmax(1) != labels).sum()))
    assert 0 < broken[0] < broken[1]

"""What torchattacks is asked in place of robench's attacks."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

from benchmarks import attacks
from benchmarks.rivals import NotOffered, Target, otherwise, rival
from benchmarks.standings import Report, Standing
from robench.lp_geometry import distance
from robench.threat_model import ThreatModel
from tests.models import Linear, pictures

CW = "cw-l2:rounds=9,steps=200,step_size=0.1,constant=0.1"


@pytest.fixture
def target():
    model = Linear(3, 16).float().requires_grad_(False)
    images = pictures(12).float()
    return Target(model, images, model(images).argmax(1), ThreatModel.parse("L2@1"))


@pytest.fixture
def asked(monkeypatch):
    """Return what the library's attacks are made with, of a library whose attacks do nothing."""
    made = []

    def attack(name):
        def make(model, **given):
            made.append((name, given))
            return lambda images, labels: images

        return make

    library = types.ModuleType("torchattacks")
    for name in ("CW", "PGD", "PGDL2", "APGD", "APGDT", "DeepFool"):
        setattr(library, name, attack(name))
    monkeypatch.setitem(sys.modules, "torchattacks", library)
    monkeypatch.setattr(importlib.metadata, "version", {"torchattacks": "9.9"}.__getitem__)
    return made


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (CW, ("CW", {"kappa": 0.0, "steps": 1800, "lr": 0.1})),
        ("cw-l2:confidence=2", ("CW", {"kappa": 2.0, "steps": 400})),
        ("pgd-20:start=image", ("PGDL2", {"eps": 1.0, "alpha": 0.125, "steps": 20, "random_start": False})),
        ("apgd-t", ("APGDT", {"norm": "L2", "eps": 1.0, "steps": 100, "n_restarts": 1, "n_classes": 10})),
        ("deepfool:steps=7,overshoot=0.1", ("DeepFool", {"steps": 7, "overshoot": 0.1})),
    ],
)
def test_torchattacks_is_asked_for_as_much(target, asked, attack, expected):
    version, call = rival("torchattacks", attack, target)
    assert version == "9.9"
    assert torch.equal(call(), target.images)
    assert asked == [expected]


def test_what_torchattacks_lacks_is_said(target, asked):
    with pytest.raises(NotOffered, match="torchattacks has no fab for L2"):
        rival("torchattacks", "fab", target)
    assert "does not search for the constant" in (otherwise("torchattacks", CW) or "")
    assert otherwise("torchattacks", "pgd-20") is otherwise("foolbox", CW) is None


def test_the_benchmark_says_who_does_otherwise_than_asked():
    def report(*libraries):
        results = {library: Standing("1") for library in ("robench", *libraries)}
        return Report("cw-l2", CW, "m", "L2@1", 1, True, None, None, results, {})

    assert attacks.remarks([report("foolbox")]) == []
    (line,) = attacks.remarks([report("foolbox", "torchattacks"), report("torchattacks")])
    assert line == f"torchattacks, {CW}: {otherwise('torchattacks', CW)}"


def test_torchattacks_itself_finds_boundaries_at_no_less_than_their_distance(target):
    pytest.importorskip("torchattacks")
    _, call = rival("torchattacks", "cw-l2:rounds=2,steps=100,step_size=0.1", target)
    found = call()
    broken = target.model(found).argmax(1) != target.labels
    assert broken.any()
    margins = target.model.margins(target.images.double(), target.labels, "L2")
    assert (distance(found - target.images, "L2")[broken] >= margins[broken] * (1 - 1e-4)).all()

"""Robench's parameters mean the same in every library: what is deterministic agrees number by number."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from robench import backends, catalog
from robench.errors import UserError
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.records import AttackIdentity
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, pictures

NORMS = pytest.mark.parametrize("norm", ["Linf", "L2"])
GRADIENT_LIBRARIES = pytest.mark.parametrize("backend", ["foolbox", "art"])


@pytest.fixture(scope="module")
def model():
    return SmallNet().eval().float().requires_grad_(False)


def identified(backend, attack, norm, **overrides):
    """Return the identity of an attack by a backend; skip where its library is absent."""
    plugin = catalog.find("attacks", attack)
    parameters = plugin.settings(overrides)
    try:
        if backend != backends.NATIVE:
            backends.installed(backend)
    except UserError as error:
        pytest.skip(str(error))
    fields = backends.identify(backend, plugin, parameters, norm)
    return AttackIdentity(name=attack, entry=attack, parameters=parameters, **fields)


def ask(backend, attack, model, threat, *, count=12, shape=(1, 4, 4), **overrides):
    """Return images, labels, and the answer of a backend."""
    identity = identified(backend, attack, threat.norm, **overrides)
    images = pictures(count, shape).float()
    labels = model(images).argmax(1)
    random = RandomStream(0, torch.arange(count))
    attack = backends.attack_of(identity, threat.norm)
    found = attack(model, images, labels, threat=threat, random=random, **identity.parameters)
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


def told(monkeypatch, backend, where, name):
    """Record with what arguments a library's class is made."""
    catalog.find("backends", backend).load()
    module = importlib.import_module(f"robench.backends.{backend}")
    holder = getattr(module, where) if where else module
    usual, arguments = getattr(holder, name), []

    def make(*given, **named):
        arguments.append(named)
        return usual(*given, **named)

    monkeypatch.setattr(holder, name, make)
    return arguments


@pytest.mark.parametrize(
    ("backend", "where", "kind", "attack", "settings", "expected"),
    [
        (
            "autoattack",
            None,
            "APGDAttack",
            "apgd",
            {"steps": 5, "restarts": 2, "loss": "dlr"},
            {"n_iter": 5, "n_restarts": 2, "loss": "dlr", "norm": "Linf", "eps": 0.02},
        ),
        (
            "autoattack",
            None,
            "APGDAttack_targeted",
            "apgd",
            {"steps": 5, "restarts": 2, "loss": "dlr", "targets": 3},
            {"n_iter": 5, "n_restarts": 2, "n_target_classes": 3, "eps": 0.02},
        ),
        (
            "autoattack",
            None,
            "FABAttack_PT",
            "fab",
            {"steps": 4, "targets": 9, "bias": 0.2, "extrapolation": 1.1, "step_back": 0.8},
            {"n_iter": 4, "n_target_classes": 4, "alpha_max": 0.2, "eta": 1.1, "beta": 0.8, "targeted": True},
        ),
        (
            "autoattack",
            None,
            "SquareAttack",
            "square",
            {"queries": 20, "p_init": 0.3, "restarts": 2},
            {"n_queries": 20, "p_init": 0.3, "n_restarts": 2, "resc_schedule": False, "eps": 0.02},
        ),
        (
            "art",
            "evasion",
            "AutoProjectedGradientDescent",
            "apgd",
            {"steps": 5, "restarts": 2, "loss": "dlr"},
            {
                "max_iter": 5,
                "nb_random_init": 2,
                "loss_type": "difference_logits_ratio",
                "eps": 0.02,
                "eps_step": 0.04,
            },
        ),
        (
            "art",
            "evasion",
            "SquareAttack",
            "square",
            {"queries": 20, "p_init": 0.3, "restarts": 2},
            {"max_iter": 20, "p_init": 0.3, "nb_restarts": 2, "eps": 0.02},
        ),
    ],
)
def test_what_draws_at_random_is_told_what_was_asked(monkeypatch, backend, where, kind, attack, settings, expected):
    identified(backend, attack, "Linf", **settings)
    wide = SmallNet(side=8).eval().float().requires_grad_(False)
    arguments = told(monkeypatch, backend, where, kind)
    ask(backend, attack, wide, ThreatModel.parse("Linf@0.02"), shape=(1, 8, 8), **settings)
    assert arguments
    assert {name: arguments[0][name] for name in expected} == expected


@NORMS
def test_the_references_fab_returns_the_nearest_over_all_targets(model, norm):
    """In spite of its own loop, which is content with anything inside epsilon."""
    threat = ThreatModel(norm=norm, epsilon="0.5")
    paper = {"linearize": "departing", "every_candidate": True, "final_search": 0, "steps": 20}
    images, labels, found = ask("autoattack", "fab", model, threat, targets=4, **paper)
    _, _, first = ask("autoattack", "fab", model, threat, targets=1, **paper)
    _, _, own = ask("native", "fab", model, threat, targets=4, **paper)
    assert (model(found).argmax(1) != labels).all()
    length, length_of_first, length_of_own = (distance(x - images, norm) for x in (found, first, own))
    assert (length <= length_of_first + 1e-6).all()
    assert (length < 0.9 * length_of_first).any()
    assert torch.allclose(length, length_of_own, rtol=0.05)
    _, _, inside = ask("autoattack", "fab", model, ThreatModel(norm=norm, epsilon="0.02"), stop_within_epsilon=True)
    length_inside = distance(inside - images, norm)
    assert ((length_inside == 0) | (length_inside <= 0.02 + 1e-6)).all()


def test_the_reference_says_when_there_are_too_few_classes():
    few = Linear(3, 16).float().eval().requires_grad_(False)
    with pytest.raises(UserError, match="targeted DLR loss needs 4 classes, the model has 3; use backend native"):
        ask("autoattack", "apgd", few, ThreatModel.parse("Linf@0.1"), loss="dlr", targets=9)


def test_a_tracer_survives_the_reference(model):
    def tracer(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        ask("autoattack", "autoattack", model, ThreatModel.parse("Linf@0.02"), count=1, queries=5)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_what_the_reference_warns_of_is_noted_and_not_printed(capfd):
    flat = Linear(4, 64).float().eval().requires_grad_(False)
    flat.weight.zero_()
    images = pictures(3, (1, 8, 8)).float()
    target = Target(flat, Ledger.of(3))
    identity = identified("autoattack", "apgd", "Linf", loss="dlr", steps=3)
    random = RandomStream(0, torch.arange(3))
    attack, labels = backends.attack_of(identity, "Linf"), flat(images).argmax(1)
    attack(target, images, labels, threat=ThreatModel.parse("Linf@0.1"), random=random, **identity.parameters)
    assert "autoattack warns: there are N points with zero gradient" in target.ledger.notes
    assert capfd.readouterr().err == ""


@NORMS
def test_deepfool_takes_the_same_steps(model, norm):
    threat = ThreatModel(norm=norm, epsilon="1")
    paper = {"box": "clamp", "rounds": 1, "every_candidate": True, "final_search": 0}
    images, labels, own = ask("native", "deepfool", model, threat, **paper)
    length = distance(own - images, norm)
    for backend in ("foolbox", "art") if norm == "L2" else ("foolbox",):
        _, _, found = ask(backend, "deepfool", model, threat, **paper)
        assert (model(found).argmax(1) != labels).all()
        # Foolbox lengthens every step by 1e-4.
        assert torch.allclose(distance(found - images, norm), length, rtol=0.02, atol=3e-4), backend
    # One other candidate is the class of the second largest logit, whatever is nearest.
    _, _, few = ask("foolbox", "deepfool", model, threat, candidates=1, **paper)
    second = model(images).topk(2).indices[:, 1]
    assert (model(few).argmax(1) == second).all()


def test_ddn_walks_as_the_paper_has_it(model):
    threat = ThreatModel.parse("L2@1")
    settings = {"steps": 40, "gamma": 0.1, "start_norm": 0.2, "final_search": 0}
    images, labels, own = ask("native", "ddn", model, threat, **settings)
    _, _, found = ask("foolbox", "ddn", model, threat, **settings)
    assert (model(found).argmax(1) != labels).all()
    assert torch.allclose(distance(found - images, "L2"), distance(own - images, "L2"), rtol=0.02)


@GRADIENT_LIBRARIES
def test_cw_comes_as_near_when_it_is_told_how(model, backend):
    threat = ThreatModel.parse("L2@1")
    told_how = {"rounds": 8, "steps": 80, "step_size": 0.02, "constant": 0.1}
    images, labels, own = ask("native", "cw-l2", model, threat)
    _, _, found = ask(backend, "cw-l2", model, threat, **told_how)
    broken = model(found).argmax(1) != labels
    assert broken.float().mean() > 0.7
    ratio = distance(found - images, "L2")[broken] / distance(own - images, "L2")[broken]
    assert 0.97 < ratio.median() < 1.2


def test_confidence_leaves_the_boundary_behind(model):
    threat = ThreatModel.parse("L2@1")
    told_how = {"rounds": 6, "steps": 60, "step_size": 0.02, "constant": 1.0, "confidence": 1.0}
    _, labels, found = ask("foolbox", "cw-l2", model, threat, **told_how)
    logits = model(found)
    broken = logits.argmax(1) != labels
    assert broken.any()
    gap = logits.amax(1) - logits.gather(1, labels[:, None])[:, 0]
    assert (gap[broken] >= 1.0 - 1e-4).all()

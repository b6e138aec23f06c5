"""What every library of robench/backends/ keeps, for every attack that it offers; absent libraries are skipped."""

from __future__ import annotations

import random as python_random

import numpy as np
import pytest
import torch

from robench import backends, catalog
from robench.errors import UserError
from robench.evaluation.verification import find_violation
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.records import AttackIdentity
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, pictures

OFFERS = [(backend, attack) for backend in backends.names()[1:] for attack in backends.offers(backend)]
CASES = [(b, a, norm) for b, a in OFFERS for norm in backends.norms(b, a)]
each_offer = pytest.mark.parametrize(("backend", "attack"), OFFERS)
each_case = pytest.mark.parametrize(("backend", "attack", "norm"), CASES)
#: Square Attack in L2 has tiles of a fifth of the image.
SHAPE = 1, 8, 8
WHOLE_BOX = ThreatModel.parse("Linf@1")


def adapted(backend, attack, norm, **overrides):
    """Return the library's attack with robench's defaults, cheapened, and the parameters."""
    plugin = catalog.find("attacks", attack)
    cheap = {name: value for name, value in CHEAP.items() if name in plugin.parameters}
    parameters = plugin.settings({**cheap, **TOLD_HOW.get((backend, attack), {}), **overrides})
    try:
        fields = backends.identify(backend, plugin, parameters, norm)
    except UserError as error:
        pytest.skip(str(error))
    identity = AttackIdentity(name=attack, entry=attack, parameters=parameters, **fields)
    return backends.attack_of(identity, norm), parameters


#: Attacks that a library has no form of for two classes.
NEED_MORE_CLASSES = {"autoattack": ("autoattack",)}

#: What makes a search short, where the attack has it.
CHEAP = {"queries": 200, "rounds": 6}
#: What a library needs to be told, whose own settings break next to nothing.
TOLD_HOW = {("art", "cw-linf"): {"solve_steps": 30, "step_size": 0.01, "constant": 0.5, "doublings": 1}}
#: Who searches at random and briefly needs a ball so many times larger than the margin.
REACH = {"square": 0.3}


def ask(attack, parameters, model, images, labels, threat, *, seed=0):
    random = RandomStream(seed, torch.arange(len(images)))
    return attack(model, images, labels, threat=threat, random=random, **parameters)


def linear_problem(count=24, classes=5):
    model = Linear(classes, 64).requires_grad_(False).float().eval()
    images = pictures(count, SHAPE).float()
    return model, images, model(images).argmax(1)


def is_minimum_norm(attack):
    return catalog.find("attacks", attack).facts.get("minimum_norm", False)


@each_offer
def test_offers_speak_of_the_attack_as_it_is(backend, attack):
    plugin = catalog.find("attacks", attack)
    assert plugin.name == plugin.entry
    for offer in backends.offers(backend)[attack]:
        assert set(offer.norms) <= set(plugin.facts["norms"])
        assert len({*offer.translated, *offer.fixed, *offer.lacks}) == sum(
            len(part) for part in (offer.translated, offer.fixed, offer.lacks)
        )
        assert set(offer.translated) <= set(plugin.parameters)
        said = [(name, value) for name, values in offer.fixed.items() for value in values] + list(offer.lacks.items())
        for name, value in said:
            assert catalog.checked(value, plugin.parameters[name], name) == value
        usual = plugin.settings()
        assert any(usual[name] != off for name, off in offer.lacks.items()) or not offer.lacks, "nothing to turn off"


@each_case
def test_breaks_every_linear_example_well_beyond_its_margin(backend, attack, norm):
    model, images, labels = linear_problem(classes=5)
    search, parameters = adapted(backend, attack, norm)
    reach = REACH.get(attack, 0.8)
    radius = float(model.margins(images, labels, norm).median()) / reach
    threat = ThreatModel(norm=norm, epsilon=str(round(radius, 6)))
    found = ask(search, parameters, model, images, labels, threat)
    assert find_violation(found, images, WHOLE_BOX if is_minimum_norm(attack) else threat) is None
    broken = model(found).argmax(1) != labels
    length, margins = distance(found - images, norm), model.margins(images, labels, norm)
    assert not (broken & (length < margins * (1 - 1e-4))).any()
    if is_minimum_norm(attack):
        inside = margins < 0.3
        assert broken[inside].all()
        assert (length[inside] / margins[inside]).median() < 1.1
    else:
        assert broken[margins < reach * radius].float().mean() > 0.7


@each_case
def test_changes_nothing_that_it_was_given(backend, attack, norm):
    model = SmallNet(side=8).eval().float()
    images = pictures(5, SHAPE).float()
    labels = model(images).argmax(1)
    search, parameters = adapted(backend, attack, norm)
    before = [t.clone() for t in (images, labels, *model.state_dict().values())]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), python_random.getstate()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ask(search, parameters, model, images, labels, ThreatModel(norm=norm, epsilon="0.1"))
    after = (images, labels, *model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (np.random.get_state()[1].tolist(), python_random.getstate())
    assert not model.training
    assert not images.requires_grad


@each_case
def test_the_same_batch_repeats_exactly(backend, attack, norm):
    model = SmallNet(side=8).eval().float().requires_grad_(False)
    images = pictures(6, SHAPE).float()
    labels = model(images).argmax(1)
    threat = ThreatModel(norm=norm, epsilon="0.05")
    answers = []
    for noise in (1, 2):
        torch.default_generator.manual_seed(noise)
        np.random.seed(noise)
        search, parameters = adapted(backend, attack, norm)
        answers.append(ask(search, parameters, model, images, labels, threat))
    assert torch.equal(*answers)


@each_case
def test_takes_no_examples_and_one_and_two_classes(backend, attack, norm):
    search, parameters = adapted(backend, attack, norm)
    for count in (0, 1):
        model, images, labels = linear_problem(count, classes=2)
        threat = ThreatModel(norm=norm, epsilon="0.2")
        if count and attack in NEED_MORE_CLASSES.get(backend, ()):
            with pytest.raises(UserError, match="classes"):
                ask(search, parameters, model, images, labels, threat)
        else:
            assert ask(search, parameters, model, images, labels, threat).shape == images.shape


@each_case
def test_charges_every_pass_and_says_what_the_record_needs(backend, attack, norm):
    model = SmallNet(side=8).eval().float().requires_grad_(False)
    images = pictures(6, SHAPE).float()
    labels = model(images).argmax(1)
    search, parameters = adapted(backend, attack, norm)
    counted = []
    hook = model.register_forward_hook(lambda module, inputs, output: counted.append(len(output)))
    ledger = Ledger.of(6)
    ask(search, parameters, Target(model, ledger), images, labels, ThreatModel(norm=norm, epsilon="0.05"))
    hook.remove()
    charged = int(ledger.forward_passes.sum()) + ledger.unattributed[0]
    assert 0 <= sum(counted) - charged <= 1, "one pass of one image may tell the number of classes"
    assert any("belong to the batch" in note for note in ledger.notes)

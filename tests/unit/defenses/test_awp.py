"""AWP: where the weights go and come from, the loss there, its limits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from robench.defenses.awp import AdversarialWeightPerturbation
from robench.defenses.pgd_training import pgd_training
from robench.defenses.trades import trades
from robench.errors import UserError
from robench.losses import kl_divergence
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import SmallNet, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)
each_form = pytest.mark.parametrize("form", ["at", "trades"])
BASES = {"at": pgd_training, "trades": trades}


def batch(count=6):
    return pictures(count), torch.arange(count) % 5, RandomStream(3, torch.arange(count), ("test",))


def small_net():
    return SmallNet().double().train()


def call(model, form, threat=LINF, *, progress=0.5, **options):
    images, labels, random = batch()
    defense = AdversarialWeightPerturbation(form=form, **options)
    return defense(model, images, labels, random=random, progress=progress, threat=threat)


def plain(model, form, threat=LINF, **options):
    images, labels, random = batch()
    return BASES[form](model, images, labels, random=random, progress=0.5, threat=threat, attack_mode="eval", **options)


def loss_at(model, form, adversarial):
    """The base's loss written out."""
    images, labels, _ = batch()
    if form == "at":
        return F.cross_entropy(model(adversarial), labels)
    clean = model(images)
    return F.cross_entropy(clean, labels) + 6.0 * kl_divergence(clean, model(adversarial)).mean()


@each_threat
@each_form
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_loss_and_gradient_are_those_of_the_moved_network(form, threat, gamma):
    model = small_net()
    twin = copy.deepcopy(model)
    loss = call(model, form, threat, gamma=gamma)
    loss.total.backward()
    adversarial = loss.views["adversarial"].images
    assert torch.equal(adversarial, plain(small_net(), form, threat).views["adversarial"].images), (
        "found at w, not w + v"
    )
    # By hand: move a copy's weights in place.
    loss_at(twin, form, adversarial).backward()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if name in {"features.0.weight", "classify.weight"}:
                weight.add_(gamma * weight.norm() * weight.grad / weight.grad.norm())
    twin.zero_grad()
    expected = loss_at(twin, form, adversarial)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@each_form
def test_the_weights_stay_where_they_are(form):
    model = small_net()
    call(model, form, gamma=0.3).total.backward()
    for ours, before in zip(model.parameters(), small_net().parameters(), strict=True):
        assert torch.equal(ours, before)


@each_form
def test_a_perturbation_raises_the_loss(form):
    losses = [call(small_net(), form, gamma=gamma).total.item() for gamma in (0.0, 0.01, 0.02)]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]
    moved = call(small_net(), form, gamma=0.02)
    assert moved.parts["plain_loss"].item() == pytest.approx(losses[0], rel=1e-9)


@each_threat
@each_form
@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.1, "warmup": 0.6}])
def test_without_a_perturbation_and_in_the_warm_up_it_is_the_base(form, threat, options):
    model, reference = small_net(), small_net()
    loss, expected = call(model, form, threat, **options), plain(reference, form, threat)
    loss.total.backward()
    expected.total.backward()
    assert loss.total.item() == expected.total.item()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert call(small_net(), form, progress=0.6, **options).parts.keys() >= (
        {"plain_loss"} if "warmup" in options else set()
    )


@each_form
def test_running_statistics_move_as_the_bases_do_and_not_for_the_search(form):
    model, reference = small_net(), small_net()
    call(model, form, gamma=0.3)
    plain(reference, form)
    assert torch.equal(model.features[1].num_batches_tracked, reference.features[1].num_batches_tracked)
    assert not torch.equal(model.features[1].running_mean, reference.features[1].running_mean), (
        "they are those at w + v"
    )


def test_a_weight_that_does_not_matter_stays():
    model = small_net()
    with torch.no_grad():
        model.classify.weight.zero_()  # then the convolution has no gradient
    assert call(model, "at", gamma=0.1).total.isfinite()


def test_gamma_by_default_is_that_of_the_code():
    for form, gamma in (("at", 0.01), ("trades", 0.005)):
        assert call(small_net(), form).total.item() == call(small_net(), form, gamma=gamma).total.item()


@pytest.mark.parametrize(("name", "value"), [("beta", 6.0), ("inner", "kl")])
def test_refuses_what_belongs_to_the_other_form(name, value):
    with pytest.raises(UserError, match=rf"awp: {name} = {value} belongs to form=trades, and form is at; take"):
        AdversarialWeightPerturbation(form="at", **{name: value})

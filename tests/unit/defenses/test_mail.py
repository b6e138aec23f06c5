"""MAIL: the loss and its gradients by an independent transcription, its limits, its burn-in."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from robench import catalog
from robench.defenses.mail import MarginAwareReweighting
from robench.defenses.pgd_training import pgd_training
from robench.defenses.trades import trades
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import ThreatModel
from robench.training.objective import build_objective
from tests.models import SmallNet, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)
each_form = pytest.mark.parametrize("form", ["at", "trades"])


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def small_net():
    return SmallNet().double().train()


def call(model, threat=LINF, *, progress=0.9, **options):
    images, labels, random = batch()
    return MarginAwareReweighting(**options)(model, images, labels, random=random, progress=progress, threat=threat)


def plainly(form, model, threat=LINF, **options):
    images, labels, random = batch()
    objective = pgd_training if form == "at" else trades
    return objective(
        model, images, labels, random=random, progress=0.9, threat=threat, attack_mode="eval", steps=10, **options
    )


def transcription(model, images, labels, adversarial, *, form, slope, bias, beta=0.0, by_batch=False):
    """The reweighted losses with numbers written out."""
    q = model(adversarial).softmax(1)
    p = model(images).softmax(1) if form == "trades" else q
    weights = []
    for i, y in enumerate(labels.tolist()):
        row = q[i].tolist()
        margin = row.pop(y) - max(row)
        weights.append(3 / (1 + math.exp(-slope * (-margin + bias))))
    if by_batch:
        weights = [w * len(weights) / sum(weights) for w in weights]
    total = 0.0
    for i, (y, weight) in enumerate(zip(labels.tolist(), weights, strict=True)):
        divergence = sum(p[i, j] * (p[i, j] / q[i, j]).log() for j in range(p.shape[1]))
        total = total - (weight * q[i, y].log() if form == "at" else p[i, y].log() - beta * weight * divergence)
    return total / len(labels)


@each_threat
@each_form
@pytest.mark.parametrize("scale", ["three", "batch"])
def test_loss_and_its_gradients_are_the_formula_at_what_the_ascent_found(form, threat, scale):
    images, labels, _ = batch()
    model = small_net()
    twin = copy.deepcopy(model)
    own = {"beta": 2.5} if form == "trades" else {}
    loss = call(model, threat, form=form, slope=4.0, bias=0.2, scale=scale, **own)
    loss.total.backward()
    worst = loss.views["adversarial"].images
    expected = transcription(
        twin, images, labels, worst, form=form, slope=4.0, bias=0.2, by_batch=scale == "batch", **own
    )
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@each_form
def test_flat_weights_make_the_plain_loss(form):
    loss, plain = call(small_net(), form=form, slope=0.0, scale="batch"), plainly(form, small_net(), **_beta(form))
    assert loss.total.item() == pytest.approx(plain.total.item(), rel=1e-12)
    assert loss.parts["weight"].item() == pytest.approx(1)
    assert call(small_net(), form=form, slope=0.0).parts["weight"].item() == pytest.approx(1.5), "3 sigmoid(0)"


def _beta(form):
    return {"beta": 5.0} if form == "trades" else {}


@each_form
def test_slope_and_bias_by_default_are_those_of_the_code(form):
    slope, bias = (30.0, -0.07) if form == "at" else (5.0, 0.05)
    by_default = call(small_net(), form=form)
    assert by_default.total.item() == call(small_net(), form=form, slope=slope, bias=bias).total.item()


def test_an_image_near_to_the_boundary_weighs_more():
    logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 4.0]], dtype=torch.float64)
    weights = MarginAwareReweighting(slope=5.0, bias=0.0)._weights(logits, torch.tensor([0, 0, 0]))
    assert weights[0] < weights[1] < weights[2] < 3
    assert weights[0] + weights[2] == pytest.approx(3), "the sigmoid is odd about 1/2"
    assert not weights.requires_grad


@each_form
@pytest.mark.parametrize("burn_in_form", ["at", "same"])
def test_burn_in_is_the_plain_loss_until_its_share_of_the_training(form, burn_in_form):
    options = {"form": form, "burn_in": 0.74, "burn_in_form": burn_in_form}
    plain = form if burn_in_form == "same" else "at"
    before = call(small_net(), progress=0.7399, **options)
    assert before.total.item() == plainly(plain, small_net(), **_beta(plain)).total.item()
    assert "weight" not in before.parts
    after = call(small_net(), progress=0.74, **options)
    assert after.total.item() == call(small_net(), progress=0.9, form=form).total.item()


@pytest.mark.parametrize(("attack_mode", "passes"), [("eval", 1), ("train", 4)])
def test_attack_mode_decides_whether_the_ascent_moves_running_statistics(attack_mode, passes):
    model = small_net()
    call(model, steps=3, attack_mode=attack_mode)
    assert model.features[1].num_batches_tracked.item() == passes


def test_presets_are_what_they_say():
    presets = {
        name: catalog.find("defenses", name).settings() for name in catalog.plugins("defenses") if "mail_" in name
    }
    assert {name: (p["form"], p["bias"]) for name, p in presets.items()} == {
        "mail_at_emr": ("at", -0.07),
        "mail_trades_emr": ("trades", 0.05),
        "mail_at_emr_paper": ("at", 0.07),
        "mail_at_official": ("at", None),
        "mail_trades_official": ("trades", None),
    }


def recipe(**changes):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "mail"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": "Linf@0.1",
    }
    return parse_recipe({**values, **changes}, origin="test")


def test_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"defense mail trains against a threat model; add --set threat=Linf@8/255"):
        build_objective(recipe(threat=None))
    with pytest.raises(UserError, match=r"slope = -1.0: input should be greater than or equal to 0"):
        recipe(defense={"name": "mail", "parameters": {"slope": -1.0}})
    for name, value in (("beta", 6.0), ("inner", "kl")):
        with pytest.raises(UserError, match=rf"mail: {name} = {value} belongs to form=trades, and form is at; take"):
            build_objective(recipe(defense={"name": "mail", "parameters": {name: value}}))


def test_the_authors_start_is_the_image_plus_little_noise(monkeypatch):
    settings = catalog.find("defenses", "mail_at_official").settings()
    assert settings["start"] == "noise"
    images, labels, random = batch()
    model = small_net()
    twin = copy.deepcopy(model).eval()
    loss = call(model, **{**settings, "steps": 3, "step_size": 0.01})
    begin = images + 0.001 * random.at("pgd_training").normal(images)
    current = begin
    for _ in range(3):
        current = current.detach().requires_grad_()
        logits = twin(current)
        slope = torch.autograd.grad(-logits.log_softmax(1)[torch.arange(6), labels].sum(), current)[0]
        current = (images + (current.detach() + 0.01 * slope.sign() - images).clamp(-0.05, 0.05)).clamp(0, 1)
    assert torch.allclose(loss.views["adversarial"].images, current, rtol=0, atol=1e-12)
    assert not torch.allclose(call(small_net(), steps=3, step_size=0.01).views["adversarial"].images, current)


@pytest.mark.parametrize("form", ["at", "trades"])
def test_start_is_that_of_the_form_unless_it_is_stated(form):
    starts = {
        s: call(small_net(), form=form, steps=1, step_size=0.01, start=s).total.item()
        for s in (None, "noise", "random")
    }
    assert starts[None] == starts["random" if form == "at" else "noise"]
    assert starts["noise"] != starts["random"]


@each_threat
def test_steps_from_the_noise_are_as_long_as_those_of_pgd_training(threat):
    images, labels, random = batch()
    worst = pgd_training(
        small_net(), images, labels, random=random, progress=0.9, threat=threat, steps=10, start="noise"
    ).views["adversarial"]
    stated = pgd_training(
        small_net(),
        images,
        labels,
        random=random,
        progress=0.9,
        threat=threat,
        steps=10,
        start="noise",
        step_size=2.5 * threat.radius / 10,
    ).views["adversarial"]
    assert torch.equal(worst.images, stated.images)

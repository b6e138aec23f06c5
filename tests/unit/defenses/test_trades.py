"""TRADES: the loss by an independent transcription, its limits, its inner maximisation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench.defenses import pgd_training
from robench.defenses.standard import standard
from robench.defenses.trades import trades
from robench.errors import UserError
from robench.losses import kl_divergence
from robench.lp_geometry import project, random_start
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import ThreatModel
from robench.training.objective import build_objective
from tests.models import SmallNet, numbers, pictures

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def batch(count=6, classes=5):
    return pictures(count), torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


def small_net(**options):
    return SmallNet(**options).double().train()


def transcription(model, images, labels, adversarial, beta):
    """Equation (5) of the paper with numbers written out."""
    p, q = model(images).softmax(1), model(adversarial).softmax(1)
    natural = -torch.stack([p[i, y].log() for i, y in enumerate(labels.tolist())]).mean()
    divergence = sum((p[i, j] * (p[i, j] / q[i, j]).log()) for i in range(len(p)) for j in range(p.shape[1]))
    return natural + beta * divergence / len(images)


@each_threat
@pytest.mark.parametrize("inner", ["kl", "ce"])
def test_loss_and_its_gradients_are_the_formula_at_what_the_ascent_found(threat, inner):
    images, labels, random = batch()
    model = small_net()
    twin = copy.deepcopy(model)
    loss = trades(model, images, labels, random=random, progress=0.0, threat=threat, beta=2.5, inner=inner)
    loss.total.backward()
    adversarial = loss.views["adversarial"].images
    assert torch.equal(loss.views["clean"].images, images)
    expected = transcription(twin, images, labels, adversarial, 2.5)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@each_threat
def test_beta_zero_is_standard_training(threat):
    images, labels, random = batch()
    model, plain = small_net(), small_net()
    loss = trades(model, images, labels, random=random, progress=0.0, threat=threat, beta=0.0)
    reference = standard(plain, images, labels, random=random, progress=0.0)
    loss.total.backward()
    reference.total.backward()
    assert loss.total.item() == reference.total.item()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_ball_without_radius_has_no_divergence():
    images, labels, random = batch()
    loss = trades(small_net(), images, labels, random=random, progress=0.0, threat=ThreatModel.parse("Linf@1e-12"))
    assert loss.parts["divergence"].item() == pytest.approx(0.0, abs=1e-12)


def test_divergence_is_from_the_clean_prediction():
    # Of distributions (1/2, 1/2) and (1/4, 3/4): one direction has 0.1438 nats, the other 0.1308.
    even, uneven = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[1.0, 3.0]]).double().log()
    assert kl_divergence(even, uneven).item() == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item(), abs=1e-7)
    assert kl_divergence(uneven, even).item() == pytest.approx(0.13081203594, abs=1e-9)
    assert kl_divergence(even, even).item() == 0.0
    reference = F.kl_div(uneven.log_softmax(1), even.softmax(1), reduction="none").sum(1)
    assert torch.allclose(kl_divergence(even, uneven), reference)


def test_divergence_of_certain_predictions_is_finite_with_gradients():
    logits = torch.tensor([[0.0, 2000.0], [2000.0, 0.0]], requires_grad=True)
    kl_divergence(logits, logits.detach().flip(1)).sum().backward()
    assert logits.grad.isfinite().all()


@each_threat
def test_inner_maximisation_ascends_the_divergence(threat):
    """It finds more of it than random points of the ball do, and stays in the ball and the box."""
    images, labels, random = batch(40)
    model = small_net().eval()
    found = trades(model, images, labels, random=random, progress=0.0, threat=threat, steps=20)
    offset = (found.views["adversarial"].images - images).flatten(1)
    length = offset.abs().amax(1) if threat.norm == "Linf" else offset.norm(dim=1)
    assert length.max() <= threat.radius + 1e-9
    assert length.min() > 0.99 * threat.radius, "the divergence is largest at the border"
    with torch.no_grad():
        clean, best = model(images), kl_divergence(model(images), model(found.views["adversarial"].images))
        beaten = []
        for trial in range(20):
            direction = numbers(*images.shape, seed=trial)
            scale = direction.abs() if threat.norm == "Linf" else direction.flatten(1).norm(dim=1)[:, None, None, None]
            points = images + threat.radius * direction / scale
            beaten.append(kl_divergence(clean, model(points)) > best)
        # An ascent ends at one of several local maxima.
        assert torch.stack(beaten).double().mean() < 0.02


def test_inner_maximisation_of_two_classes_is_known():
    """Two classes, linear logits: the larger of the two ways to move against or with the difference of the weights."""
    weight = torch.tensor([[1.0, -2.0], [-0.5, 1.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model[1].weight.data.copy_(weight)
    images = torch.tensor([[0.4, 0.6], [0.7, 0.3]], dtype=torch.float64).view(2, 1, 1, 2)
    random = RandomStream(0, torch.arange(2))
    loss = trades(model, images, torch.tensor([0, 1]), random=random, progress=0.0, threat=ThreatModel.parse("Linf@.1"))
    way = (weight[0] - weight[1]).sign().view(1, 1, 1, 2)
    ends = [kl_divergence(model(images), model(images + side * 0.1 * way)) for side in (1, -1)]
    found = kl_divergence(model(images), loss.views["adversarial"].logits)
    assert all(any(torch.isclose(f, end[i], rtol=1e-9) for end in ends) for i, f in enumerate(found))


def test_cross_entropy_from_a_random_start_is_the_inner_maximisation_of_pgd_training():
    images, labels, random = batch()
    model = small_net().eval()
    ours = trades(model, images, labels, random=random, progress=0.0, threat=LINF, inner="ce", steps=30)
    theirs = pgd_training.pgd_training(model, images, labels, random=random, progress=0.0, threat=LINF, steps=30)
    loss = [F.cross_entropy(model(x.views["adversarial"].images), labels) for x in (ours, theirs)]
    assert loss[0].item() == pytest.approx(loss[1].item(), rel=0.01)


@pytest.mark.parametrize(("inner", "noise"), [("kl", True), ("ce", False)])
def test_where_the_ascent_starts(inner, noise):
    images, labels, random = batch(200)
    model = small_net()

    def largest(**options):
        loss = trades(
            model, images, labels, random=random, progress=0.0, threat=LINF, steps=1, step_size=1e-9, **options
        )
        return (loss.views["adversarial"].images - images).abs().max().item()

    assert (largest(inner=inner) < 0.006) is noise
    assert 0.003 < largest(inner=inner, start="noise") < 0.006, "normal noise of standard deviation 0.001"
    assert 0.049 < largest(inner=inner, start="random") <= 0.05


def test_default_step_in_l2_is_two_radii_over_steps():
    images, labels, random = batch()
    for threat, length in ((L2, 2 * 0.3 / 5), (LINF, 2.5 * 0.05 / 5)):
        by_default, given = (
            trades(
                small_net(), images, labels, random=random, progress=0.0, threat=threat, steps=5, step_size=size
            ).total.item()
            for size in (None, length)
        )
        assert by_default == pytest.approx(given, rel=1e-12)


@pytest.mark.parametrize(("attack_mode", "passes"), [("eval", 2), ("train", 6)])
def test_attack_mode_decides_whether_the_ascent_moves_running_statistics(attack_mode, passes):
    images, labels, random = batch()
    model = small_net()
    trades(model, images, labels, random=random, progress=0.0, threat=LINF, steps=3, attack_mode=attack_mode)
    assert model.features[1].num_batches_tracked.item() == passes


def recipe(**changes):
    values = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "trades"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
        "threat": "Linf@0.1",
    }
    return parse_recipe({**values, **changes}, origin="test")


def test_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"trains against a threat model; add --set threat=Linf@8/255"):
        build_objective(recipe(threat=None))
    with pytest.raises(UserError, match=r"beta = -1.0: input should be greater than or equal to 0"):
        recipe(defense={"name": "trades", "parameters": {"beta": -1.0}})
    with pytest.raises(UserError, match=r"inner = 'both'"):
        recipe(defense={"name": "trades", "parameters": {"inner": "both"}})


def test_a_step_of_the_ascent_follows_the_divergence_from_the_clean_prediction():
    """Far from the image the two directions of the divergence have different gradients."""
    images, labels, random = batch()
    model, threat = small_net().eval(), ThreatModel.parse("L2@0.8")
    begin = random_start(images, threat, random.at("trades")).requires_grad_()
    p = model(images).softmax(1).detach()
    (p * (p.log() - model(begin).softmax(1).log())).sum().backward()
    slope = begin.grad / begin.grad.flatten(1).norm(dim=1)[:, None, None, None]
    found = trades(
        model, images, labels, random=random, progress=0.0, threat=threat, steps=1, step_size=0.01, start="random"
    )
    expected = project((begin + 0.01 * slope).detach(), images, threat)
    assert torch.allclose(found.views["adversarial"].images, expected, rtol=0, atol=1e-9)

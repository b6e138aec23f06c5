"""ATENT's average against its formula, its walk against PGD's, its options, and digits that become robust."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench import catalog
from robench.attacks.pgd import pgd
from robench.defenses.atent import atent
from robench.errors import UserError
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.recipe import apply_settings, load_recipe
from robench.threat_model import ThreatModel
from robench.workspace import Workspace
from tests.models import SmallNet, pictures
from tests.unit.training.problems import run_training

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
both_norms = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def problem(count=6):
    model, images = SmallNet().double().eval(), pictures(count)
    return model, images, torch.arange(count) % 5, RandomStream(3, torch.arange(count))


def trained(model, images, labels, random, **options):
    return atent(model, images, labels, random=random, progress=0.5, **{"attack_mode": "eval", **options})


def input_gradient(model, point, labels):
    point = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), labels, reduction="sum"), point)
    return gradient


def unit(gradient):
    return gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def transcribed(model, images, labels, random, *, threat, steps, eta, noise, gamma):
    """The iterates of the code's form, written out: start at the radius, step, pull, noise, clip to [0, 1]."""
    random = random.at("atent")
    z = random.at("init").normal(images)
    current = (images + threat.radius * (z.sign() if threat.norm == "Linf" else unit(z))).clamp(0, 1)
    for k in range(1, steps + 1):
        gradient = input_gradient(model, current, labels)
        direction = gradient.sign() if threat.norm == "Linf" else unit(gradient)
        current = current + eta * direction + gamma * (images - current)
        current = current + math.sqrt(2 * eta) * noise * random.at("noise", k).normal(images)
        if k == steps and threat.norm == "Linf":
            current = images + (current - images).clamp(-threat.radius, threat.radius)
        current = current.clamp(0, 1)
        yield current


@both_norms
def test_loss_and_gradient_are_the_weighted_sum_along_the_walk(threat):
    """Algorithms 1 and 2 in the code's form; weights alpha (1 - alpha)^(K - k)."""
    model, images, labels, random = problem()
    gamma, options = (0.08, {"gamma": 0.08}) if threat is L2 else (0.0, {})
    steps, eta, noise, alpha = 4, 0.03, 0.02, 0.4
    options |= {"projection_when": "never"} if threat is L2 else {}
    points = transcribed(model, images, labels, random, threat=threat, steps=steps, eta=eta, noise=noise, gamma=gamma)
    expected = 0.0
    for k, point in enumerate(list(points), start=1):
        expected = expected + alpha * (1 - alpha) ** (steps - k) * F.cross_entropy(model(point), labels)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = trained(
        model, images, labels, random, threat=threat, steps=steps, step_size=eta, noise=noise, alpha=alpha, **options
    )
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(torch.autograd.grad(loss.total, list(model.parameters())), gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-13)


class Recorder(nn.Module):
    """Passes on to a network, and remembers what it was shown while the weights could learn, and in which mode."""

    def __init__(self, network):
        super().__init__()
        self.network, self.learned, self.searched, self.modes = network, [], [], []

    def forward(self, images):
        learning = next(self.network.parameters()).requires_grad
        (self.learned if learning else self.searched).append(images.detach().clone())
        self.modes.append((learning, self.training))
        return self.network(images)


@both_norms
def test_without_noise_and_pull_the_last_image_is_that_of_pgd(threat):
    model, images, labels, random = problem()
    options = {"noise": 0.0, "init": "none", "projection_when": "every", "steps": 9, "step_size": 0.02}
    options |= {"gamma": 0.0} if threat is L2 else {}
    loss = trained(model, images, labels, random, threat=threat, **options)
    worst = pgd(
        model,
        images,
        labels,
        threat=threat,
        random=random,
        steps=9,
        step_size=0.02,
        start="image",
        stop_when_broken=False,
    )
    last = loss.views["adversarial"]
    assert torch.equal(last.images, worst)
    assert (model(worst) > model(images)).any(), "the step ascends"
    assert F.cross_entropy(last.logits, labels) > F.cross_entropy(model(images), labels)


@both_norms
@pytest.mark.parametrize("when", ["last", "every"])
def test_the_last_image_lies_in_the_ball(threat, when):
    model, images, labels, random = problem()
    for options in ({}, {"noise": 0.5}, {"step_size": 0.4}):
        loss = trained(model, images, labels, random, threat=threat, projection_when=when, **options)
        moved = distance(loss.views["adversarial"].images - images, threat.norm)
        assert (moved <= threat.reach).all()
        assert loss.parts["perturbation"].item() == pytest.approx(moved.mean().item())
        assert loss.parts["perturbation"] > 0.5 * threat.radius
    free = trained(model, images, labels, random, threat=threat, projection_when="never", step_size=0.4)
    assert free.parts["perturbation"] > threat.radius


@pytest.mark.parametrize(("restoring", "gamma"), [("direct", 0.1), ("times_step", 10.0)])
def test_a_straight_walk_settles_where_pull_and_step_balance(restoring, gamma):
    """At step_size / gamma in the code's form, at 1 / gamma in the printed one; the log says so."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    _, images, _, random = problem()
    options = {"steps": 200, "step_size": 0.01, "noise": 0.0, "init": "none", "projection_when": "never"}
    loss = trained(
        model, images, images.new_zeros(6).long(), random, threat=L2, restoring=restoring, gamma=gamma, **options
    )
    assert loss.parts["perturbation"].item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_a_truncated_average_errs_by_a_power_of_one_minus_alpha(terms):
    """With alpha = 0.9 three terms leave an error of about a thousandth of the gradient."""
    model, images, labels, random = problem()

    def gradient(truncate):
        loss = trained(model, images, labels, random, threat=LINF, steps=8, truncate_average=truncate)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, list(model.parameters()))])

    whole = gradient(0)
    error = float((gradient(terms) - whole).norm() / whole.norm())
    assert 0.3 * 0.1**terms < error < 1.5 * 0.1**terms
    assert torch.equal(gradient(8), whole)
    assert torch.equal(gradient(50), whole)


@pytest.mark.parametrize(("truncate", "terms"), [(0, 6), (2, 2), (9, 6)])
def test_evaluates_for_the_weights_only_what_is_averaged(truncate, terms):
    model, images, labels, random = problem()
    recorder = Recorder(model).train()
    trained(recorder, images, labels, random, threat=LINF, steps=6, truncate_average=truncate)
    assert (len(recorder.searched), len(recorder.learned)) == (6, terms)
    assert recorder.modes == [(False, False)] * 6 + [(True, True)] * terms
    plugin = catalog.find("defenses", "atent")
    settings = plugin.settings({"steps": 6, "truncate_average": truncate})
    assert plugin.training_passes(settings, classes=5) == 6 + terms
    if truncate == 0:
        # The walk's own images, but for the first one, which is no iterate.
        assert all(torch.equal(a, b) for a, b in zip(recorder.searched[1:], recorder.learned, strict=False))


def test_the_walk_sees_the_batch_in_train_mode_as_the_code_does():
    model, images, labels, random = problem()
    recorder = Recorder(model).train()
    trained(recorder, images, labels, random, threat=LINF, steps=3, attack_mode="train")
    assert recorder.modes == [(False, True)] * 3 + [(True, True)] * 3


class Replayed(nn.Module):
    """Smooth; shows the weights the same images again while they are changed a little (they are constants to it)."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        self.shown, self.replay = [], None

    def forward(self, images):
        if self.network[1].weight.requires_grad:
            if self.replay is None:
                self.shown.append(images.detach().clone())
            else:
                images = next(self.replay)
        return self.network(images)


OPTIONS = {
    "linf": {"threat": LINF, "alpha": 0.5},
    "linf truncated": {"threat": LINF, "alpha": 0.5, "truncate_average": 2},
    "linf increments": {"threat": LINF, "projection_target": "increment", "gamma": 20.0},
    "linf raw": {"threat": LINF, "gradient_transform": "raw", "raw_reduction": "mean", "init": "normal"},
    "l2": {"threat": L2, "alpha": 0.5, "gamma": 0.3},
    "l2 printed": {"threat": L2, "restoring": "times_step", "init": "uniform", "projection_when": "every"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameter_gradients_agree_with_finite_differences(options):
    _, images, labels, random = problem()
    model = Replayed()

    def loss():
        return trained(model, images, labels % 4, random, steps=4, **options).total

    loss().backward()
    for parameter in model.parameters():
        flat, step = parameter.data.view(-1), 1e-6
        for position in range(0, len(flat), max(1, len(flat) // 3)):
            before, values = flat[position].item(), []
            for sign in (1, -1):
                flat[position] = before + sign * step
                model.replay = iter(model.shown)
                values.append(loss().item())
            flat[position] = before
            expected = (values[0] - values[1]) / (2 * step)
            assert parameter.grad.view(-1)[position].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_raw_gradients_are_of_the_sum_or_of_the_mean():
    model, images, labels, random = problem()
    options = {"gradient_transform": "raw", "noise": 0.0, "init": "none", "steps": 1, "projection_when": "never"}
    moved = []
    for reduction in ("sum", "mean"):
        loss = trained(model, images, labels, random, threat=L2, step_size=0.01, raw_reduction=reduction, **options)
        moved.append(loss.views["adversarial"].images - images)
    assert torch.allclose(moved[0], 0.01 * input_gradient(model, images, labels), atol=1e-12)
    assert torch.allclose(moved[0], 6 * moved[1], atol=1e-12)


def test_warmup_shrinks_radius_and_step():
    model, images, labels, random = problem()

    def loss(progress, threat, **options):
        options |= {"noise": 0.0, "attack_mode": "eval"}
        parsed = ThreatModel.parse(threat)
        return atent(model, images, labels, random=random, progress=progress, threat=parsed, **options).total.item()

    clean = F.cross_entropy(model(images), labels).item()
    assert loss(0.0, "Linf@0.2", warmup=0.4, step_size=0.04) == pytest.approx(clean, rel=1e-9)
    assert loss(0.1, "Linf@0.2", warmup=0.4, step_size=0.04) == loss(0.9, "Linf@0.05", step_size=0.01)
    assert loss(0.4, "Linf@0.2", warmup=0.4) == loss(0.4, "Linf@0.2")
    # gamma stands for the full ball.
    assert loss(0.1, "Linf@0.2", warmup=0.4, gamma=5.0) == loss(0.1, "Linf@0.2", warmup=0.4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 3.33}, r"gamma = 3.33 contradicts threat Linf@0.05: .*1/gamma; leave gamma out, or .*gamma = 20"),
        ({"gamma": 0.0}, "gamma = 0 contradicts"),
        ({"alpha": 0.0}, "alpha = 0 averages nothing"),
        ({"raw_reduction": "mean"}, "raw_reduction = mean changes nothing"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, text):
    with pytest.raises(UserError, match=text) as caught:
        trained(*problem(), threat=LINF, **options)
    assert "\n" not in str(caught.value)


def test_gamma_may_say_what_epsilon_says():
    for threat, gamma in (("Linf@0.3", 3.33), ("Linf@0.031", 1 / 0.031)):
        with_gamma, without = (
            trained(*problem(), threat=ThreatModel.parse(threat), gamma=value) for value in (gamma, None)
        )
        assert with_gamma.total.item() == without.total.item()


NAMED = ["atent_wrn", *(name for name in catalog.plugins("recipes") if "atent" in name and name != "atent_wrn")]


@pytest.mark.parametrize("name", NAMED)
def test_no_recipe_contradicts_itself(name):
    recipe = load_recipe(name)
    if recipe.defense.name.startswith("atent"):
        parameters = {**recipe.defense.parameters, "steps": 1}
        model, images, labels, random = problem()
        assert trained(model, images, labels, random, threat=recipe.threat, **parameters).total.isfinite()


def test_both_names_of_the_wide_networks_recipe_are_one_recipe():
    recipe = load_recipe("atent_wrn")
    assert recipe == load_recipe("atent-linf-cifar10")
    assert (recipe.architecture.name, recipe.dataset, str(recipe.threat)) == ("wrn_34_10", "cifar10", "Linf@0.031")
    tuned = load_recipe("atent-linf-finetune-cifar10")
    assert tuned.defense == recipe.defense
    assert (tuned.epochs, tuned.optimizer.lr, tuned.start) == (20, 1e-4, "wrn-benign")


EPSILON = "0.15"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_become_robust(tmp_path, seed):
    """The recipe digits-atent, with fewer steps and epochs, against standard training of the same length."""
    atent = robust_accuracy_on_digits("digits-atent", tmp_path, seed, "defense.steps=4")
    assert atent > robust_accuracy_on_digits("digits-standard", tmp_path, seed) + 0.1


def robust_accuracy_on_digits(name, folder, seed, *more):
    settings = [f"seed={seed}", "epochs=9", "selection.metric=last", "selection.every=9", *more]
    settings += ["selection.attack=pgd-20", f"selection.threat=Linf@{EPSILON}"]
    recipe = apply_settings(load_recipe(name), settings)
    (folder / "model_zoo").mkdir(exist_ok=True)
    card = run_training(Workspace(root=folder, data_root=folder, user_zoo=folder / "personal"), recipe, name)
    return card.weights.validation["robust_accuracy"]

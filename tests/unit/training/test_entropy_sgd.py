"""Entropy-SGD against its algorithm written out, its limits, and what is measured and resumed."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from robench.errors import UserError
from robench.recipe import EntropySgd, Sgd, apply_settings
from robench.training import loop
from robench.training.entropy_sgd import EntropySGD
from robench.training.optimization import build_optimizer, settled
from tests.models import numbers
from tests.unit.training.problems import (
    STEPS_PER_EPOCH,
    Watcher,
    log_without_seconds,
    make_workspace,
    run_training,
    small_recipe,
)

CURVATURE = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)


def settings(**changes):
    return EntropySgd(name="entropy-sgd", lr=0.1, **changes)


def bowl():
    """A model of two weights; the loss of batch b is a parabola whose centre moves with b."""
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    return model


def gradient(w, batch):
    return (w - 0.1 * numbers(1, 2, seed=batch)) @ CURVATURE


def descend(model, optimizer, batches):
    """Take a step on each batch and return the parameters after it."""
    seen = []
    for batch in batches:
        model.weight.grad = gradient(model.weight.detach(), batch)
        optimizer.step()
        seen.append(model.weight.detach().clone())
    return seen


def written_out(given, batches, noise=lambda step: 0.0):
    """Algorithm 3 with the reference implementation's momentum, walk after walk."""
    w, outer = bowl().weight.detach().clone(), 0.0
    weights, beta, nesterov = [], given.momentum, given.nesterov

    def direction(g, buffer, at):
        g = g + given.weight_decay * at
        buffer = beta * buffer + g
        return (g + beta * buffer if nesterov else buffer), buffer

    for t in range(len(batches) // given.inner_steps):
        gamma = given.gamma * (1 + given.scoping) ** t
        walk, mu, inner = w.clone(), w.clone(), 0.0
        for k in range(given.inner_steps):
            step = t * given.inner_steps + k
            d, inner = direction(gradient(walk, batches[step]), inner, walk)
            walk = walk + given.inner_lr * (-d + gamma * (w - walk))
            walk = walk + math.sqrt(2 * given.inner_lr) * given.noise * noise(step)
            mu = given.averaging * mu + (1 - given.averaging) * walk
        d, outer = direction((gamma if given.outer_scale == "gamma" else 1.0) * (w - mu), outer, w)
        w = w - given.lr * d
        weights.append(w)
    return weights


FORMS = {
    "reference": {"noise": 0.0},
    "printed": {"noise": 0.0, "outer_scale": "gamma", "gamma": 0.5, "momentum": 0.0, "nesterov": False},
    "all": {"noise": 0.0, "gamma": 0.3, "scoping": 0.2, "weight_decay": 0.05, "nesterov": False, "averaging": 0.6},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("inner_steps", [1, 4])
def test_weights_are_those_of_the_algorithm(form, inner_steps):
    given, model, batches = settings(inner_steps=inner_steps, **form), bowl(), list(range(12))
    seen = descend(model, EntropySGD(model.parameters(), given, seed=0), batches)
    expected = written_out(given, batches)
    for found, wanted in zip(seen[inner_steps - 1 :: inner_steps], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_noise_enters_every_step_of_the_walk_with_its_amplitude():
    given = settings(inner_steps=3, noise=0.02, averaging=0.5)
    model, quiet = (torch.nn.Linear(200, 100, bias=False, dtype=torch.float64) for _ in range(2))
    quiet.load_state_dict(model.state_dict())
    optimizer = EntropySGD(model.parameters(), given, seed=0)
    other = EntropySGD(quiet.parameters(), given.model_copy(update={"noise": 0.0}), seed=0)
    before, draws = model.weight.detach().clone(), []
    for _ in range(2):
        for net, method in ((model, optimizer), (quiet, other)):
            net.weight.grad = torch.zeros_like(net.weight)
            method.step()
        draws.append(model.weight.detach() - before - sum(draws))
    assert torch.equal(quiet.weight, before)
    for draw in draws:
        assert float(draw.std()) == pytest.approx(math.sqrt(0.2) * 0.02, rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack([d.flatten() for d in draws]))[0, 1])) < 0.03


def test_noise_belongs_to_seed_and_step():
    def path(seed):
        model = bowl()
        return torch.stack(descend(model, EntropySGD(model.parameters(), settings(noise=0.1), seed=seed), range(5)))

    assert torch.equal(path(1), path(1))
    assert not torch.equal(path(1), path(2))


def test_without_walk_it_is_nesterov_sgd():
    plain, other = bowl(), bowl()
    values = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}
    sgd = build_optimizer(Sgd(name="sgd", **values), plain, seed=0)
    entropy = build_optimizer(EntropySgd(name="entropy-sgd", inner_steps=0, **values), other, seed=0)
    for found, wanted in zip(descend(other, entropy, range(6)), descend(plain, sgd, range(6)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-13)


def test_walks_around_a_parabola_find_its_centre():
    model = bowl()
    optimizer = EntropySGD(model.parameters(), settings(inner_steps=5, noise=0.0), seed=0)
    descend(model, optimizer, [7] * 600)
    assert torch.allclose(model.weight, 0.1 * numbers(1, 2, seed=7), atol=1e-4)


def test_between_two_walks_steps_the_weights_can_be_shown():
    model, before = bowl(), bowl().weight.detach()
    optimizer = EntropySGD(model.parameters(), settings(inner_steps=3), seed=0)
    with settled(optimizer):  # before the first step
        assert torch.equal(model.weight, before)
    descend(model, optimizer, range(2))
    walking = model.weight.detach().clone()
    assert not torch.equal(walking, before)
    with settled(optimizer):
        assert torch.equal(model.weight, before)
    assert torch.equal(model.weight, walking)
    after = descend(model, optimizer, [2])[0]
    with settled(optimizer):
        assert torch.equal(model.weight, after)


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


#: Seven steps an epoch, so that epochs end inside walks.
WALKING = {
    "optimizer": {"name": "entropy-sgd", "lr": 0.1, "inner_steps": 4, "noise": 1e-3, "gamma": 0.01},
    "schedule": {"name": "constant"},
    "averaging": None,
    "epochs": 3,
}


def test_a_training_ends_with_the_weights_and_measures_them(workspace, monkeypatch):
    """Five walks of four steps, and one step of a sixth, of which nothing is in the model."""
    recipe = small_recipe(workspace, **WALKING, selection={"metric": "last"})
    measured = []
    whole = loop.Examiner.measure

    def watching(examiner, model):
        measured.append({name: value.clone() for name, value in model.state_dict().items()})
        return whole(examiner, model)

    monkeypatch.setattr(loop.Examiner, "measure", watching)
    weights, steps = [], []
    plain = EntropySGD.step

    def step(optimizer):
        plain(optimizer)
        steps.append(optimizer)
        if len(steps) % 4 == 0:
            weights.append(optimizer.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(EntropySGD, "step", step)
    run_training(workspace, recipe)
    assert len(steps) == 3 * STEPS_PER_EPOCH
    name = next(n for n, v in measured[0].items() if torch.equal(v, weights[0]))
    for epoch, complete in ((1, 1), (2, 3), (3, 5)):
        assert torch.equal(measured[epoch - 1][name], weights[complete - 1])
    stored = load_file(workspace.model_zoo / "x" / "model.safetensors")
    assert torch.equal(stored[name.removeprefix("network.")], weights[-1])


def test_interrupted_inside_a_walk_it_ends_with_the_same_bits(workspace, monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    recipe = small_recipe(workspace, **WALKING)
    run_training(workspace, recipe, "straight")
    for stop in (2, 5, 7, 8, 13, 21):
        with pytest.raises(KeyboardInterrupt):
            run_training(workspace, recipe, "stopped", Watcher(stop_after=stop), resume=True)
    run_training(workspace, recipe, "stopped", resume=True)
    for file in ("model.safetensors", "golden.json"):
        first, second = ((workspace.model_zoo / name / file).read_bytes() for name in ("straight", "stopped"))
        assert first == second
    assert log_without_seconds(workspace, "straight") == log_without_seconds(workspace, "stopped")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["averaging=0.9"], "averaging would average entropy-sgd's walk"),
        (["optimizer.outer_scale=gamma", "optimizer.gamma=0"], "outer_scale gamma needs optimizer.gamma above 0"),
        (["optimizer.momentum=0"], "nesterov needs optimizer.momentum"),
        (["optimizer.inner_step=3"], "did you mean 'inner_steps'"),
        (["optimizer.averaging=1"], "optimizer.averaging = '1'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(workspace, changes, text):
    with pytest.raises(UserError, match=text):
        apply_settings(small_recipe(workspace, **WALKING), changes)


def test_an_sgd_recipe_can_be_told_to_walk(workspace):
    plain = small_recipe(workspace, optimizer={"name": "sgd", "lr": 0.2, "momentum": 0.8}, averaging=None)
    changed = apply_settings(plain, ["optimizer.name=entropy-sgd", "optimizer.inner_steps=5"])
    assert changed.optimizer == EntropySgd(name="entropy-sgd", lr=0.2, momentum=0.8, nesterov=False, inner_steps=5)

"""LBGAT: the terms by an independent transcription, the second network's training, EMR on top of it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from robench import training
from robench.classifier import frozen, mode
from robench.defenses._ascent import climbed
from robench.defenses.lbgat import LearnableBoundaryGuidance
from robench.losses import kl_divergence
from robench.random_streams import RandomStream
from robench.recipe import load_recipe
from robench.threat_model import ThreatModel
from robench.training import loop
from tests.models import Linear, SmallNet, pictures
from tests.unit.training.problems import Watcher, log_without_seconds, make_workspace, run_training, small_recipe

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def batch(count=6):
    return pictures(count), torch.arange(count) % 5, RandomStream(3, torch.arange(count), ("test",))


def defense_of(**options):
    return LearnableBoundaryGuidance(new_network=lambda _: Linear(5, 16, seed=7), **options)


def call(defense, model, threat=LINF):
    images, labels, random = batch()
    return defense(model, images, labels, random=random, progress=0.5, threat=threat)


def transcription(f, q, images, labels, adversarial, beta):
    """The three terms with numbers written out."""
    worst, guide = f(adversarial), q(images)
    n, classes = worst.shape
    guidance = sum((worst[i, j] - guide[i, j]) ** 2 for i in range(n) for j in range(classes)) / (n * classes)
    natural = -sum(guide.softmax(1)[i, y].log() for i, y in enumerate(labels.tolist())) / n
    p, r = f(images).softmax(1), worst.softmax(1)
    divergence = sum(p[i, j] * (p[i, j] / r[i, j]).log() for i in range(n) for j in range(classes)) / n
    return guidance + natural + beta * divergence


@each_threat
@pytest.mark.parametrize("beta", [0.0, 2.5])
def test_loss_and_both_networks_gradients_are_the_formula(threat, beta):
    images, labels, _ = batch()
    model, defense = SmallNet().double().train(), defense_of(beta=beta)
    twin, guide = copy.deepcopy(model), copy.deepcopy(defense.companion)
    loss = call(defense, model, threat)
    loss.total.backward()
    expected = transcription(twin, guide, images, labels, loss.views["adversarial"].images, beta)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    both = [*model.parameters(), *defense.companion.parameters()]
    for ours, theirs in zip(both, [*twin.parameters(), *guide.parameters()], strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@each_threat
def test_the_search_climbs_the_networks_own_divergence(threat):
    images, labels, random = batch()
    model = SmallNet().double().train()
    found = call(defense_of(steps=4), model, threat).views["adversarial"].images
    reference = SmallNet().double()
    with frozen(reference), mode(reference, training=False):
        clean = reference(images).detach()
        expected = climbed(
            reference,
            images,
            labels,
            threat=threat,
            random=random.at("lbgat"),
            loss=lambda logits, _: kl_divergence(clean, logits),
            steps=4,
            step_size=None,
            start="noise",
        )
    assert torch.equal(found, expected)


def lbgat_recipe(workspace, **changes):
    parameters = {"companion": "digits_cnn_unbiased", "steps": 1, "beta": 1.0}
    defense = {"name": "lbgat", "parameters": parameters}
    return small_recipe(workspace, **{"defense": defense, "epochs": 1, "averaging": None, **changes})


def companions_of(monkeypatch):
    made = []
    build = training._new_network

    def watched(*arguments):
        network = build(*arguments)
        made.append((network, {k: v.clone() for k, v in network.state_dict().items()}))
        return network

    monkeypatch.setattr(training, "_new_network", watched)
    return made


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_second_network_is_trained_by_the_same_optimiser_and_kept_beside_the_model(
    tmp_path, monkeypatch, optimizer
):
    made = companions_of(monkeypatch)
    workspace = make_workspace(tmp_path)
    card = run_training(workspace, lbgat_recipe(workspace, optimizer={"name": optimizer, "lr": 0.01}))
    ((network, before),) = made
    for name, value in network.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert network.training
    kept = load_file(workspace.model_zoo / "x" / "defense.safetensors")
    assert {k.removeprefix("lbgat/") for k in kept} == set(before)
    assert all(torch.equal(kept[f"lbgat/{name}"], value) for name, value in network.state_dict().items())
    deployed = load_file(workspace.model_zoo / "x" / "model.safetensors")
    assert "linear2.weight" in deployed
    assert card.parameter_count == sum(v.numel() for v in deployed.values())


def test_goes_on_with_both_networks_and_their_momenta_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    workspace = make_workspace(tmp_path)
    recipe = lbgat_recipe(workspace, regularizers=[{"name": "emr", "parameters": {"strength": 0.1}}])
    run_training(workspace, recipe, "straight")
    for stop in (3,):
        with pytest.raises(KeyboardInterrupt):
            run_training(workspace, recipe, "stopped", Watcher(stop_after=stop), resume=True)
    run_training(workspace, recipe, "stopped", resume=True)
    for file in ("model.safetensors", "defense.safetensors"):
        one, other = ((workspace.model_zoo / name / file).read_bytes() for name in ("straight", "stopped"))
        assert one == other, file
    assert log_without_seconds(workspace, "straight") == log_without_seconds(workspace, "stopped")


def test_initial_weights_belong_to_the_seed(tmp_path, monkeypatch):
    made = companions_of(monkeypatch)
    workspace = make_workspace(tmp_path)
    run = training.Run(name="x", device=torch.device("cpu"), command="x")
    found = []
    for seed in (0, 0, 1):
        training.forecast(lbgat_recipe(workspace, seed=seed), run, workspace=workspace)
        found.append(made[-1][1]["network.linear2.weight"])
    first, again, other = found
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_emr_stands_on_it_in_a_recipe():
    recipe = load_recipe("emr-wrn-lbgat-emr")
    assert [r.name for r in recipe.regularizers] == ["emr"]
    assert (recipe.defense.parameters["beta"], recipe.defense.parameters["step_size"]) == (0.0, 0.003)

"""MMA: margins on models whose margins are known, the loss by an independent transcription, what it remembers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from robench.defenses.mma import MaxMarginTraining
from robench.errors import UserError
from robench.losses import margin, soft_margin
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from robench.training import loop
from tests.models import Linear, SmallNet, numbers, pictures
from tests.unit.training.problems import Watcher, log_without_seconds, make_workspace, run_training, small_recipe

LINF, L2 = ThreatModel.parse("Linf@0.05"), ThreatModel.parse("L2@0.3")
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def stream(ids):
    return RandomStream(3, ids, ("test",))


def small_net():
    """A network that is sure of what it says."""
    model = SmallNet().double().train()
    with torch.no_grad():
        model.classify.weight.mul_(10)
        model.features[1].momentum = 1.0  # the running statistics are the batch's: both modes agree
        model(pictures(9))
    return model


def batch():
    """Images of which it gets two in three right."""
    count = 9
    images = pictures(count)
    labels = small_net()(images).argmax(1)
    labels[::3] = (labels[::3] + 1) % 5
    return images, labels, stream(torch.arange(count))


def call(defense, model, given, threat=LINF):
    images, labels, random = given
    return defense(model, images, labels, random=random, progress=0.5, threat=threat)


def two_classes(threat, count=40):
    """A linear model, and images of which most are right, by margins that are known."""
    model = Linear(2, 16)
    images = pictures(count)
    with torch.no_grad():
        model.bias[1] += (model(images)[:, 0] - model(images)[:, 1]).median()
    labels = model(images).argmax(1)
    labels[::5] = 1 - labels[::5]
    return model, (images, labels, stream(torch.arange(count))), model.margins(images, labels, threat.norm)


def test_soft_margin_is_the_margin_of_two_classes_and_above_it_for_more():
    labels = torch.arange(6) % 2
    for classes in (2, 3):
        logits = 5 * numbers(6, classes)
        hard, soft = margin(logits, labels), soft_margin(logits, labels)
        assert torch.allclose(hard, soft) if classes == 2 else bool((soft > hard).all())
        expected = [(row.exp().sum() - row[y].exp()).log() - row[y] for row, y in zip(logits, labels, strict=True)]
        assert torch.allclose(soft, torch.stack(expected))


@each_threat
def test_finds_the_exact_margins_of_a_linear_model(threat):
    model, given, expected = two_classes(threat)
    right = expected > 0
    farthest = expected.max().item()
    # Long steps: in L2 what is left of the random start shrinks with each of them.
    options = {"d_max": 2 * farthest, "first_radius": farthest / 2, "steps": 20, "step_scale": 40.0}
    defense = MaxMarginTraining(**options, bisections=40)
    loss = call(defense, model, given, threat)
    found = defense.margins.double()
    assert 0.5 < right.double().mean() < 1
    assert torch.allclose(found[right], expected[right], rtol=1e-5, atol=1e-6)
    assert not found[~right].any()
    points = loss.views["adversarial"]
    assert soft_margin(points.logits, given[1])[right].abs().max() < 1e-2
    assert torch.equal(points.images[~right], given[0][~right]), "wrong ones are trained on as they are"


@each_threat
def test_each_bisection_halves_the_uncertainty(threat):
    model, given, expected = two_classes(threat)
    right, farthest = expected > 0, expected.max().item()
    options = {"d_max": 2 * farthest, "first_radius": farthest / 2, "steps": 20, "step_scale": 40.0}
    for bisections in (3, 6, 9):
        defense = MaxMarginTraining(bisections=bisections, **options)
        call(defense, model, given, threat)
        error = (defense.margins.double() - expected)[right].abs().max().item()
        assert error <= 2.1 * farthest / 2 ** (bisections - 1)
    assert error > 0


@each_threat
def test_loss_and_its_gradients_are_the_formula_at_what_the_search_found(threat):
    model, given = small_net(), batch()
    images, labels, _ = given
    twin = copy.deepcopy(model)
    with torch.no_grad():
        right = soft_margin(copy.deepcopy(model)(images), labels) < 0
    assert 0 < right.sum() < len(labels)
    first = MaxMarginTraining(d_max=1.0)
    call(first, copy.deepcopy(model), given, threat)
    d_max = first.margins[right].median().item()  # some margins are above it
    defense = MaxMarginTraining(d_max=d_max, clean_share=0.25)
    loss = call(defense, model, given, threat)
    loss.total.backward()
    points = loss.views["adversarial"].images
    expected = torch.zeros((), dtype=torch.float64)
    p, q = twin(images).softmax(1), twin(points).softmax(1)
    counted = []
    for i, y in enumerate(labels.tolist()):
        expected = expected - 0.25 * p[i, y].log()
        if not right[i] or defense.margins[i] < d_max:
            expected = expected - 0.75 * q[i, y].log()
            counted.append(i)
    assert int((~right).sum()) < len(counted) < len(labels)
    expected = expected / len(labels)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


def test_only_clean_images_count_with_a_clean_share_of_one():
    model, given = small_net(), batch()
    loss = call(MaxMarginTraining(clean_share=1.0), model, given)
    assert loss.total.item() == pytest.approx(F.cross_entropy(small_net()(given[0]), given[1]).item(), rel=1e-12)


def test_the_search_starts_from_each_images_own_last_margin(monkeypatch):
    model, (images, labels, random), _ = two_classes(LINF)
    seen = []
    search = MaxMarginTraining._boundary
    monkeypatch.setattr(
        MaxMarginTraining,
        "_boundary",
        lambda self, *a, balls, **k: seen.append(balls.radius) or search(self, *a, balls=balls, **k),
    )
    defense = MaxMarginTraining(d_max=0.5, first_radius=0.01)
    right = (soft_margin(model(images), labels) < 0).nonzero().squeeze(1)
    call(defense, model, (images, labels, random))
    assert torch.allclose(seen[0], torch.full_like(seen[0], 0.01))
    learned = defense.margins.clone()
    # Another order, other company: the radius follows the example, not its place.
    rows = torch.arange(len(images)).flip(0)[3:]
    call(defense, model, (images[rows], labels[rows], random[rows]))
    known = learned[rows][torch.isin(rows, right)]
    assert torch.allclose(seen[1], known.clamp_min(0.01).double())
    assert len(seen[1].unique()) > 5
    untouched = torch.tensor([i for i in range(len(images)) if i not in rows.tolist()])
    assert torch.equal(defense.margins[untouched], learned[untouched])


def test_an_image_that_falls_begins_at_the_smallest_ball_again():
    model, (images, labels, random), expected = two_classes(LINF)
    defense = MaxMarginTraining(d_max=0.5, first_radius=0.001)
    call(defense, model, (images, labels, random))
    assert (defense.margins[expected > 0] > 0).all()
    call(defense, model, (images, 1 - labels, random))
    assert not defense.margins[expected > 0].any()


def test_what_nothing_breaks_has_the_largest_margin_and_does_not_count():
    model, given, _ = two_classes(LINF)
    with torch.no_grad():
        model.weight.mul_(1e-9)
        model.bias.copy_(torch.tensor([1.0, -1.0]))
    given = (given[0], torch.zeros_like(given[1]), given[2])
    defense = MaxMarginTraining(d_max=0.2, clean_share=0.0)
    loss = call(defense, model, given)
    assert torch.allclose(defense.margins, torch.tensor(0.21), rtol=1e-2)
    assert loss.total.item() == 0
    points = loss.views["adversarial"].images
    assert points.min() >= 0
    assert points.max() <= 1


@pytest.mark.parametrize(("attack_mode", "moves"), [("eval", False), ("train", True)])
def test_attack_mode_decides_whether_the_search_moves_running_statistics(attack_mode, moves):
    model = small_net()
    before = model.features[1].num_batches_tracked.item()
    call(MaxMarginTraining(steps=3, bisections=4, attack_mode=attack_mode), model, batch())
    assert model.features[1].num_batches_tracked.item() - before == 2 + 7 * moves


def test_none_right_and_a_single_image():
    model, (images, labels, random), expected = two_classes(LINF)
    wrong = (expected < 0).nonzero().squeeze(1)
    for rows in (wrong, wrong[:1]):
        loss = call(MaxMarginTraining(), model, (images[rows], labels[rows], random[rows]))
        assert loss.total.item() == pytest.approx(F.cross_entropy(model(images[rows]), labels[rows]).item())


def test_refuses_a_first_radius_beyond_d_max():
    with pytest.raises(UserError, match=r"mma: first_radius = 0.5 is larger than d_max = 0.3"):
        MaxMarginTraining(d_max=0.3, first_radius=0.5)


def test_margins_survive_an_interruption_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    workspace = make_workspace(tmp_path)
    recipe = small_recipe(
        workspace, defense={"name": "mma", "parameters": {"steps": 2, "first_radius": 0.001}}, epochs=3
    )
    run_training(workspace, recipe, "straight")
    for stop in (16,):  # in the third epoch, where margins are known
        with pytest.raises(KeyboardInterrupt):
            run_training(workspace, recipe, "stopped", Watcher(stop_after=stop), resume=True)
    run_training(workspace, recipe, "stopped", resume=True)
    for file in ("model.safetensors", "defense.safetensors"):
        one, other = ((workspace.model_zoo / name / file).read_bytes() for name in ("straight", "stopped"))
        assert one == other, file
    margins = load_file(workspace.model_zoo / "straight" / "defense.safetensors")["mma/margins"]
    assert (margins > 0.001).any(), "else the first radius would do"
    assert log_without_seconds(workspace, "straight") == log_without_seconds(workspace, "stopped")

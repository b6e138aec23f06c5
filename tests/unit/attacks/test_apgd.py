"""APGD against Algorithm 1 written down example by example, and what it promises about passes and targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robench.attacks.apgd import Position, apgd, checkpoints, classes_aimed_at, targeted
from robench.losses import TOP_1, Criterion, difference_of_logits_ratio
from robench.lp_geometry import distance, random_start
from robench.random_streams import RandomStream
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, numbers, pictures


def threat_of(norm, epsilon):
    return ThreatModel(norm=norm, epsilon=epsilon)


def small_net():
    return SmallNet().eval().double().requires_grad_(False)


class Favoured(SmallNet):
    """A net whose first class stands far from every image: attacks walk through many of its kinks and none succeeds."""

    def forward(self, images):
        return super().forward(images) + 8 * torch.eye(5, dtype=images.dtype)[0]


def stream(count):
    return RandomStream(3, torch.arange(count))


def nearest_in_ball(point, image, threat):
    """Project one image onto the box, then onto the ball."""
    offset = point.clamp(0, 1) - image
    if threat.norm == "Linf":
        offset = offset.clamp(-threat.radius, threat.radius)
    elif offset.norm() > threat.radius:
        offset = offset * threat.radius / offset.norm()
    return image + offset


def algorithm_1(objective, start, image, threat, steps):
    """Return the best of all iterates of one example: Algorithm 1 of the paper, line by line, no bookkeeping saved."""
    when = [0, *(w for w in range(1, steps) if w in set(checkpoints(steps)))]

    def look(point):
        leaf = point.clone().requires_grad_()
        value = objective(leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    def direction(gradient):
        return gradient.sign() if threat.norm == "Linf" else gradient / gradient.norm()

    eta = 2 * threat.radius
    points, values = [start], []
    value, gradient = look(start)
    values.append(value)
    best, best_value, best_gradient = start, value, gradient
    eta_then, best_then, increases = eta, value, 0
    for k in range(steps):
        z = nearest_in_ball(points[-1] + eta * direction(gradient), image, threat)
        if k == 0:
            following = z
        else:
            blend = points[-1] + 0.75 * (z - points[-1]) + 0.25 * (points[-1] - points[-2])
            following = nearest_in_ball(blend, image, threat)
        value, gradient = look(following)
        increases += value > values[-1]
        points.append(following)
        values.append(value)
        if value > best_value:
            best, best_value, best_gradient = following, value, gradient
        if k + 1 in when:
            first = increases < 0.75 * (k + 1 - max(w for w in when if w <= k))
            second = eta == eta_then and best_value == best_then
            eta_then, best_then, increases = eta, best_value, 0
            if first or second:
                eta /= 2
                points[-1], values[-1], gradient = best, best_value, best_gradient
    return best


def cross_entropy_of(model, label):
    return lambda point: -torch.log_softmax(model(point[None])[0], 0)[label]


def targeted_ratio_of(model, label, aim):
    """Equation (7) with its sign, without the constant that keeps it finite."""

    def objective(point):
        logits = model(point[None])[0]
        z = logits.sort(descending=True).values
        return -(logits[label] - logits[aim]) / (z[0] - (z[2] + z[3]) / 2)

    return objective


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("targets", [0, 2])
def test_who_stands_ends_where_algorithm_1_ends(norm, targets):
    """On the cross-entropy, and on equation (7) in the second of two targeted runs, which is the last."""
    model = Favoured(side=6).eval().double().requires_grad_(False)
    images, labels = 2.5 * (pictures(10, (1, 6, 6)) - 0.3), torch.zeros(10, dtype=torch.int64)
    logits, threat = model(images), threat_of(norm, "0.4" if norm == "Linf" else "1.5")
    loss = "dlr" if targets else "ce"
    found = apgd(model, images, labels, threat=threat, random=stream(10), steps=40, loss=loss, targets=targets)
    starts = random_start(images, threat, stream(10).at("target", max(targets - 1, 0), "restart", 0))
    stood = (model(found).argmax(1) == labels).nonzero().flatten().tolist()
    assert len(stood) >= 5
    for i in stood:
        aim = int(logits[i, 1:].argsort(descending=True)[1]) + 1
        objective = targeted_ratio_of(model, labels[i], aim) if targets else cross_entropy_of(model, labels[i])
        assert torch.allclose(found[i], algorithm_1(objective, starts[i], images[i], threat, 40), atol=1e-9)


def test_checkpoints_are_the_papers():
    assert list(checkpoints(100)) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(1))[:2] == [0, 1]
    assert list(checkpoints(10)) == [0, 3, 5, 6, 7, 8, 9, 10, 10]  # rounded up


def position(**changed):
    """Return two examples on one pixel, the values that `adapt` looks at changed."""
    pixel, two = torch.zeros(2, 1, 1, 1), torch.zeros(2)
    at = Position.at(pixel, pixel, two.long(), aims=two.long()[:, None], radius=1.0)
    at.best, at.best_gradient = pixel + 7, pixel + 8
    at.best_loss, at.loss = two + 2, two + 1
    for name, value in changed.items():
        setattr(at, name, torch.tensor(value))
    return at


def test_the_first_look_is_no_increase():
    pixel, one = torch.zeros(2, 1, 1, 1), torch.ones(2)
    at = Position.at(pixel, pixel, one.long(), aims=one.long()[:, None], radius=1.0)
    at.record(one, one < 0, pixel)
    assert at.increases.tolist() == [0, 0]
    at.record(2 * one, one < 0, pixel)
    assert at.increases.tolist() == [1, 1]


def test_step_is_halved_where_too_few_steps_increased_the_loss():
    at = position(increases=[14, 15])  # 0.75 * 20 = 15
    at.adapt(20)
    assert at.step_size.tolist() == [1.0, 2.0]
    assert at.current.flatten().tolist() == [7.0, 0.0]
    assert at.gradient.flatten().tolist() == [8.0, 0.0]
    assert at.loss.tolist() == [2.0, 1.0]
    assert at.halved.tolist() == [True, False]
    assert at.increases.tolist() == [0, 0]


def test_step_is_halved_where_nothing_changed_since_the_last_checkpoint():
    at = position(increases=[20, 20], best_at_checkpoint=[2.0, 2.0], halved=[False, True])
    at.adapt(20)
    assert at.step_size.tolist() == [1.0, 2.0]


def test_passes_of_those_that_stand_and_of_those_that_fall():
    model, images = small_net(), pictures(10)
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5  # broken from the start
    for targets, runs, first in ((0, 1, 0), (3, 3, 1)):
        ledger = Ledger.of(10)
        threat = threat_of("Linf", "0.004")
        found = apgd(
            Target(model, ledger),
            images,
            labels,
            threat=threat,
            random=stream(10),
            steps=12,
            targets=targets,
            loss="dlr",
        )
        stood = model(found).argmax(1) == labels
        assert 0 < int(stood.sum()) < 10
        assert set(ledger.forward_passes[stood].tolist()) == {runs * 13 + first}
        assert set(ledger.backward_passes[stood].tolist()) == {runs * 12}
        assert int(ledger.forward_passes[0]) == 1
        assert (ledger.forward_passes[~stood] < runs * 13).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_further_targets_and_restarts_never_help_the_defender(norm):
    model, images = Linear(9, 16).requires_grad_(False), pictures(60)
    labels = model(images).argmax(1)
    threat = threat_of(norm, str(round(float(model.margins(images, labels, norm).median()), 6)))

    def broken(**more):
        found = apgd(model, images, labels, threat=threat, random=stream(60), **more)
        return model(found).argmax(1) != labels

    one, four = (broken(steps=10, loss="dlr", targets=targets) for targets in (1, 4))
    assert (one <= four).all()
    assert one.sum() < four.sum()  # the class of the second largest logit need not be the nearest
    once, thrice = broken(steps=1), broken(steps=1, restarts=3)
    assert (once <= thrice).all()
    if norm == "L2":  # in L-infinity the first step goes to the same corner from everywhere
        assert once.sum() < thrice.sum()


def test_linear_models_fall_just_beyond_their_margin():
    model = Linear(5, 16).requires_grad_(False)
    images = pictures(20)
    labels = model(images).argmax(1)
    for norm in ("Linf", "L2"):
        margins = model.margins(images, labels, norm)
        for i in range(0, 20, 5):
            threat = threat_of(norm, str(round(1.002 * float(margins[i]), 9)))
            one = slice(i, i + 1)
            found = apgd(model, images[one], labels[one], threat=threat, random=stream(1), loss="margin", targets=4)
            assert model(found).argmax(1) != labels[i]


def test_classes_aimed_at_follow_the_clean_logits():
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0], [0.0, 9.0, 8.0, 7.0, 1.0]])
    labels = torch.tensor([0, 2])
    aims = classes_aimed_at(logits, labels, count=9, criterion=TOP_1)
    assert aims.squeeze(2).tolist() == [[2, 3, 4, 1], [1, 3, 4, 0]]
    assert classes_aimed_at(logits, labels, count=2, criterion=TOP_1).squeeze(2).tolist() == [[2, 3], [1, 3]]
    beyond = classes_aimed_at(logits, labels, count=2, criterion=Criterion(3))
    assert beyond.tolist() == [[[2, 3, 4], [2, 3, 1]], [[1, 3, 4], [1, 3, 0]]]
    assert classes_aimed_at(logits, labels, count=9, criterion=Criterion(5)).shape[1] == 0


@pytest.mark.parametrize(("classes", "top_k", "runs"), [(4, 1, 3), (10, 1, 9), (12, 1, 9), (10, 3, 7), (4, 4, 0)])
def test_fewer_targets_than_asked_for_are_remarked_on(classes, top_k, runs):
    model = Target(Linear(classes, 16).requires_grad_(False), Ledger.of(3))
    images, threat = pictures(3), threat_of("Linf", "0.00001")
    apgd(
        model,
        images,
        model(images).argmax(1),
        threat=threat,
        random=stream(3),
        criterion=Criterion(top_k),
        loss="margin",
        targets=9,
        steps=2,
    )
    expected = {f"{runs} targets instead of 9: there are no more classes to aim at"} if runs < 9 else set()
    assert model.ledger.notes == expected


def test_towards_several_classes_the_one_furthest_behind_counts():
    goal = targeted("margin", Criterion(2), nn.Identity())
    logits, labels = torch.tensor([[3.0, 1.0, 5.0, 2.0]]), torch.tensor([0])
    assert goal(logits, labels, torch.tensor([[2, 3]])).tolist() == [-1.0]
    expected = torch.log_softmax(logits, 1)[:, 1]
    assert torch.equal(targeted("ce", TOP_1, nn.Identity())(logits, labels, torch.tensor([[1]])), expected)


def test_targeted_ratio_is_equation_7_and_the_margin_where_that_has_no_form():
    logits, labels, aims = numbers(6, 7), torch.arange(6), torch.full((6, 1), 6)
    z = logits.sort(dim=1, descending=True).values
    row = torch.arange(6)
    expected = -(logits[row, labels] - logits[:, 6]) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2)
    assert torch.allclose(targeted("dlr", TOP_1, nn.Identity())(logits, labels, aims), expected)
    assert torch.isfinite(targeted("dlr", TOP_1, nn.Identity())(torch.ones(2, 4), labels[:2], aims[:2] * 0)).all()

    model = Target(Linear(3, 16).requires_grad_(False), Ledger.of(4))
    few = logits[:4, :3]
    assert torch.equal(
        targeted("dlr", TOP_1, model)(few, labels[:4] % 3, aims[:4] * 0), few[:, 0] - few[row[:4], row[:4] % 3]
    )
    assert any("targeted DLR" in note for note in model.ledger.notes)


def test_two_and_three_classes_fall_to_the_targeted_attack():
    for classes in (2, 3, 4):
        model = Linear(classes, 16).requires_grad_(False)
        images = pictures(8)
        labels = model(images).argmax(1)
        threat = threat_of("Linf", "0.3")
        assert (model.margins(images, labels, "Linf") < 0.29).all()
        found = apgd(model, images, labels, threat=threat, random=stream(8), loss="dlr", targets=9)
        assert (model(found).argmax(1) != labels).all()


class Wavering(nn.Module):
    """A linear model whose answers alternate between too much and too little of one direction."""

    def __init__(self):
        super().__init__()
        self.inner, self.noise, self.calls = Linear(2, 16).requires_grad_(False), numbers(2, 16, seed=9), 0

    def forward(self, images):
        self.calls += 1
        return self.inner(images) + (-1) ** self.calls * images.flatten(1) @ self.noise.T


def test_answers_of_a_randomised_model_are_averaged():
    images, threat = pictures(6), threat_of("L2", "0.2")
    model = Wavering()
    labels = model.inner(images).argmax(1)
    expected = apgd(model.inner, images, labels, threat=threat, random=stream(6), loss="margin", steps=8)
    found = apgd(model, images, labels, threat=threat, random=stream(6), loss="margin", steps=8, eot_copies=4)
    assert torch.allclose(found, expected, atol=1e-9)
    alone = apgd(model, images, labels, threat=threat, random=stream(6), loss="margin", steps=8)
    assert not torch.allclose(alone, expected, atol=1e-3)


def test_plain_modules_and_targets_get_the_same_answer():
    model, images = small_net(), pictures(6)
    labels, threat = torch.arange(6) % 5, threat_of("L2", "0.1")
    plain = apgd(model, images, labels, threat=threat, random=stream(6), steps=5, targets=3, loss="dlr")
    target = Target(model, Ledger.of(6))
    assert torch.equal(
        plain, apgd(target, images, labels, threat=threat, random=stream(6), steps=5, targets=3, loss="dlr")
    )
    assert (distance(plain - images, "L2") <= threat.radius + 1e-9).all()


def test_untargeted_ratio_is_a_choice():
    model, images = small_net(), pictures(6)
    labels, threat = model(images).argmax(1), threat_of("Linf", "0.001")
    answers = {
        loss: apgd(model, images, labels, threat=threat, random=stream(6), steps=5, loss=loss)
        for loss in ("ce", "margin", "dlr")
    }
    assert (difference_of_logits_ratio(model(answers["dlr"]), labels) >= -1).all()
    assert not torch.equal(answers["ce"], answers["dlr"])
    assert not torch.equal(answers["margin"], answers["dlr"])


def test_accelerators_look_at_intervals_and_get_the_same_answer(monkeypatch):
    """Those that fell in between keep the iterate at which they fell."""
    model, images, labels = small_net(), pictures(12), torch.arange(12) % 5
    supplied = {"threat": threat_of("Linf", "0.02"), "random": stream(12), "steps": 20}
    expected = apgd(model, images, labels, **supplied)
    monkeypatch.setattr("robench.attacks._compaction.steps_between_looks", lambda device: 7)
    assert torch.equal(apgd(model, images, labels, **supplied), expected)

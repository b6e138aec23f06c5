"""PGD behind noisy copies: the averaged gradient, the vote, the loop of SmoothAdv, and what copies cost."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench.attacks import _noisy_copies as module
from robench.attacks._noisy_copies import NoisyCopies, or_normal
from robench.attacks.smoothed_pgd import smoothed_pgd, within
from robench.evaluation.verification import find_violation
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from robench.voting import majority
from tests.models import Linear, SmallNet, pictures

L2 = ThreatModel(norm="L2", epsilon="0.3")


def problem(count=8):
    model = SmallNet().eval().requires_grad_(False).double()
    images = pictures(count)
    return model, images, model(images).argmax(1), RandomStream(5, torch.arange(count))


def noisy_copies(model, images, random, **changes):
    usual = {"copies": 7, "sigma": 0.2, "average": "log_mean_prob", "resample": False, "criterion": TOP_1}
    return NoisyCopies.of(model, images, random=random, **(usual | changes))


def noises(random, images, sigma, copies):
    return [sigma * random.at("noise", "copy", copy).normal(images) for copy in range(copies)]


@pytest.mark.parametrize("average", ["log_mean_prob", "mean_loss"])
@pytest.mark.parametrize("call_size", [8, 16, 24, 100])
def test_gradient_is_that_of_the_averaged_loss(average, call_size):
    model, images, labels, random = problem()
    noisy = dataclasses.replace(noisy_copies(model, images, random, average=average), call_size=call_size)
    gradient = noisy.look(images, labels, step=0).gradient
    point = images.clone().requires_grad_()
    if average == "log_mean_prob":
        probability = sum(
            F.softmax(model(point + eta), dim=1)[range(8), labels] for eta in noises(random, images, 0.2, 7)
        )
        loss = -torch.log(probability / 7)
    else:
        loss = sum(
            F.cross_entropy(model(point + eta), labels, reduction="none") for eta in noises(random, images, 0.2, 7)
        )
        loss = loss / 7
    (expected,) = torch.autograd.grad(loss.sum(), point)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_the_two_averages_differ_where_copies_disagree():
    model, images, labels, random = problem()
    one, other = (
        noisy_copies(model, images, random, average=average).look(images, labels, step=0).gradient
        for average in ("log_mean_prob", "mean_loss")
    )
    assert not torch.allclose(one, other, rtol=0.05)


def test_gradient_survives_probabilities_that_float32_cannot_hold():
    linear = Linear(3, 16).requires_grad_(False)
    images, random = pictures(5), RandomStream(0, torch.arange(5))

    def model(points):
        return 5000 * linear(points)

    labels = linear(images).argmin(1)  # the label's probability is e^-1000 and less
    exact = noisy_copies(model, images, random, sigma=0.01).look(images, labels, step=0).gradient
    rough = noisy_copies(model, images.float(), random, sigma=0.01).look(images.float(), labels, step=0).gradient
    assert torch.isfinite(rough).all()
    assert (distance(rough, "Linf") > 0).all()
    assert torch.allclose(rough.double(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("top_k", [1, 2])
def test_majority_of_the_copies_predicts(top_k):
    model, images, labels, random = problem(60)
    noisy = noisy_copies(model, images, random, sigma=0.6, copies=9, criterion=Criterion(top_k))
    broken = noisy.look(images, labels, step=0).majority
    chosen = torch.stack([model(images + eta).argmax(1) for eta in noises(random, images, 0.6, 9)])
    counts = F.one_hot(chosen, 5).sum(0)
    own = counts.gather(1, labels[:, None])
    ahead, level = (counts > own).sum(1), (counts == own).sum(1) - 1
    assert broken[ahead >= top_k].all()
    assert not broken[ahead + level < top_k].any()
    assert 0 < int((ahead >= top_k).sum()) < 60


def test_agreement_is_counted_over_the_copies():
    model, images, labels, random = problem(60)
    seen = noisy_copies(model, images, random, sigma=0.5, copies=16).look(images, labels, step=0)
    wrong = sum((model(images + eta).argmax(1) != labels).int() for eta in noises(random, images, 0.5, 16))
    assert torch.equal(seen.unanimous, wrong == 16)
    assert torch.equal(seen.sure, seen.majority & (wrong >= 12))  # 12 - 4 = 2 sqrt(16)
    assert int(seen.unanimous.sum()) < int(seen.sure.sum()) < int(seen.majority.sum())
    one = noisy_copies(model, images, random, sigma=0.5, copies=1).look(images, labels, step=0)
    assert one.majority.any()
    assert torch.equal(one.majority, one.sure)
    assert torch.equal(one.majority, one.unanimous)


def test_stopping_at_a_bare_majority_is_weaker_against_other_noise():
    model, images, labels, random = problem(80)
    stands = {}
    for stop in ("majority", "unanimous", "never"):
        found = smoothed_pgd(model, images, labels, threat=L2, random=random, steps=10, copies=9, sigma=0.2, stop=stop)
        votes = majority(model, found, sigma=0.2, votes=101, random=random.at("judge"), num_classes=5, chunk=4000)
        stands[stop] = int((votes.counts.argmax(1) == labels).sum())
    assert stands["majority"] > stands["unanimous"] + 5
    assert stands["unanimous"] <= stands["never"] + 2


def test_noise_stays_or_is_drawn_anew():
    model, images, labels, random = problem()
    fixed, anew = (noisy_copies(model, images, random, resample=resample) for resample in (False, True))
    assert torch.equal(fixed.look(images, labels, step=0).gradient, fixed.look(images, labels, step=1).gradient)
    assert not torch.equal(anew.look(images, labels, step=0).gradient, anew.look(images, labels, step=1).gradient)


def test_noise_that_is_not_kept_is_the_same(monkeypatch):
    model, images, labels, random = problem()
    run = functools.partial(smoothed_pgd, model, images, labels, threat=L2, random=random, copies=5, sigma=0.1)
    kept = run()
    monkeypatch.setattr(module, "_KEPT_BYTES", 2 * images.numel() * 8)  # two of five
    some = run()
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    assert torch.equal(kept, some)
    assert torch.equal(kept, run())


def test_loop_is_that_of_smoothadv():
    """One image at a time: step 2 eps / T along the unit gradient, clamp, renormalise, stop at a wrong majority."""
    model, images, labels, random = problem(12)
    found = smoothed_pgd(
        model, images, labels, threat=L2, random=random, steps=10, copies=5, sigma=0.15, stop="majority"
    )
    stopped = 0
    for row in range(12):
        image, label, own = images[row : row + 1], labels[row : row + 1], random[torch.tensor([row])]
        eta = torch.cat(noises(own, image, 0.15, 5))
        delta = torch.zeros_like(image)
        for _ in range(10):
            point = (image + delta).requires_grad_()
            logits = model(point + eta)
            votes = logits.argmax(1).bincount(minlength=5) + 0.5 * F.softmax(logits, 1).mean(0)  # ties by probability
            if int(votes.argmax()) != int(label):
                stopped += 1
                break
            loss = -torch.log(F.softmax(logits, 1)[:, label].mean())
            (gradient,) = torch.autograd.grad(loss, point)
            delta = delta + 0.06 * gradient / gradient.norm()
            delta = (image + delta).clamp(0, 1) - image
            delta = delta * min(1.0, 0.3 / float(delta.norm()))
        assert torch.allclose(found[row], (image + delta)[0], atol=1e-9)
    assert 0 < stopped < 12


def test_clamps_first_and_shortens_then():
    image = torch.tensor([[[[0.9, 0.5]]]], dtype=torch.float64)
    moved = image + torch.tensor([0.4, 0.2], dtype=torch.float64)
    threat = ThreatModel(norm="L2", epsilon="0.2")
    expected = torch.tensor([0.1, 0.2], dtype=torch.float64)
    expected = expected / expected.norm() * 0.2
    assert torch.allclose(within(moved, image, threat), image + expected)
    assert torch.equal(within(image, image, threat), image)


def test_breaks_what_the_smoothed_classifier_says():
    """A linear model's majority under much noise is the linear model; beyond the margin it must fall to fresh noise."""
    model = Linear(2, 16).requires_grad_(False)
    images = pictures(30)
    labels = model(images).argmax(1)
    margins = model.margins(images, labels, "L2")
    random = RandomStream(0, torch.arange(30))
    threat = ThreatModel(norm="L2", epsilon="0.43")
    found = smoothed_pgd(model, images, labels, threat=threat, random=random, copies=25, sigma=0.05, stop="never")
    votes = majority(
        model, found, sigma=0.05, votes=201, random=random.at("judge"), num_classes=2, chunk=2000
    ).counts.argmax(1)
    near, far = margins < 0.39, margins > 0.47
    assert near.any()
    assert far.any()
    assert (votes != labels)[near].all()
    assert (votes == labels)[far].all()


def test_a_vanishing_gradient_gives_way_to_a_normal_vector():
    model = Linear(3, 16).requires_grad_(False)
    model.weight.data.zero_()
    images, random = pictures(3), RandomStream(0, torch.arange(3))
    labels = model(images).argmax(1)
    found = smoothed_pgd(model, images, labels, threat=L2, random=random)
    assert (distance(found - images, "L2") > 0.01).all()
    gradient = torch.zeros(2, 1, 2, 2)
    gradient[1] = 3.0
    mixed = or_normal(gradient, random[torch.arange(2)])
    assert torch.equal(mixed[1], gradient[1])
    assert (mixed[0] != 0).all()


def test_random_models_are_averaged_over_their_own_randomness():
    """With dropout on and no noise, several copies see several networks."""

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = Linear(4, 16).requires_grad_(False), 0

        def forward(self, points):
            masks = []
            for _ in range(len(points) // 6):
                self.calls += 1
                own = RandomStream(self.calls, torch.arange(6)).uniform(points[:6])
                masks.append((own > 0.5) * 2.0)
            return self.linear(points * torch.cat(masks))

    images, random = pictures(6), RandomStream(0, torch.arange(6))
    model = Random()
    labels = model.linear(images).argmax(1)
    gradient = (
        noisy_copies(model, images, random, copies=40, sigma=0.0, average="mean_loss")
        .look(images, labels, step=0)
        .gradient
    )
    assert model.calls == 40
    single = noisy_copies(Random(), images, random, copies=1, sigma=0.0).look(images, labels, step=0).gradient
    plain = noisy_copies(model.linear, images, random, copies=1, sigma=0.0).look(images, labels, step=0).gradient
    cosine = [F.cosine_similarity(g.flatten(1), plain.flatten(1)).mean() for g in (gradient, single)]
    assert cosine[0] > cosine[1] + 0.1


@pytest.mark.parametrize("stop", ["unanimous", "majority", "never"])
def test_calls_are_no_larger_than_the_batch_and_every_pass_is_charged(stop):
    model, images, labels, random = problem(12)
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    ledger = Ledger.of(12)
    smoothed_pgd(
        Target(model, ledger),
        images,
        labels,
        threat=L2,
        random=random,
        steps=6,
        copies=5,
        sigma=0.15,
        stop=stop,
    )
    assert max(sizes) == 12
    assert ledger.unattributed == (0, 0)
    assert int(ledger.forward_passes.sum()) == sum(sizes)
    assert torch.equal(ledger.forward_passes, ledger.backward_passes)
    assert (ledger.forward_passes % 5 == 0).all()
    assert int(ledger.forward_passes.max()) == 30
    assert bool((ledger.forward_passes < 30).any()) == (stop != "never")


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("start", ["image", "random"])
def test_stays_in_ball_and_box_and_belongs_to_the_example(norm, start):
    model, images, labels, random = problem(9)
    images = (3 * (images - 0.5) + 0.5).clamp(0, 1)
    labels = model(images).argmax(1)
    threat = ThreatModel(norm=norm, epsilon="0.2")
    run = functools.partial(smoothed_pgd, model, threat=threat, start=start, steps=5, copies=3, sigma=0.1)
    whole = run(images, labels, random=random)
    assert find_violation(whole, images, threat) is None
    rows = torch.tensor([7, 2, 5])
    assert torch.allclose(run(images[rows], labels[rows], random=random[rows]), whole[rows], atol=1e-10)

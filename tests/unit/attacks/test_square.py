"""Square Attack against its algorithms written down example by example, and what it promises about queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robench.attacks.square import Draws, Signs, Windows, eta, shares, square
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, numbers, pictures


def threat_of(norm, epsilon):
    return ThreatModel(norm=norm, epsilon=epsilon)


def small_net():
    return SmallNet(channels=2, side=6).eval().double().requires_grad_(False)


def images_of(count):
    """Return images whose box binds."""
    return 5 * (pictures(count, (2, 6, 6)) - 0.4)


def stream(count):
    return RandomStream(5, torch.arange(count))


def margin_of(model, point, label):
    logits = model(point[None])[0]
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return float(others.max() - logits[label])


def search_plainly(model, label, point, propose, queries):
    """Return the end of Algorithm 1 for one example, and how many of its points differ from the best before them."""
    best, best_margin, different = point, margin_of(model, point, label), 1
    for query in range(queries):
        if best_margin > 0:
            break
        candidate = propose(query, best)
        different += not torch.allclose(candidate, best, atol=1e-12)
        found = margin_of(model, candidate, label)
        if found > best_margin:
            best, best_margin = candidate, found
    return best, different


def squares_of(draws, example, query):
    """Return side, and (top, left) of each square."""
    corners = [
        (int(draws.top[example, query, k]), int(draws.left[example, query, k])) for k in range(draws.top.shape[2])
    ]
    return draws.sizes[query], corners


def algorithm_2(draws, example, image, epsilon):
    """Return what proposes candidates in L-infinity: clip(best + delta) with delta = +-2 epsilon in a square."""

    def propose(query, best):
        side, [(top, left)] = squares_of(draws, example, query)
        delta = torch.zeros_like(image)
        for channel in range(len(image)):
            rho = 2 * epsilon if draws.coins[example, query, channel] else -2 * epsilon
            delta[channel, top : top + side, left : left + side] = rho
        return torch.minimum(torch.maximum(best + delta, image - epsilon), image + epsilon).clamp(0, 1)

    return propose


def algorithm_3(draws, example, image, epsilon):
    """Return what proposes candidates in L2, with equation (2)'s pattern from its formula."""

    def propose(query, best):
        side, [(top, left), (other_top, other_left)] = squares_of(draws, example, query)
        nu = best - image
        here = torch.zeros(image.shape[1:], dtype=torch.bool)
        here[top : top + side, left : left + side] = True
        there = torch.zeros_like(here)
        there[other_top : other_top + side, other_left : other_left + side] = True
        unused = epsilon**2 - float(nu.square().sum())
        pattern = pattern_by_formula(side)
        if not draws.coins[example, query, 0]:
            pattern = pattern.T
        new = nu.clone()
        for channel in range(len(image)):
            rho = 1 if draws.coins[example, query, 1 + channel] else -1
            window = nu[channel][here].view(side, side)
            mixed = rho * pattern + (window / window.norm() if window.norm() > 0 else 0)
            available = math.sqrt(float(nu[channel][here | there].square().sum()) + max(unused, 0) / len(image))
            new[channel][there] = 0
            new[channel][here] = (mixed / mixed.norm() * available).flatten()
        offset = new * min(1.0, epsilon / float(new.norm()))
        return (image + offset).clamp(0, 1)

    return propose


def pattern_by_formula(side):
    """Equation (2): eta^(h, k) beside -eta^(h, h - k) with k = floor(h / 2), of length 1; indices count from 1."""

    def value(first, second, r, s):
        n = first // 2
        reach = n - max(abs(r - first // 2 - 1), abs(s - second // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(reach + 1))

    k = side // 2
    columns = [[value(side, k, r, s) for s in range(1, k + 1)] for r in range(1, side + 1)]
    others = [[-value(side, side - k, r, s) for s in range(1, side - k + 1)] for r in range(1, side + 1)]
    pattern = torch.tensor([a + b for a, b in zip(columns, others, strict=True)], dtype=torch.float64).T
    return pattern / pattern.norm()


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 13])
def test_pattern_is_equation_2(side):
    assert torch.allclose(eta(side), pattern_by_formula(side), atol=1e-12)


CASES = [("Linf", "0.03", Signs, algorithm_2), ("L2", "0.4", Windows, algorithm_3)]


@pytest.mark.parametrize(("norm", "epsilon", "kind", "algorithm"), CASES, ids=["Linf", "L2"])
def test_who_stands_ends_where_the_paper_ends(norm, epsilon, kind, algorithm):
    """Also: a square that changes nothing is not asked about, and that changes no answer."""
    queries = 120
    model, images, threat = small_net(), images_of(10), threat_of(norm, epsilon)
    labels, ledger = model(images).argmax(1), Ledger.of(10)
    found = square(Target(model, ledger), images, labels, threat=threat, random=stream(10), queries=queries)
    begun = kind.begin(images, threat, stream(10).at("restart", 0), shares(0.8, queries, 10_000))
    starts = begun.points().clone()
    stood = model(found).argmax(1) == labels
    assert 4 <= int(stood.sum()) < 10
    passes, known = ledger.forward_passes, 0
    for i in range(10):
        propose = algorithm(begun.draws, i, images[i], threat.radius)
        expected, different = search_plainly(model, int(labels[i]), starts[i], propose, queries)
        assert torch.allclose(found[i], expected, atol=1e-12)
        if norm == "Linf":
            assert different <= int(passes[i]) <= different + 1
            known += queries + 1 - different if stood[i] else 0
    if norm == "Linf":
        assert known > 0
    else:
        assert set(passes[stood].tolist()) == {queries + 1}
    assert int(ledger.backward_passes.sum()) == 0


def test_shares_are_halved_as_section_5_says():
    halved = shares(0.8, 10_000, 10_000)
    at = [0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999]
    assert [round(0.8 / halved[i]) for i in at] == [1, 1, 2, 2, 4, 8, 16, 32, 64, 128, 256, 512, 512]
    assert shares(0.8, 100, 100) == halved[::100]


def test_squares_are_uniform_over_all_places_and_belong_to_the_example():
    draws = Draws.of(stream(40), (5, 7), [3] * 600, squares=2, coins=35)
    for values, high in ((draws.top, 3), (draws.left, 5)):
        shares_of = torch.bincount(values.flatten().long(), minlength=high) / values.numel()
        assert len(shares_of) == high
        assert torch.allclose(shares_of, torch.full((high,), 1 / high), atol=0.01)
    assert torch.allclose(draws.coins.double().mean((0, 1)), torch.full((35,), 0.5, dtype=torch.float64), atol=0.02)
    together = draws.coins.flatten(0, 1).double().T.corrcoef() - torch.eye(35)
    assert together.abs().max() < 0.04
    one = Draws.of(stream(40)[torch.tensor([17])], (5, 7), [3] * 600, squares=2, coins=35)
    for name in ("top", "left", "coins"):
        assert torch.equal(getattr(one, name)[0], getattr(draws, name)[17])


def test_pixels_of_a_square_fill_the_room():
    draws = Draws(
        (4, 5),
        [3, 2],
        torch.tensor([3, 2]),
        torch.tensor([[[1], [2]]]),
        torch.tensor([[[2], [0]]]),
        torch.zeros(1, 2, 1),
    )
    pixels = draws.pixels(torch.tensor([0, 0]), torch.tensor([0, 1]), square=0, room=3)
    assert pixels[0].tolist() == [7, 8, 9, 12, 13, 14, 17, 18, 19]
    assert sorted(set(pixels[1].tolist())) == [10, 11, 15, 16]


def test_linear_models_fall_just_beyond_their_margin():
    model, images = Linear(3, 36).requires_grad_(False), pictures(20, (1, 6, 6))
    labels = model(images).argmax(1)
    margins = model.margins(images, labels, "Linf")
    for i in range(0, 20, 4):
        threat, one = threat_of("Linf", str(round(1.01 * float(margins[i]), 9))), slice(i, i + 1)
        found = square(model, images[one], labels[one], threat=threat, random=stream(1), queries=1500)
        assert model(found).argmax(1) != labels[i]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_images_of_any_shape_and_colours(norm):
    shape = (3, 4, 7)
    images = pictures(6, shape).float()
    weight = numbers(4, 84).float()
    threat = threat_of(norm, "0.2")
    logits = nn.Sequential(nn.Flatten(), nn.Linear(84, 4)).requires_grad_(False)
    logits[1].weight.copy_(weight)
    labels = logits(images).argmax(1)
    found = square(logits, images, labels, threat=threat, random=stream(6), queries=150)
    before, after = (TOP_1.margin(logits(x), labels) for x in (images, found))
    assert (after > before).all()
    assert (distance(found - images, norm) <= threat.radius * (1 + 1e-6)).all()
    assert found.min() >= 0
    assert found.max() <= 1
    changed = (found != images).flatten(2).any(2)
    assert changed.all(), "each channel has its own sign"


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_changes_nothing_is_not_kept(norm):
    """Of equal margins the first stays: a flat model leaves everybody at the start."""
    model, images = Linear(3, 72).requires_grad_(False), images_of(4)
    model.weight.zero_()
    labels, threat = model(images).argmax(1), threat_of(norm, "0.3")
    found = square(model, images, labels, threat=threat, random=stream(4), queries=30)
    begin = Signs.begin if norm == "Linf" else Windows.begin
    start = begin(images, threat, stream(4).at("restart", 0), shares(0.8, 30, 10_000)).points()
    assert torch.equal(found, start)


class NoGradients(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.inner(images)


def test_sees_logits_alone():
    model, images = NoGradients(small_net()), images_of(3)
    square(
        model, images, torch.zeros(3, dtype=torch.int64), threat=threat_of("Linf", "0.1"), random=stream(3), queries=5
    )


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_further_queries_and_restarts_never_help_the_defender(norm):
    model, images = small_net(), images_of(40)
    labels, threat = model(images).argmax(1), threat_of(norm, "0.03" if norm == "Linf" else "0.2")

    def broken(**more):
        found = square(model, images, labels, threat=threat, random=stream(40), **more)
        return model(found).argmax(1) != labels

    few, many, twice = broken(queries=10), broken(queries=100), broken(queries=10, restarts=3)
    assert (few <= many).all()
    assert (few <= twice).all()
    assert few.sum() < min(many.sum(), twice.sum())


def test_top_2_keeps_going_until_the_label_is_third():
    model, images = small_net(), images_of(20)
    labels, second = model(images).argmax(1), Criterion(2)
    first_only, both = (
        square(
            model, images, labels, threat=threat_of("Linf", "0.1"), random=stream(20), criterion=criterion, queries=200
        )
        for criterion in (TOP_1, second)
    )
    assert second.broken(model(both), labels).sum() > second.broken(model(first_only), labels).sum()


@pytest.mark.parametrize("queries", [5, 60])
@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", "0.03"), ("L2", "0.4")])
def test_accelerators_look_at_intervals_and_get_the_same_answer(monkeypatch, norm, epsilon, queries):
    """Those that fell, or have no query left, stay as they are until somebody looks."""
    model, images = small_net(), images_of(12)
    labels = model(images).argmax(1)
    supplied = {"threat": threat_of(norm, epsilon), "random": stream(12), "queries": queries}
    expected = square(model, images, labels, **supplied)
    monkeypatch.setattr("robench.attacks.square._queries_between_compactions", lambda device: 50)
    assert torch.equal(square(model, images, labels, **supplied), expected)

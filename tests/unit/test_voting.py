"""Majority votes: their counts, their noise, their ties, and how much of them is luck."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from robench.losses import Criterion
from robench.random_streams import RandomStream
from robench.voting import Votes, decision_bits, majority, repeated_decisions, share_wrong
from tests.models import Linear, SmallNet, pictures


def problem(count=9):
    model = SmallNet().eval().requires_grad_(False).double()
    images = pictures(count)
    return model, images, model(images).argmax(1), RandomStream(4, torch.arange(count))


def vote(model, images, random, *, sigma=0.4, votes=13, chunk=20, num_classes=5):
    return majority(model, images, sigma=sigma, votes=votes, random=random, num_classes=num_classes, chunk=chunk)


def test_counts_are_those_of_single_passes():
    model, images, _, random = problem()
    cast = vote(model, images, random)
    expected = torch.zeros(9, 5, dtype=torch.int64)
    probabilities = torch.zeros(9, 5, dtype=torch.float64)
    for number in range(13):
        logits = model(images + 0.4 * random.at("vote", number).normal(images))
        expected[range(9), logits.argmax(1)] += 1
        probabilities += logits.softmax(1)
    assert torch.equal(cast.counts, expected)
    assert torch.allclose(cast.probabilities, probabilities)
    assert (cast.counts.sum(1) == 13).all()
    assert (cast.counts > 0).sum() > 12  # the noise makes votes differ


@pytest.mark.parametrize("chunk", [1, 4, 9, 10, 18, 1000])
def test_neither_chunk_nor_batch_changes_a_vote(chunk):
    model, images, _, random = problem()
    sizes = []
    whole = vote(model, images, random).counts
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert torch.equal(vote(model, images, random, chunk=chunk).counts, whole)
    assert max(sizes) <= chunk
    rows = torch.tensor([7, 2, 5])
    assert torch.equal(vote(model, images[rows], random[rows], chunk=chunk).counts, whole[rows])


def test_share_of_votes_is_the_probability_of_a_linear_model():
    """Of two linear classes with distance m to the boundary, noise sigma leaves a share Phi(m / sigma) of the votes."""
    model = Linear(2, 16).requires_grad_(False)
    images = pictures(20)
    labels = model(images).argmax(1)
    sigma, votes = 0.3, 1500
    cast = vote(model, images, RandomStream(0, torch.arange(20)), sigma=sigma, votes=votes, chunk=4000, num_classes=2)
    share = cast.counts.gather(1, labels[:, None]).squeeze(1) / votes
    expected = 0.5 * (1 + torch.erf(model.margins(images, labels, "L2") / sigma / math.sqrt(2)))
    assert (((share - expected) / (expected * (1 - expected) / votes).sqrt()).abs() < 4).all()


def test_a_deterministic_model_without_noise_is_unanimous():
    model, images, labels, random = problem()
    counts = vote(model, images, random, sigma=0.0).counts
    assert (counts.gather(1, labels[:, None]) == 13).all()


def test_of_equal_counts_the_likelier_class_comes_first():
    logits = torch.tensor([[[3.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]]])  # one vote for class 0, one for class 1
    cast = Votes.none(1, 3) + logits
    assert cast.counts.tolist() == [[1, 1, 0]]
    assert cast.ranking.argsort(1, descending=True).tolist() == [[0, 1, 2]]
    swapped = Votes.none(1, 3) + torch.tensor([[[1.0, 0.5, 0.9]], [[0.0, 5.0, 1.0]]])
    assert swapped.ranking.argsort(1, descending=True).tolist() == [[1, 0, 2]]


def test_more_votes_beat_any_probability():
    cast = Votes.none(1, 2) + torch.tensor([[[0.1, 0.0]], [[0.1, 0.0]], [[0.0, 50.0]]])
    assert cast.counts.tolist() == [[2, 1]]
    assert int(cast.ranking.argmax(1)) == 0


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_single_vote_is_the_plain_decision(top_k):
    model, images, labels, random = problem(40)
    criterion = Criterion(top_k)
    targets = (labels + torch.arange(40)) % 5
    cast = vote(model, images, random, sigma=0.0, votes=1)
    assert torch.equal(criterion.broken(cast.ranking, targets), criterion.broken(model(images), targets))


def test_not_a_number_is_no_vote():
    _, images, _, random = problem()

    def model(points):
        logits = points.flatten(1)[:, :5].clone()
        logits[-1, 2] = torch.nan
        return logits

    with pytest.raises(FloatingPointError, match="NaN"):
        vote(model, images, random)


def test_no_images_have_no_votes():
    model, _, _, random = problem()
    cast = vote(model, pictures(0), random[torch.arange(0)])
    assert cast.counts.shape == cast.ranking.shape == (0, 5)


def test_repeated_decisions_differ_by_luck_alone():
    model = Linear(2, 16).requires_grad_(False)
    images = pictures(30)
    labels = model(images).argmax(1)
    random = RandomStream(0, torch.arange(30))
    decide = functools.partial(
        lambda stream, votes: vote(model, images, stream, sigma=0.5, votes=votes, chunk=600, num_classes=2), votes=9
    )
    wrong = repeated_decisions(decide, labels, repeats=20, random=random, criterion=Criterion())
    assert wrong.shape == (30, 20)
    # The chance that at least 5 of 9 votes go wrong.
    single = 0.5 * (1 - torch.erf(model.margins(images, labels, "L2") / 0.5 / math.sqrt(2)))
    chance = sum(math.comb(9, k) * single**k * (1 - single) ** (9 - k) for k in range(5, 10))
    share = share_wrong(wrong)
    assert ((share - chance).abs() < 4 * (chance * (1 - chance) / 20).sqrt() + 0.05).all()
    assert ((share > 0) & (share < 1)).any()
    more = repeated_decisions(
        lambda stream: decide(stream, votes=81), labels, repeats=20, random=random, criterion=Criterion()
    )
    assert share_wrong(more).sum() < share.sum()


def test_bits_are_the_decisions():
    wrong = torch.tensor([[True, False, True], [False, False, False]])
    assert decision_bits(wrong).tolist() == [5, 0]
    assert decision_bits(torch.ones(1, 62, dtype=torch.bool)).tolist() == [2**62 - 1]
    with pytest.raises(ValueError, match="at most 62"):
        decision_bits(torch.ones(1, 63, dtype=torch.bool))

"""Philox by its published test vectors, and what follows from numbers belonging to examples."""

from __future__ import annotations

import math

import pytest
import torch

from robench.random_streams import RandomStream, philox4x32

# Random123 (Salmon et al., SC 2011), known-answer tests of philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def stream(count=8, seed=0):
    return RandomStream(seed, torch.arange(count))


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter, key, result):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == result


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_numbers_belong_to_the_example(draw):
    whole = getattr(stream(), draw)(torch.empty(8, 3, 5))
    rows = torch.tensor([6, 1, 3])
    assert torch.equal(getattr(stream()[rows], draw)(torch.empty(3, 3, 5)), whole[rows])
    mask = torch.arange(8) % 2 == 0
    assert torch.equal(getattr(stream()[mask], draw)(torch.empty(4, 3, 5)), whole[mask])


def test_seed_path_and_example_all_matter():
    like = torch.empty(1, 64)
    one = torch.zeros(1, dtype=torch.int64)
    drawn = [
        RandomStream(0, one).uniform(like),
        RandomStream(1, one).uniform(like),
        RandomStream(-1, one).uniform(like),
        RandomStream(0, one + 1).uniform(like),
        RandomStream(0, one + 2**33).uniform(like),
        RandomStream(0, one).at("restart", 0).uniform(like),
        RandomStream(0, one).at("restart", 1).uniform(like),
        RandomStream(0, one).at("restart").at(1, 1).uniform(like),
    ]
    for i, a in enumerate(drawn):
        for b in drawn[i + 1 :]:
            assert (a == b).float().mean() < 0.1
    assert torch.equal(RandomStream(0, one).at("restart", 1).uniform(like), drawn[6])


def test_float32_and_float64_agree():
    a, b = stream().uniform(torch.empty(8, 100)), stream().uniform(torch.empty(8, 100, dtype=torch.float64))
    assert torch.equal(a.double(), b)
    assert (a < 1).all()


def test_moments_and_independence():
    ids = torch.arange(400)
    u = RandomStream(3, ids).uniform(torch.empty(400, 500, dtype=torch.float64))
    n = RandomStream(3, ids).normal(torch.empty(400, 500, dtype=torch.float64))
    tolerance = 5 / math.sqrt(u.numel())
    assert abs(u.mean() - 0.5) < tolerance * math.sqrt(1 / 12)
    assert abs(n.mean()) < tolerance
    assert abs(n.var() - 1) < tolerance * math.sqrt(2)
    assert abs((n**4).mean() - 3) < tolerance * math.sqrt(96)
    # Neighbours within an example, and equal places of neighbouring examples, are uncorrelated.
    assert abs((n[:, 1:] * n[:, :-1]).mean()) < tolerance
    assert abs((n[1:] * n[:-1]).mean()) < tolerance


def test_integers_are_uniform_and_checked():
    drawn = torch.cat([stream(1000).at(i).integers(3) for i in range(9)])
    counts = torch.bincount(drawn, minlength=3).double()
    assert (abs(counts - 3000) < 5 * math.sqrt(2000)).all()
    with pytest.raises(ValueError, match="high=0"):
        stream().integers(0)


def test_global_generator_is_untouched_and_empty_batches_work():
    before = torch.random.get_rng_state()
    assert stream(0).normal(torch.empty(0, 3)).shape == (0, 3)
    stream().normal(torch.empty(8, 3))
    assert torch.equal(before, torch.random.get_rng_state())

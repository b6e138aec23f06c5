"""Long-range correlated noise: its covariance, its scale, and where it may end."""

from __future__ import annotations

import pytest
import torch

from robench.attacks import lrc_noise as module
from robench.attacks.lrc_noise import channel_covariance, long_range_noise, lrc_noise, pixel_covariance
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import Linear, SmallNet, pictures

THREAT = ThreatModel(norm="Linf", epsilon="0.3")
ZETAS = (1.0, 2.0, 4.0, 8.0, 16.0)


def expected_covariance(channels, height, width, zeta):
    """Return M kron E entry by entry, from the definition."""
    size = channels * height * width
    matrix = torch.empty(size, size, dtype=torch.float64)
    places = [(c, r, w) for c in range(channels) for r in range(height) for w in range(width)]
    for i, (c, r, w) in enumerate(places):
        for j, (other, row, column) in enumerate(places):
            reach = ((r - row) ** 2 + (w - column) ** 2) ** 0.5
            matrix[i, j] = (1.0 if c == other else 0.5) * torch.e ** (-reach / zeta)
    return matrix


@pytest.mark.parametrize("zeta", [1.0, 8.0])
def test_samples_have_the_stated_covariance(zeta):
    count, shape = 20_000, (3, 3, 4)
    noise = long_range_noise(
        torch.empty(count, *shape, dtype=torch.float64), zeta, RandomStream(0, torch.arange(count))
    ).flatten(1)
    empirical = noise.T @ noise / count
    # Entries of an empirical covariance of normal numbers have variance (s_ii s_jj + s_ij^2) / count <= 2 / count.
    assert float((empirical - expected_covariance(*shape, zeta)).abs().max()) < 5 * (2 / count) ** 0.5
    assert float(noise.mean(0).abs().max()) < 5 / count**0.5


def test_torus_has_exactly_the_covariance_of_the_image():
    """The field is a circulant filter of white noise; its kernel times itself must give exp(-distance / zeta)."""
    for zeta in ZETAS:
        gain = module._torus_gain(40, 36, zeta, torch.device("cpu"))
        covariance = torch.fft.ifft2(gain**2).real[:40, :36].flatten()
        assert torch.allclose(covariance, pixel_covariance(40, 36, zeta)[0], atol=1e-10)


def test_field_of_the_torus_has_the_stated_covariance(monkeypatch):
    monkeypatch.setattr(module, "_FACTORISED_PIXELS", 0)
    count, zeta = 60, 2.0
    noise = long_range_noise(
        torch.empty(count, 3, 32, 32, dtype=torch.float64), zeta, RandomStream(0, torch.arange(count))
    )
    for down, across in ((0, 0), (0, 1), (1, 0), (3, 2)):
        expected = torch.e ** (-((down**2 + across**2) ** 0.5) / zeta)
        here, there = noise[..., : 32 - down, : 32 - across], noise[..., down:, across:]
        assert float((here * there).mean()) == pytest.approx(expected, abs=0.04)
        assert float((here[:, 0] * there[:, 2]).mean()) == pytest.approx(0.5 * expected, abs=0.04)


def test_kronecker_product_of_channels_and_pixels():
    product = torch.kron(channel_covariance(3), pixel_covariance(3, 4, 2.0))
    assert torch.allclose(product, expected_covariance(3, 3, 4, 2.0), atol=1e-15)


@pytest.mark.parametrize("side", [28, 32])
def test_exact_distances_give_a_positive_definite_matrix(side):
    for zeta in ZETAS:
        assert float(torch.linalg.eigvalsh(pixel_covariance(side, side, zeta))[0]) > 0.025


def test_rounded_distances_would_not():
    """The smallest eigenvalues at 32 x 32 with distances rounded to whole pixels."""
    distances = -pixel_covariance(32, 32, 1.0).log()
    for zeta, smallest in zip(ZETAS, (-0.01, -0.27, -0.57, -0.73, -0.59), strict=True):
        rounded = torch.exp(-distances.round() / zeta)
        assert float(torch.linalg.eigvalsh(rounded)[0]) == pytest.approx(smallest, abs=0.006)


def test_too_long_a_decay_for_the_torus_is_an_error():
    with pytest.raises(ValueError, match=r"decay_length=1000000.* 7 x 7"):
        module._torus_gain(7, 7, 1e6, torch.device("cpu"))


def run(model, images, labels, *, threat=THREAT, **changes):
    random = RandomStream(2, torch.arange(len(images)))
    return lrc_noise(model, images, labels, threat=threat, random=random, **changes)


def nothing_breaks():
    model = Linear(2, 768).requires_grad_(False)
    model.weight.data.zero_()
    return model


def test_epsilon_is_the_standard_deviation_in_the_unit_that_was_asked_for():
    images = torch.cat([pictures(100, (3, 16, 16)), 0.5 + 0.2 * (pictures(100, (3, 16, 16)) - 0.5)])
    labels = nothing_breaks()(images).argmax(1)
    for unit in ("pixel", "image_std"):
        noise = run(nothing_breaks(), images, labels, samples=1, eps_unit=unit, clip=False) - images
        scale = 0.3 if unit == "pixel" else 0.3 * images.flatten(1).std(1, correction=0)
        square = (noise.flatten(1) / torch.as_tensor(scale).reshape(-1, 1)).square().mean(1)
        assert float(square.mean()) == pytest.approx(1.0, abs=0.15)
    constant = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    assert torch.equal(run(nothing_breaks(), constant, labels[:2], eps_unit="image_std"), constant)


def test_clip_keeps_the_box_and_its_absence_does_not():
    images = pictures(20, (3, 16, 16))
    labels = nothing_breaks()(images).argmax(1)
    clipped, free = (run(nothing_breaks(), images, labels, samples=1, clip=clip) for clip in (True, False))
    assert torch.equal(clipped, free.clamp(0, 1))
    assert float(free.min()) < 0
    assert float((free - images).abs().max()) > THREAT.radius  # epsilon bounds nothing


def test_norm_of_the_threat_says_nothing():
    images = pictures(6)
    model = SmallNet().eval().requires_grad_(False).double()
    labels = model(images).argmax(1)
    answers = [run(model, images, labels, threat=ThreatModel(norm=n, epsilon="0.1")) for n in ("Linf", "L2")]
    assert torch.equal(*answers)


def test_worst_of_more_samples_breaks_more():
    model = SmallNet().eval().requires_grad_(False).double()
    images = pictures(60)
    labels = model(images).argmax(1)
    threat = ThreatModel(norm="Linf", epsilon="0.1")
    broken = [model(run(model, images, labels, threat=threat, samples=s)).argmax(1) != labels for s in (1, 10, 100)]
    assert (broken[0] <= broken[1]).all()
    assert (broken[1] <= broken[2]).all()
    assert int(broken[0].sum()) < int(broken[2].sum())


@pytest.mark.parametrize("way", ["factorised", "torus"])
def test_answer_is_the_same_in_any_batch(way, monkeypatch):
    if way == "torus":
        monkeypatch.setattr(module, "_FACTORISED_PIXELS", 0)
    model = SmallNet(channels=3).eval().requires_grad_(False).double()
    images = pictures(9, (3, 4, 4))
    labels = model(images).argmax(1)
    random = RandomStream(0, torch.arange(9))
    threat = ThreatModel(norm="Linf", epsilon="0.05")
    whole = lrc_noise(model, images, labels, threat=threat, random=random, samples=12)
    rows = torch.tensor([7, 2, 5])
    part = lrc_noise(model, images[rows], labels[rows], threat=threat, random=random[rows], samples=12)
    assert torch.allclose(part, whole[rows], atol=1e-12)

"""DDN against its algorithm, written again line by line."""

from __future__ import annotations

import math

import pytest
import torch

from robench.attacks.ddn import ddn, rounded
from robench.errors import UserError
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from tests.models import SmallNet, pictures

L2 = ThreatModel(norm="L2", epsilon="1")


def attacked(model, images, labels, **parameters):
    random = RandomStream(0, torch.arange(len(images)))
    return ddn(model, images, labels, threat=L2, random=random, **parameters)


def transcription(net, image, label, *, steps, gamma, start_norm, levels):
    """Algorithm 1 of arXiv:1811.09600, one image at a time."""
    offset, norm, best = torch.zeros_like(image), start_norm, None
    farthest = torch.maximum(image, 1 - image).norm()
    for step in range(steps + 1):
        point = (image + offset).clamp(0, 1).requires_grad_()
        logits = net(point[None])
        broken = bool(logits.argmax(1) != label)
        reach = (point.detach() - image).norm()
        if broken and (best is None or reach < (best - image).norm()):
            best = point.detach()
        if step == steps:
            break
        loss = torch.nn.functional.cross_entropy(logits, label[None])
        (gradient,) = torch.autograd.grad(loss, point)
        size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        offset = point.detach() - image + size * gradient / gradient.norm()
        norm = min(norm * (1 - gamma if broken else 1 + gamma), float(farthest))
        offset = offset * norm / offset.norm()
        moved = (image + offset).clamp(0, 1)
        if levels:
            moved = (moved * (levels - 1)).round() / (levels - 1)
        offset = moved - image
    return image if best is None else best


@pytest.mark.parametrize("levels", [None, 256])
def test_walks_as_the_algorithm_says(levels):
    net = SmallNet().eval().requires_grad_(False).double()
    images = pictures(6)
    labels = net(images).argmax(1)
    settings = {"steps": 25, "gamma": 0.1, "start_norm": 0.3, "levels": levels}
    found = attacked(net, images, labels, final_search=0, **settings)
    expected = torch.stack([transcription(net, x, y, **settings) for x, y in zip(images, labels, strict=True)])
    assert (found != images).flatten(1).any(1).sum() >= 4
    assert torch.allclose(found, expected, atol=1e-9)


def test_the_final_search_only_shortens():
    net = SmallNet().eval().requires_grad_(False).double()
    images = pictures(16)
    labels = net(images).argmax(1)
    walked, searched = (attacked(net, images, labels, steps=20, final_search=n) for n in (0, 4))
    lengths = distance(walked - images, "L2"), distance(searched - images, "L2")
    assert (lengths[1] <= lengths[0]).all()
    assert (lengths[1] < lengths[0]).any()
    assert torch.equal(net(walked).argmax(1) != labels, net(searched).argmax(1) != labels)


def test_levels_hold_in_what_is_returned():
    net = SmallNet().eval().requires_grad_(False).double()
    images = rounded(pictures(8), 256)
    found = attacked(net, images, net(images).argmax(1), levels=256)
    assert torch.allclose(found * 255, (found * 255).round(), atol=1e-9)
    with pytest.raises(UserError, match="at least 2"):
        rounded(images, 1)

"""A small problem that the engine's tests share: 250 images, of which PGD breaks about half."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robench import catalog, planning
from robench.classifier import Classifier
from robench.datasets import ArrayImages, select_examples
from robench.losses import TOP_1
from robench.records import Configured, ModelIdentity
from robench.target import credit, narrowed
from robench.threat_model import ThreatModel
from tests.models import SmallNet, numbers

COUNT = 250


@pytest.fixture(scope="package")
def model():
    return Classifier(SmallNet().eval(), input_shape=(1, 4, 4), num_classes=5)


@pytest.fixture(scope="package")
def images(model):
    pixels = (numbers(COUNT, 1, 4, 4) * 60 + 128).clamp(0, 255).to(torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    labels[::10] = (labels[::10] + 1) % 5  # every tenth is wrong without an attack
    return ArrayImages(images=pixels.numpy(), labels=labels.numpy(), classes=tuple("abcde"), origin="test")


@pytest.fixture(scope="package")
def spec_of(images):
    def make(attack="pgd-10", threat="Linf@0.05", precision="fp64", seed=0):
        examples, ids = select_examples(images, dataset="digits", split="test", count=None)
        identity = ModelIdentity(id="m", weights_sha256="0" * 64, architecture=Configured(name="small"))
        request = planning.Request(identity, examples, [ThreatModel.parse(threat)], [attack], seed, precision)
        return planning.plan(request)[0], ids

    return make


def _nearest(model, images, labels, *, threat, random, criterion=TOP_1):
    """Walk along the gradient's sign in small steps; return the first broken point at whatever distance.

    Every second example gets its point a step later, by a member of that name. Nothing is found for every seventh.
    """
    leaf = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion.margin(model(leaf), labels).sum(), leaf)
    best, standing = images.detach().clone(), random.ids % 7 != 0
    for step in range(1, 41):
        with torch.no_grad():
            point = (images + 0.005 * step * gradient.sign()).clamp(0, 1)
            hit = criterion.broken(model(point), labels) & standing
        hit &= (random.ids % 2 == 0) | (step > 1)
        best[hit] = point[hit]
        credit(narrowed(model, hit), "even" if step % 2 == 0 else "odd")
        standing &= ~hit
    return best


class _Fake(catalog.Plugin):
    def load(self):
        return SimpleNamespace(attack=_nearest)


@pytest.fixture
def nearest(monkeypatch):
    """An attack of that name in the catalog that looks for the minimum norm."""
    facts = {"norms": ("Linf", "L2"), "minimum_norm": True, "version": 1}
    fake = _Fake("attacks", "nearest", "nearest", Path("nearest.py"), facts, {}, {}, frozenset({"criterion"}))
    find = catalog.find
    monkeypatch.setattr(
        catalog, "find", lambda kind, name: fake if (kind, name) == ("attacks", "nearest") else find(kind, name)
    )


def same(found, expected, name):
    """Tell whether two computations of one column agree.

    The step at which an example falls costs it a gradient only if others of its batch still stand.
    """
    if name == "backward_passes":
        return np.abs(found - expected).max() <= 1
    if expected.dtype.kind != "f":
        return np.array_equal(found, expected)
    return np.allclose(found, expected, rtol=1e-9, atol=1e-12)

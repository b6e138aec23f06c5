"""What every certificate of the catalog promises; a new file in robench/certification/ is tested by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robench import catalog
from robench.certification import NoisyModel
from robench.planning import guarantee_of, identify_certificate
from tests.models import SmallNet, pictures

CERTIFICATES = list(catalog.plugins("certificates").values())
each_certificate = pytest.mark.parametrize("plugin", CERTIFICATES, ids=lambda p: p.name)
SMALL = {"n": 300, "n0": 100, "samples": 100, "premise_samples": 100}


def parameters_of(plugin, **changes):
    small = {**{k: v for k, v in SMALL.items() if k in plugin.parameters}, **changes}
    if plugin.name.startswith("l-bound-"):
        small.pop("samples")
    if "sigma" in plugin.parameters:
        small["sigma"] = 0.1
    return plugin.settings(small)


def ask(plugin, ids, *, batch_size=150, model=None, **changes):
    images = pictures(8).float()[ids]
    labels = (torch.arange(8) % 5)[torch.from_numpy(ids)]
    asked = NoisyModel(model or SmallNet().eval(), ids, seed=3, num_classes=5, batch_size=batch_size)
    with torch.no_grad():
        found = plugin.load().certify(asked, images, labels, **parameters_of(plugin, **changes))
    return found, asked


@each_certificate
def test_answers_have_their_shapes_and_ranges(plugin):
    found, asked = ask(plugin, np.arange(8))
    assert found.prediction.shape == found.correct.shape == found.radius.shape == (8,)
    assert found.correct.dtype == np.bool_
    assert ((found.prediction >= -1) & (found.prediction < 5)).all()
    assert (found.radius >= 0).all()
    assert not found.correct[found.prediction < 0].any()
    assert (found.radius[found.prediction < 0] == 0).all()
    passes, _ = plugin.passes(parameters_of(plugin), classes=5)
    # The engine's own look at the plain image is in what is promised.
    assert 0 < asked.passes <= 8 * 2 * passes if plugin.entry == "effective-margin" else asked.passes <= 8 * passes


@each_certificate
def test_neither_the_batch_nor_the_batch_size_changes_an_answer(plugin):
    whole, asked = ask(plugin, np.arange(8))
    some = np.array([6, 1, 3])
    part, asked_part = ask(plugin, some, batch_size=37)
    assert np.array_equal(part.prediction, whole.prediction[some])
    assert np.allclose(part.radius, whole.radius[some], atol=1e-5)
    assert np.array_equal(asked_part.samples, asked.samples[some])
    if whole.hits is not None:
        assert np.array_equal(part.hits, whole.hits[some])


@each_certificate
def test_no_examples_and_one(plugin):
    assert ask(plugin, np.arange(0))[0].radius.shape == (0,)
    assert ask(plugin, np.arange(1))[0].radius.shape == (1,)


@each_certificate
def test_nothing_is_changed(plugin):
    model = SmallNet().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    ask(plugin, np.arange(4), model=model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@each_certificate
def test_says_what_is_guaranteed(plugin):
    entry = plugin.load()
    assert entry.name == plugin.entry
    assert entry.source
    assert entry.version >= 1
    text = guarantee_of(identify_certificate(plugin.name, sigma=0.25))
    assert "{" not in text


class Nowhere(torch.nn.Module):
    """Is fine on clean images and gives NaN a little way from them."""

    def forward(self, images):
        outside = ((images < 0.3) | (images > 0.7)).flatten(1).any(1)
        logits = torch.stack([images.flatten(1).sum(1)] * 5, 1)
        return torch.where(outside[:, None], torch.nan, logits)


@pytest.mark.parametrize("plugin", [p for p in CERTIFICATES if "sigma" in p.parameters], ids=lambda p: p.name)
def test_a_model_that_gives_nan_under_noise_is_an_error(plugin):
    with pytest.raises(FloatingPointError, match="NaN or infinity for a noisy image"):
        ask(plugin, np.arange(3), model=Nowhere())

"""What every architecture of the catalog promises; a new one is picked up by itself."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from robench.catalog import Plugin, plugins
from robench.errors import UserError

PLUGINS = plugins("architectures")
Case = tuple[Plugin, nn.Module, Tensor]
EACH = pytest.mark.parametrize("name", sorted(PLUGINS))


def published_shape(plugin: Plugin) -> tuple[int, int, int]:
    return plugin.facts.get("preset_shapes", {}).get(plugin.name, plugin.facts["input_shape"])


def build(plugin: Plugin, shape: tuple[int, int, int], num_classes: int = 10) -> nn.Module:
    return plugin.load().build(num_classes=num_classes, input_shape=shape, **plugin.settings())


def build_without_numbers(plugin: Plugin, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build(plugin, shape, num_classes)


@functools.cache
def cheap_shape(name: str) -> tuple[int, int, int]:
    """The smallest square images that the architecture takes: wide networks are slow on large ones."""
    channels, height, _ = published_shape(PLUGINS[name])
    for side in (8, 16, 32, 64, 128):
        try:
            build_without_numbers(PLUGINS[name], (channels, side, side), 2)
        except UserError:
            continue
        return channels, min(side, height), min(side, height)
    return published_shape(PLUGINS[name])


def stir(model: nn.Module, generator: torch.Generator) -> None:
    """Give what starts at a constant (zero layers, running statistics) values that matter."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
            noise = torch.empty_like(tensor).uniform_(-0.2, 0.2, generator=generator)
            with torch.no_grad():
                tensor.add_(noise)


@pytest.fixture(scope="module", params=sorted(PLUGINS))
def case(request: pytest.FixtureRequest) -> Case:
    """A plugin, its module in float64 and evaluation mode with stirred weights, and five images."""
    plugin = PLUGINS[request.param]
    shape = cheap_shape(request.param)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        model = build(plugin, shape).double().eval()
    stir(model, generator)
    return plugin, model, torch.empty(5, *shape, dtype=torch.float64).uniform_(generator=generator)


@EACH
def test_published_parameter_count(name: str) -> None:
    plugin = PLUGINS[name]
    model = build_without_numbers(plugin, published_shape(plugin), plugin.facts["num_classes"])
    counts = plugin.facts["parameter_counts"]
    assert name in counts, f"{plugin.path.name} states no parameter count for {name}"
    assert sum(p.numel() for p in model.parameters()) == counts[name]


@EACH
@pytest.mark.parametrize("num_classes", [2, 10])
def test_logits_have_one_row_per_image_and_one_column_per_class(name: str, num_classes: int) -> None:
    shape = published_shape(PLUGINS[name])
    model = build_without_numbers(PLUGINS[name], shape, num_classes).eval()
    for n in (1, 2):
        assert model(torch.empty(n, *shape, device="meta")).shape == (n, num_classes)


@EACH
def test_every_parameter_is_used(name: str) -> None:
    shape = cheap_shape(name)
    model = build_without_numbers(PLUGINS[name], shape, 10)
    assert model.training
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = model(torch.empty(4, *shape, device="meta")).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert [n for n, g in zip(names, gradients, strict=True) if g is None] == []


@EACH
def test_no_hooks_are_left_on_the_module(name: str) -> None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for part in build_without_numbers(PLUGINS[name], published_shape(PLUGINS[name]), 10).modules():
        assert not any(getattr(part, h) for h in hooks)


@EACH
@pytest.mark.parametrize("enabled", [True, False])
def test_building_leaves_the_gradient_mode_alone(name: str, enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        model = build_without_numbers(PLUGINS[name], published_shape(PLUGINS[name]), 10)
        assert torch.is_grad_enabled() is enabled
    assert all(p.requires_grad for p in model.parameters())


def test_no_images_give_no_logits(case: Case) -> None:
    _, model, images = case
    none = images[:0].requires_grad_()
    logits = model(none)
    assert logits.shape == (0, 10)
    (gradient,) = torch.autograd.grad(logits.sum(), none)
    assert gradient.shape == none.shape


def test_evaluation_is_deterministic(case: Case) -> None:
    _, model, images = case
    with torch.no_grad():
        assert torch.equal(model(images), model(images))


def test_an_image_gets_the_same_logits_alone_and_in_a_batch(case: Case) -> None:
    _, model, images = case
    before = images.clone()
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.equal(images, before), "the images were changed in place"
    assert together.std(dim=0).max() > 1e-6 * together.abs().max(), "the logits do not depend on the image"
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12 * together.abs().max().item())


def test_the_state_is_all_there_is(case: Case) -> None:
    plugin, model, images = case
    # What the state does not hold would stay without numbers, and the forward pass would fail.
    fresh = build_without_numbers(plugin, tuple(images.shape[1:]), 10).eval()
    fresh.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


def test_gradients_reach_the_images(case: Case) -> None:
    _, model, images = case
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()

"""Search copies compute what the classifier computes; blocks restore what they change; counters count."""

from __future__ import annotations

import copy
import ctypes
from ctypes import c_size_t, c_void_p
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from robench import classifier as module
from robench.classifier import (
    LOGIT_TOLERANCE,
    Classifier,
    fold_batch_norms,
    freed_bytes,
    frozen,
    give_back_buffers,
    keep_large_buffers,
    logit_gap,
    mode,
    random_images,
    search_copy,
    tensor_float32,
)
from robench.records import Normalization
from tests.models import SmallNet, numbers

SHAPE = (1, 4, 4)
#: Any change here invalidates every golden.json.
FIXED_BATCH = [0.49800312519073486, 0.4757933020591736, 0.4258003234863281, 0.18645548820495605]
NORMALIZATION = Normalization(mean=(0.25,), std=(0.5,))


def classifier(network: nn.Module | None = None) -> Classifier:
    return Classifier(
        (network or SmallNet()).float().eval(),
        input_shape=SHAPE,
        num_classes=5,
        normalization=NORMALIZATION,
    )


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]


class Branching(nn.Module):
    """Control flow on values, which tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) if images.sum() > 0 else self.network(-images)


class Shared(nn.Module):
    """One convolution that is used twice, once without the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.BatchNorm2d(1)
        self.classify = nn.Linear(16, 5)
        self.norm.running_mean.fill_(0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.norm(self.convolve(self.convolve(images))).flatten(1))


def test_normalization_is_in_front_of_the_network_and_not_in_its_state() -> None:
    model = classifier(nn.Flatten())
    assert torch.equal(model(torch.full((1, *SHAPE), 0.75)), torch.ones(1, 16))
    assert not model.state_dict()


def test_a_classifier_keeps_the_flags_of_the_network_it_wraps() -> None:
    network = SmallNet().train()
    network.features.eval()
    model = Classifier(network, input_shape=SHAPE, num_classes=5)
    assert model.training
    assert not network.features.training


def test_frozen_restores_each_parameters_own_flag_even_after_an_error() -> None:
    model = classifier()
    model.network.classify.bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), frozen(model):  # noqa: PT012
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


def test_mode_restores_each_submodules_own_flag_even_after_an_error() -> None:
    model = classifier()
    model.network.features[1].train()
    before = {name: m.training for name, m in model.named_modules()}
    for training in (True, False):
        with pytest.raises(KeyError), mode(model, training=training):  # noqa: PT012
            assert all(m.training == training for m in model.modules())
            raise KeyError
        assert {name: m.training for name, m in model.named_modules()} == before


def test_tensor_float32_is_set_and_restored() -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [f.allow_tf32 for f in flags]
    for allowed in (True, False):
        with tensor_float32(allowed=allowed):
            assert [f.allow_tf32 for f in flags] == [allowed, allowed]
        assert [f.allow_tf32 for f in flags] == before


@pytest.mark.parametrize("network", [SmallNet, Shared, Branching])
def test_a_search_copy_has_the_logits_and_input_gradients_of_the_classifier(network: type[nn.Module]) -> None:
    model = classifier(network())
    found = search_copy(model, precision="fp64", device="cpu")
    images = random_images(SHAPE, count=6).double()
    exact = copy.deepcopy(model).double()
    torch.testing.assert_close(found(images), exact(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(found, images), gradient(exact, images), rtol=1e-5, atol=1e-6)


def test_a_search_copy_folds_convolution_and_batch_norm() -> None:
    found = search_copy(classifier(), precision="fp32", device="cpu")
    assert found.unfolded is None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found.modules())


def test_linear_and_batch_norm_fold_too() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5))
    network[2].running_mean.fill_(0.7)
    model = classifier(network)
    found = search_copy(model, precision="fp32", device="cpu")
    assert not any(isinstance(m, nn.BatchNorm1d) for m in found.modules())
    images = random_images(SHAPE, count=3)
    torch.testing.assert_close(found(images), model(images))


def test_a_layer_that_is_used_twice_is_not_folded() -> None:
    found = search_copy(classifier(Shared()), precision="fp32", device="cpu")
    assert found.unfolded is None  # skipped, not tried and thrown away
    assert any(isinstance(m, nn.BatchNorm2d) for m in found.modules())


def test_what_cannot_be_traced_stays_unfolded_and_says_why() -> None:
    found = search_copy(classifier(Branching()), precision="fp32", device="cpu")
    assert found.unfolded is not None
    assert found.unfolded.startswith("tracing failed: TraceError")
    assert any(isinstance(m, nn.BatchNorm2d) for m in found.modules())


def test_a_fold_that_changes_the_logits_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        folded = fold_batch_norms(model)
        next(p for p in folded.parameters()).data.mul_(1.1)
        return folded

    monkeypatch.setattr(module, "fold_batch_norms", wrong)
    model = classifier()
    found = search_copy(model, precision="fp32", device="cpu")
    assert found.unfolded is not None
    assert "logits differ" in found.unfolded
    images = random_images(SHAPE, count=3)
    torch.testing.assert_close(found(images), model(images))


def test_a_search_copy_leaves_the_classifier_alone() -> None:
    model = classifier()
    model.network.features[1].train()
    model.network.classify.bias.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.dtype, p.stride()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    found = search_copy(model, precision="fp64", device="cpu")
    found(random_images(SHAPE, count=2).double())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [(p.requires_grad, p.dtype, p.stride()) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert not any(p.requires_grad for p in found.parameters())
    assert not any(m.training for m in found.modules())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in found.parameters()}


def test_bf16_search_returns_float32_logits_near_the_exact_ones() -> None:
    model = classifier()
    images = random_images(SHAPE, count=8)
    found = search_copy(model, precision="bf16", device="cpu")
    logits = found(images)
    assert logits.dtype == torch.float32
    gap = logit_gap(logits, model(images))
    assert LOGIT_TOLERANCE / 10 < gap < 0.05  # coarser than float32, and no worse than eight bits allow
    assert gradient(found, images).dtype == torch.float32


def test_the_fixed_batch_is_the_same_everywhere() -> None:
    images = random_images((1, 1, 2), count=2)
    assert torch.equal(images, random_images((1, 1, 2), count=4)[:2])
    assert images.flatten().tolist() == FIXED_BATCH


def test_logit_gap_is_relative_to_the_largest_logit_and_infinite_for_nan() -> None:
    expected = numbers(2, 3).float()
    assert logit_gap(expected * 1.5, expected) == pytest.approx(0.5)
    assert logit_gap(torch.full_like(expected, torch.nan), expected) == float("inf")


def test_the_allocator_is_asked_once_and_tells_whether_it_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_allocator", [])
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("", ""))
    assert keep_large_buffers() is False
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert keep_large_buffers() is False


def test_kept_buffers_are_not_mapped_apart() -> None:
    if not keep_large_buffers():
        pytest.skip("the allocator is not glibc's")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = c_void_p, [c_size_t], [c_void_p]
    address = libc.malloc(64 * 2**20)  # above the largest threshold that glibc chooses by itself
    # The second bit of the size in front of a chunk says that it is a mapping of its own.
    mapped = c_size_t.from_address(address - ctypes.sizeof(c_size_t)).value & 2
    libc.free(address)
    assert not mapped


@pytest.mark.parametrize(("kept", "trims"), [(100, 0), (600, 1)])
def test_freed_memory_is_handed_back_where_much_of_it_is_kept(
    kept: int, trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    library = SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(module, "_allocator", [True])
    monkeypatch.setattr(module, "freed_bytes", lambda: kept * 2**20)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: library)
    give_back_buffers()
    assert len(calls) == trims


def test_freed_memory_is_counted() -> None:
    if not keep_large_buffers() or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the allocator is not glibc's, or older than 2.33")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = c_void_p, [c_size_t], [c_void_p]
    addresses = [libc.malloc(64 * 2**20) for _ in range(2)]
    held = freed_bytes()
    libc.free(addresses[0])
    assert freed_bytes() - held == pytest.approx(64 * 2**20, rel=0.01)
    libc.free(addresses[1])

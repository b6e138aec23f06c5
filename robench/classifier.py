"""The contract `(N, C, H, W)` in [0, 1] -> `(N, K)` logits, and what makes a classifier fast to search.

Normalisation is a layer inside; nothing outside sees another range of pixels. An attack works on a *search
copy* (frozen, folded, possibly in another precision); the plain classifier decides whether it succeeded.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from robench.cpu_layers import cheapen
from robench.random_streams import RandomStream
from robench.records import Normalization, Precision

#: Two float32 computations of the same logits (folded or not, alone or in a batch, on another machine) differ
#: by less than this share of the largest logit: rounding is below 1e-4 of it, another model far above 1e-2.
LOGIT_TOLERANCE = 1e-3


class Normalize(nn.Module):
    """The layer `(images - mean) / std`, per channel."""

    standardizes = True
    """That its output is the images on another scale: a defense may differentiate by that."""
    mean: Tensor
    std: Tensor

    def __init__(self, normalization: Normalization) -> None:
        """Keep the values as buffers that move with the model; cards have them, weights files do not."""
        super().__init__()
        for name, values in (("mean", normalization.mean), ("std", normalization.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, C, H, W)` in [0, 1] to the range that the network was made for."""
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """A network with its normalisation: maps `(N, C, H, W)` images in [0, 1] to `(N, K)` logits."""

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        normalization: Normalization | None = None,
    ) -> None:
        """Wrap `network` as it is, flags included; `input_shape` is (channels, height, width)."""
        super().__init__()
        # In the order in which they run: the last module is the network's last layer.
        self.normalize = nn.Identity() if normalization is None else Normalize(normalization)
        self.network = network
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.normalization = normalization
        self.training = self.normalize.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, K)` logits of `(N, C, H, W)` images in [0, 1]."""
        logits: Tensor = self.network(self.normalize(images))
        return logits

    @property
    def device(self) -> torch.device:
        """Return where the first parameter or buffer is; the CPU for a network that has neither."""
        first = next(self.parameters(), next(self.buffers(), None))
        return torch.device("cpu") if first is None else first.device


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of `model` need gradients inside the block; restore each one's own flag after it."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put `model` in train or eval mode inside the block; restore every submodule's own flag after it."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def tensor_float32(*, allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 (10 bits of mantissa) in CUDA's float32 products inside the block.

    Put backward passes inside, too. Forbid it where a number is judged: PyTorch allows it in convolutions by
    default.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class SearchModel(nn.Module):
    """What an attack sees of a classifier: eval mode, frozen, in the search's precision and memory format."""

    def __init__(self, network: nn.Module, *, precision: Precision, unfolded: str | None) -> None:
        """Take over `network` (nobody else may hold it)."""
        super().__init__()
        self.precision = precision
        self.unfolded = unfolded
        """Why batch norms were not folded into the layers before them; None where they were or are none."""
        self.network = network.to(torch.float64 if precision == "fp64" else torch.float32)
        self.channels_last = any(isinstance(m, nn.Conv2d) for m in network.modules())
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, K)` logits: float64 in fp64, else float32; `images` get gradients in their own type."""
        images = images.to(torch.float64 if self.precision == "fp64" else torch.float32)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        half = self.precision == "bf16"
        with torch.autocast(images.device.type, dtype=torch.bfloat16) if half else nullcontext():
            logits: Tensor = self.network(images)
        return logits.float() if half else logits


def search_copy(
    model: Classifier, *, precision: Precision, device: torch.device | str, cheap_layers: bool = True
) -> SearchModel:
    """Return a copy of `model` for attacks: eval, frozen, folded, channels_last where it convolves.

    Batch norms are folded only where the folded copy's logits agree within `LOGIT_TOLERANCE`; `unfolded` of
    the result says why not. TF32 is a setting of the process, not of a model: search inside `tensor_float32`.
    On a CPU layers get the forms that are cheapest there, unless `cheap_layers` is False.
    """
    plain = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    images = random_images(model.input_shape, count=4).to(plain.device)
    network, unfolded = _folded_where_equal(plain, images)
    if cheap_layers and torch.device(device).type == "cpu" and precision != "bf16":
        network = _cheapened_where_equal(network, images, single_precision=precision != "fp64")
    return SearchModel(network, precision=precision, unfolded=unfolded).eval()


def _cheapened_where_equal(network: nn.Module, images: Tensor, *, single_precision: bool) -> nn.Module:
    """Return `network` with layers in the forms that are cheap on a CPU, or as it is where they change its answers."""
    cheap = copy.deepcopy(network)
    cheapen(cheap, single_precision=single_precision)
    return cheap if _gap(cheap, network, images) <= LOGIT_TOLERANCE else network


def _folded_where_equal(plain: Classifier, images: Tensor) -> tuple[nn.Module, str | None]:
    if not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in plain.modules()):
        return plain, None
    try:
        folded = fold_batch_norms(plain)
        gap = _gap(folded, plain, images)
    except Exception as error:  # noqa: BLE001 - tracing runs user code with stand-ins: any failure means "do not fold"
        return (
            plain,
            f"tracing failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
    return (folded, None) if gap <= LOGIT_TOLERANCE else (plain, f"folded logits differ by {gap:.1e} of the largest")


@torch.no_grad()
def _gap(changed: nn.Module, plain: nn.Module, images: Tensor) -> float:
    with tensor_float32(allowed=False):
        return logit_gap(changed(images), plain(images))


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return `model`, which is in eval mode, with each batch norm folded into the layer before it.

    Raises what :func:`torch.fx.symbolic_trace` raises for networks whose control flow depends on values.
    """
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    calls = [node.target for node in nodes]
    for norm in nodes:
        layer = norm.args[0] if norm.args else None
        # A layer that is used elsewhere too would carry the fold to places that have no batch norm.
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or len(layer.users) != 1:
            continue
        if calls.count(norm.target) != 1 or calls.count(layer.target) != 1:
            continue
        pair = modules[layer.target], modules[norm.target]
        # Exact types: parametrised or user-made subclasses may compute something else.
        if type(pair[0]) is nn.Conv2d and type(pair[1]) is nn.BatchNorm2d:
            fused: nn.Module = fuse_conv_bn_eval(*pair)
        elif type(pair[0]) is nn.Linear and type(pair[1]) is nn.BatchNorm1d:
            fused = fuse_linear_bn_eval(*pair)
        else:
            continue
        traced.set_submodule(str(layer.target), fused)
        norm.replace_all_uses_with(layer)
        traced.graph.erase_node(norm)
    traced.delete_all_unused_submodules()
    traced.recompile()
    # Fused weights are new parameters, which would collect gradients.
    return traced.eval().requires_grad_(False)


def random_images(shape: tuple[int, int, int], *, count: int) -> Tensor:
    """Return `(count, C, H, W)` float32 images, uniform in [0, 1), the same at every call everywhere."""
    return RandomStream(0, torch.arange(count), ("fixed batch",)).uniform(torch.empty(count, *shape))


def logit_gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected logit; infinite for NaN."""
    if not expected.numel():
        return 0.0
    gap = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
    return math.inf if math.isnan(gap) else gap


# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_allocator: list[bool] = []
#: Bytes of freed memory that are kept between shards.
_HELD_AT_MOST = 2**29


def keep_large_buffers() -> bool:
    """Make the C allocator of this process keep freed buffers below 1 GiB; return whether it does.

    glibc hands large buffers back to the kernel and faults them in again, page by page, at every step of an
    attack: a small CNN at batch 512 took 1120 us per image with its defaults and 570 with these. Does nothing
    and returns False where there is no glibc (musl, macOS, Windows); repeated calls do nothing.
    """
    if not _allocator:
        _allocator.append(platform.libc_ver()[0] == "glibc" and _raise_thresholds())
    return _allocator[0]


class _MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns: ten sizes, of which the ninth is that of the freed memory."""

    _fields_: ClassVar = [
        *((f"other{i}", ctypes.c_size_t) for i in range(8)),
        ("freed", ctypes.c_size_t),
        ("at_the_end", ctypes.c_size_t),
    ]


def give_back_buffers() -> None:
    """Hand the C allocator's freed memory back where it keeps more than 512 MiB of it.

    Batches that shrink as examples fall leave gaps that no later buffer fits in: kept for ever, they doubled the memory
    of an evaluation of 60,000 images. What is kept below that is faulted in once and not again for every shard.
    """
    if _allocator and _allocator[0] and freed_bytes() > _HELD_AT_MOST:
        ctypes.CDLL(None).malloc_trim(0)


def freed_bytes() -> int:
    """Return how much freed memory the C allocator holds; all of the process's before glibc 2.33, which cannot say."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    library.mallinfo2.restype = _MallocInfo
    return int(library.mallinfo2().freed)


def _raise_thresholds() -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Older releases refuse thresholds above 32 MiB; mapping nothing is as fast, at somewhat more memory.
    kept = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_MAX, 0)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))

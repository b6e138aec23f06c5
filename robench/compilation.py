"""The searched copy of a model through torch.compile: faster on some devices, and rounded a little differently.

The judge is never compiled, so no verdict depends on it. What the search finds may: another rounding turns the sign of
a gradient that is nearly zero. That is what another device, another release of torch or another batch does, too, within
one precision; so it stands in a record's provenance beside those, and is no part of the question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robench.classifier import LOGIT_TOLERANCE, SearchModel, logit_gap, random_images, tensor_float32
from robench.errors import UserError

#: Half-precision logits agree less closely.
_HALF_TOLERANCE = 0.05


class CompiledSearch(nn.Module):
    """A search model whose batches of two and more go through one compiled graph, whatever their size.

    Examples that are broken leave the batch, so its size changes at every step. It is marked as dynamic: one graph
    serves all sizes from 2 on (two where the library of convolutions has a kernel of its own for small ones). Batches
    of 0 and 1, which the compiler would make graphs of their own for, run as usual.
    """

    def __init__(self, search: SearchModel, *, backend: Any = "inductor") -> None:
        """Compile `search` when it is first called; they share their weights."""
        super().__init__()
        self.search = search
        self.training = search.training
        self._compiled = torch.compile(search.forward, backend=backend)

    def forward(self, images: Tensor) -> Tensor:
        """Return the `(N, K)` logits of `(N, C, H, W)` images."""
        if len(images) < 2:
            logits: Tensor = self.search(images)
            return logits
        torch._dynamo.maybe_mark_dynamic(images, 0)
        logits = self._compiled(images)
        return logits


def compiled(
    search: SearchModel, *, input_shape: tuple[int, int, int], device: torch.device, backend: Any = "inductor"
) -> CompiledSearch:
    """Return `search` compiled, and tried: raise UserError where it does not compile or gives other logits.

    The trial takes as long as compiling does, from seconds to minutes; it is kept in torch's cache on disk.
    """
    model = CompiledSearch(search, backend=backend)
    images = random_images(input_shape, count=4).to(device)
    try:
        with tensor_float32(allowed=search.precision == "tf32"):
            found, _ = _logits_and_gradient(model, images)
            expected, _ = _logits_and_gradient(search, images)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        first = next(iter(str(cause).strip().splitlines()), "")
        needs = "triton" if device.type == "cuda" else "a C++ compiler (apt install g++)"
        raise UserError(
            f"--compile does not work here ({type(cause).__name__}: {first[:200]}); torch.compile needs {needs}; "
            "install it or leave --compile out"
        ) from error
    gap, allowed = logit_gap(found, expected), LOGIT_TOLERANCE if _is_single(search) else _HALF_TOLERANCE
    if not gap <= allowed:
        raise UserError(f"--compile changes this model's logits by {gap:.1e} of the largest; leave --compile out")
    return model


def _is_single(search: SearchModel) -> bool:
    return search.precision in {"fp32", "fp64"}


def _logits_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and what a backward pass gives, so that both directions are compiled and tried."""
    start = images.detach().clone().requires_grad_()
    logits = model(start)
    (gradient,) = torch.autograd.grad(logits.sum(), start)
    return logits.detach(), gradient

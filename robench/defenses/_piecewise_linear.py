"""Cheaper second derivatives of networks with piecewise linear activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PiecewiseLinear(TorchFunctionMode):
    """Let ReLU and leaky ReLU multiply by a constant slope, 0 or 1, inside the block: the same numbers and gradients.

    Their second derivative is zero. Torch does not use that and carries tensors of zeros back through the whole
    network, a third of what it takes to differentiate a gradient.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the two functions, in place where they were asked to be."""
        kwargs = kwargs or {}
        if func is F.relu or func is torch.relu:
            return _scaled(args[0], 0.0, **kwargs)
        if func is F.leaky_relu:
            return _scaled(args[0], kwargs["negative_slope"], inplace=kwargs["inplace"])
        return func(*args, **kwargs)


def _scaled(values: Tensor, below: float, *, inplace: bool = False) -> Tensor:
    positive = values > 0
    slope = positive if below == 0 else torch.where(positive, values.new_tensor(1.0), values.new_tensor(below))
    return values.mul_(slope) if inplace else values * slope

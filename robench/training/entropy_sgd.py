"""Entropy-SGD (Chaudhari et al., arXiv:1611.01838; algorithm 3 of Jagatap et al., arXiv:2008.12338).

It descends the local entropy -log of the integral of exp(-L(w') - gamma/2 |w - w'|^2) over w'. Its gradient gamma
(w - mean of w') is estimated by a Langevin walk of the weights around w, of `inner_steps` steps on as many batches::

    w' <- w' - inner_lr [direction of grad L(w') + gamma (w' - w)] + sqrt(2 inner_lr) noise N(0, I)
    mu <- averaging mu + (1 - averaging) w'

and then one step of the weights themselves, after which a new walk begins there::

    w <- w - lr (gamma) (w - mu)

Both have (Nesterov) momentum and weight decay, as in the authors' reference implementation (ucla-vision/entropy-sgd);
the inner momentum begins anew with every walk. That one takes one more gradient per walk, which it does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from robench.random_streams import RandomStream
from robench.recipe import EntropySgd


class EntropySGD(torch.optim.Optimizer):
    """Every :meth:`step` is one step of the walk, on the batch that the gradient was taken on; one in `inner_steps`
    moves the weights as well. Between them the parameters hold the walk's w', where the next gradient is wanted;
    :meth:`exchange` shows the weights w.

    Running statistics of batch norms are those that the walk's batches left.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: EntropySgd, *, seed: int) -> None:
        """Keep the recipe's settings; the noise is keyed by `seed`, the step and the parameter."""
        super().__init__(parameters, {"lr": settings.lr})
        self.settings, self.seed = settings, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step of the walk, and where it is complete one of the weights."""
        assert closure is None, "the gradient is taken by the loop"
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, number, group["lr"])

    def _step(self, w: nn.Parameter, gradient: Tensor, number: int, lr: float) -> None:
        settings, state = self.settings, self.state[w]
        if not state:
            state["steps"] = torch.zeros((), dtype=torch.int64)
            state["momentum"] = torch.zeros_like(w)
        done = int(state["steps"])
        state["steps"] += 1
        if settings.inner_steps == 0:
            w.sub_(lr * self._direction(gradient, w, state["momentum"]))
            return
        walks, position = divmod(done, settings.inner_steps)
        if position == 0:
            state["weights"], state["average"] = w.detach().clone(), w.detach().clone()
            state["inner_momentum"] = torch.zeros_like(w)
        weights, average = state["weights"], state["average"]
        gamma = settings.gamma * (1 + settings.scoping) ** walks
        direction = self._direction(gradient, w, state["inner_momentum"])
        w.sub_(settings.inner_lr * (direction + gamma * (w - weights)))
        if settings.noise > 0:
            w.add_(math.sqrt(2 * settings.inner_lr) * settings.noise * self._normal(w, number, done))
        average.lerp_(w, 1 - settings.averaging)
        if position == settings.inner_steps - 1:
            scale = gamma if settings.outer_scale == "gamma" else 1.0
            weights.sub_(lr * self._direction(scale * (weights - average), weights, state["momentum"]))
            w.copy_(weights)

    def _direction(self, gradient: Tensor, w: Tensor, momentum: Tensor) -> Tensor:
        """Return where SGD with (Nesterov) momentum and weight decay would go; `momentum` moves on."""
        gradient = gradient + self.settings.weight_decay * w
        momentum.mul_(self.settings.momentum).add_(gradient)
        return gradient + self.settings.momentum * momentum if self.settings.nesterov else momentum

    def _normal(self, w: Tensor, number: int, done: int) -> Tensor:
        """Return standard normal numbers that belong to the step and the parameter."""
        rows = w if w.dim() else w.view(1)
        random = RandomStream(self.seed, torch.arange(len(rows), device=w.device), ("entropy-sgd", done, number))
        return random.normal(rows.detach()).view(w.shape)

    @torch.no_grad()
    def exchange(self) -> None:
        """Let the parameters hold the weights w, and the optimiser the walk's w'; called again, the other way round."""
        for parameter, state in self.state.items():
            if "weights" in state:
                held = parameter.clone()
                parameter.copy_(state["weights"])
                state["weights"].copy_(held)

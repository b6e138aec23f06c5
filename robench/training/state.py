"""Everything that a training needs to go on: what a snapshot holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robench.classifier import Classifier
from robench.training.objective import Objective
from robench.training.optimization import settled
from robench.training.snapshot import Tensors, part, under

Row = dict[str, float]
_COUNTS = ("round", "epoch", "step", "rows", "seconds", "scalars")


@dataclass
class Chosen:
    """The weights of one epoch, on the CPU, and what was measured of them."""

    epoch: int
    """From 1."""
    validation: dict[str, float]
    counts: dict[str, int]
    """`examples` that were measured, and how many of them `clean` and `robust`."""
    weights: Tensors


@dataclass
class TrainingState:
    """The moving parts of a training, between two steps."""

    model: Classifier
    average: Classifier | None
    optimizer: torch.optim.Optimizer
    objective: Objective
    learned_from: dict[str, str] = field(default_factory=dict)
    """Hashes of the weights of the models that were there before."""
    round: int = 0
    """Rounds that are complete."""
    epoch: int = 0
    """Epochs that are complete, of all rounds."""
    step: int = 0
    """Steps that are done of the running epoch."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Over the running epoch's examples, float64: the loss and its parts."""
    rows: list[Row] = field(default_factory=list)
    """The log: one row per complete epoch."""
    best: Chosen | None = None
    """Of the running round."""
    seconds: float = 0.0
    scalars: int = 0
    """Bytes of the scalars' file that belong to the steps done."""

    @contextmanager
    def result(self) -> Iterator[Classifier]:
        """Give what is measured and kept: the average where there is one, else the model with its settled weights."""
        with settled(self.optimizer):
            yield self.average or self.model

    def tensors(self) -> Tensors:
        """Return all tensors by name; they share memory with the training."""
        best = self.best.weights if self.best else {}
        average = self.average.state_dict() if self.average else {}
        return {
            **under("model", self.model.state_dict()),
            **under("average", average),
            **under("optimizer", _optimizer_tensors(self.optimizer)),
            **under("objective", self.objective.state()),
            **under("best", best),
            **under("sums", self.sums),
        }

    def facts(self) -> dict[str, Any]:
        """Return everything else, as JSON values."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        # Files of tensors are sorted by name; the log's columns are in the order of the parts.
        facts["sums"] = list(self.sums)
        if self.best:
            facts["best"] = {name: getattr(self.best, name) for name in ("epoch", "validation", "counts")}
        return facts

    def restore(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Put back what :meth:`tensors` and :meth:`facts` returned."""
        device = self.model.device
        self.model.load_state_dict(part("model", tensors))
        if self.average:
            self.average.load_state_dict(part("average", tensors))
        _restore_optimizer(self.optimizer, part("optimizer", tensors))
        if facts["round"]:
            # It shows the objective what to learn from; the weights come next.
            self.objective.finish_round(self.model)
        self.objective.restore({name: value.to(device) for name, value in part("objective", tensors).items()})
        self.sums = {name: tensors[f"sums/{name}"].to(device) for name in facts["sums"]}
        for name in _COUNTS:
            setattr(self, name, facts[name])
        self.best = Chosen(**facts["best"], weights=part("best", tensors)) if "best" in facts else None


def weights_of(model: nn.Module) -> Tensors:
    """Return a copy of the weights and buffers, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimiser's memory as `parameter number/name`; hyperparameters come from the recipe."""
    return {
        f"{number}/{name}": value
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        parameter = parameters[int(number)]
        # In the parameter's memory format: arithmetic on another one may round differently. Step counts have none.
        same = value.shape == parameter.shape
        optimizer.state[parameter][name] = torch.empty_like(parameter.detach()).copy_(value) if same else value

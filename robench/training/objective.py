"""From a recipe's defense to something the loop can call on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robench import catalog
from robench.defenses import LossParts
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import Recipe


@dataclass(frozen=True)
class Objective:
    """A defense with its parameters bound."""

    call: Callable[..., LossParts]
    bound: Mapping[str, Any]

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: RandomStream, progress: float
    ) -> LossParts:
        """Return the loss of a batch."""
        return self.call(model, images, labels, random=random, progress=progress, **self.bound)

    def state(self) -> dict[str, Tensor]:
        """Return what a defense that keeps state wants to find again on resume."""
        return dict(self.call.state_dict()) if hasattr(self.call, "state_dict") else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned."""
        if hasattr(self.call, "load_state_dict"):
            self.call.load_state_dict(state)


def build_objective(recipe: Recipe) -> Objective:
    """Return the recipe's objective; raise UserError where defense and `threat` do not go together."""
    plugin = catalog.find("defenses", recipe.defense.name)
    code = plugin.load().objective
    parameters = plugin.settings(recipe.defense.parameters)
    is_class = inspect.isclass(code)
    wants_threat = "threat" in inspect.signature(code.__call__ if is_class else code).parameters
    if wants_threat and recipe.threat is None:
        raise UserError(f"defense {plugin.name} trains against a threat model; add --set threat=Linf@8/255")
    if recipe.threat is not None and not wants_threat:
        raise UserError(
            f"defense {plugin.name} trains against no threat model, but the recipe has threat {recipe.threat}; "
            "take --set threat=none and --set selection.threat for what the selection measures"
        )
    supplied = {"threat": recipe.threat} if wants_threat else {}
    return Objective(code(**parameters), supplied) if is_class else Objective(code, {**parameters, **supplied})

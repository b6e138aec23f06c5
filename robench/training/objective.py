"""From a recipe's defense and regularizers to something the loop can call on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robench import catalog
from robench.checkpoints import build_classifier
from robench.classifier import random_images
from robench.defenses import LossParts
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import Recipe
from robench.records import Configured, Normalization


@dataclass(frozen=True)
class Term:
    """A defense with its parameters bound."""

    name: str
    call: Callable[..., LossParts]
    bound: Mapping[str, Any]
    asks_for: frozenset[str]
    """Which of `learning_rate` and `base` it is given at each step."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, **supplied: Any) -> LossParts:
        """Return what it makes of a batch."""
        wanted = {k: v for k, v in supplied.items() if k in {"random", "progress", *self.asks_for}}
        return self.call(model, images, labels, **wanted, **self.bound)


@dataclass(frozen=True)
class Objective:
    """A defense and what is added to its loss."""

    base: Term
    regularizers: tuple[Term, ...] = ()
    differentiates_images: bool = False

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,
        progress: float,
        learning_rate: float = 1.0,
    ) -> LossParts:
        """Return the loss of a batch, and the parts of it by name; `learning_rate` is its share of the recipe's."""
        if self.differentiates_images:
            images = images.detach().requires_grad_()
        supplied = {"progress": progress, "learning_rate": learning_rate}
        base = self.base(model, images, labels, random=random, **supplied)
        total, parts = base.total, dict(base.parts)
        for term in self.regularizers:
            own = random.at("regularizer", term.name)
            added = term(model, images, labels, random=own, base=base, **supplied)
            total = total + added.total
            parts |= added.parts
        return LossParts(total, parts, base.views)

    def check(self, model: nn.Module) -> None:
        """Raise UserError where a term cannot train such a network."""
        for term in (self.base, *self.regularizers):
            if hasattr(term.call, "check"):
                term.call.check(model)

    def companions(self) -> list[nn.Module]:
        """Return the networks that are trained besides the recipe's."""
        return [term.call.companion for term in (self.base, *self.regularizers) if hasattr(term.call, "companion")]

    def finish_round(self, model: nn.Module) -> None:
        """Tell terms that want to know it what a round has made."""
        for term in (self.base, *self.regularizers):
            if hasattr(term.call, "finish_round"):
                term.call.finish_round(model)

    def state(self) -> dict[str, Tensor]:
        """Return what terms that keep state want to find again on resume."""
        return {
            f"{term.name}/{key}": value
            for term in (self.base, *self.regularizers)
            if hasattr(term.call, "state_dict")
            for key, value in term.call.state_dict().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned."""
        for term in (self.base, *self.regularizers):
            if hasattr(term.call, "load_state_dict"):
                own = {key: value for key, value in state.items() if key.startswith(f"{term.name}/")}
                term.call.load_state_dict({key.removeprefix(f"{term.name}/"): value for key, value in own.items()})


NewNetwork = Callable[[str], nn.Module]
"""An architecture's name -> an untrained network for the recipe's data."""


def build_objective(
    recipe: Recipe, *, teacher: nn.Module | None = None, new_network: NewNetwork | None = None
) -> Objective:
    """Return the recipe's objective; raise UserError where its parts do not go together.

    `teacher` is the frozen model that :attr:`Recipe.teacher` or :attr:`Recipe.start` names; what `new_network` builds
    is trained along.
    """
    chosen = (recipe.defense, *recipe.regularizers)
    plugins = [catalog.find("defenses", c.name) for c in chosen]
    codes = [plugin.load().objective for plugin in plugins]
    if recipe.threat is None and any("threat" in _asked_for(code) for code in codes):
        raise UserError(f"defense {plugins[0].name} trains against a threat model; add --set threat=Linf@8/255")
    if recipe.threat is not None and not any("threat" in _asked_for(code) for code in codes):
        raise UserError(
            f"defense {plugins[0].name} trains against no threat model, but the recipe has threat {recipe.threat}; "
            "take --set threat=none and --set selection.threat for what the selection measures"
        )
    if recipe.rounds > 1 and not any(hasattr(code, "finish_round") for code in codes):
        raise UserError(
            f"defense {plugins[0].name} learns nothing from round to round, but the recipe has rounds = "
            f"{recipe.rounds}; take --set rounds=1"
        )
    views = plugins[0].facts.get("views", catalog.DefenseEntry.views)
    for plugin, configured in zip(plugins[1:], chosen[1:], strict=True):
        if plugin.settings(configured.parameters).get("at") == "adversarial" and "adversarial" not in views:
            raise UserError(
                f"regularizer {plugin.name}: at = adversarial, but defense {plugins[0].name} trains on no adversarial "
                f"images; take --set regularizers.{plugin.name}.at=clean"
            )
    supplied = {"teacher": teacher, "new_network": new_network, "num_rounds": recipe.rounds}
    terms = [_term(plugin, c, recipe, supplied) for plugin, c in zip(plugins, chosen, strict=True)]
    return Objective(terms[0], tuple(terms[1:]), any(p.facts.get("differentiates_images", False) for p in plugins[1:]))


#: Stands in for the recipe's network where only the objective is looked at.
_UNDERSTUDY = Configured(name="mlp_4x1024", parameters={"hidden_layers": 1, "width": 8})


def rehearse(
    recipe: Recipe,
    *,
    teacher: nn.Module | None,
    num_classes: int,
    input_shape: tuple[int, int, int],
    device: torch.device,
) -> None:
    """Take the recipe's loss once as at the begin of the training and once as at its end; raise UserError as they do.

    Options that contradict each other, the threat model, the images' shape or a teacher are found in milliseconds so,
    whatever the recipe's network costs: two random images are shown to a tiny network, by an objective of its own.
    Initial weights are drawn from torch's global generator.
    """
    images, labels = random_images(input_shape, count=2).to(device), torch.arange(2, device=device) % num_classes

    def understudy(name: str | None = None) -> nn.Module:
        """Return the tiny network, with the last layer that losses with margins ask for where the recipe has one."""
        stands_for = recipe.architecture if name is None else Configured(name=name)
        plugin = None if stands_for is None else catalog.find("architectures", stands_for.name)
        played = _UNDERSTUDY
        if plugin is not None and stands_for is not None and plugin.entry == "with_head":
            changed = {**plugin.settings(stands_for.parameters), "network": _UNDERSTUDY.name}
            played = Configured(name="with_head", parameters=changed)
        # Where the recipe's network standardises its images or does not, this one does: a loss may differentiate by it.
        scale = Normalization(mean=(0.5,) * input_shape[0], std=(0.5,) * input_shape[0])
        built = build_classifier(played, num_classes=num_classes, input_shape=input_shape, normalization=scale)
        return built.to(device).train()

    for progress in (0.0, 1.0 - torch.finfo(torch.float32).eps):
        objective = build_objective(recipe, teacher=teacher, new_network=understudy)
        random = RandomStream(recipe.seed, torch.arange(2, device=device), ("rehearsal",))
        objective(understudy(), images, labels, random=random, progress=progress)


def _asked_for(code: Callable[..., Any]) -> set[str]:
    """Return the arguments of each step that a defense's function, or its class's instances, take."""
    return set(inspect.signature(code.__call__ if inspect.isclass(code) else code).parameters)


def _term(plugin: catalog.Plugin, configured: Configured, recipe: Recipe, supplied: Mapping[str, Any]) -> Term:
    code = plugin.load().objective
    parameters = plugin.settings(configured.parameters)
    asked = _asked_for(code)
    bound = {"threat": recipe.threat} if "threat" in asked else {}
    asks_for = frozenset({"learning_rate", "base"} & asked)
    if not inspect.isclass(code):
        return Term(plugin.name, code, {**parameters, **bound}, asks_for)
    if "teacher" in plugin.supplied and supplied["teacher"] is None:
        raise UserError(
            f"defense {plugin.name} learns from a registered model; add --set start=MODEL, or --set teacher=MODEL "
            "to begin with random weights"
        )
    given = {name: value for name, value in supplied.items() if name in plugin.supplied}
    made: Callable[..., LossParts] = code(**parameters, **given)  # type: ignore[assignment]  # an instance of the class
    return Term(plugin.name, made, bound, asks_for)

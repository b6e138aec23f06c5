"""What every recipe of the catalog promises; a new file in robench/recipes/ is tested by itself."""

from __future__ import annotations

import math

import pytest
import torch

from robench import catalog
from robench.checkpoints import build_classifier
from robench.recipe import apply_settings, load_recipe
from robench.training.objective import build_objective, rehearse
from robench.training.schedules import learning_rate


def objective_of(recipe):
    return build_objective(recipe, teacher=torch.nn.Identity(), new_network=lambda _: torch.nn.Identity())


each_recipe = pytest.mark.parametrize("name", list(catalog.plugins("recipes")))


@each_recipe
def test_builds_a_network_that_fits_its_data(name):
    recipe = load_recipe(name)
    dataset = catalog.find("datasets", recipe.dataset).facts
    if recipe.architecture is None:
        assert recipe.start, "only the network of a start can be left out"
        return
    classes = len(dataset["classes"]) or 1000  # ImageNet's are read from its folders
    # On the meta device shapes are checked and nothing is computed.
    with torch.device("meta"):
        model = build_classifier(
            recipe.architecture,
            num_classes=classes,
            input_shape=dataset["image_shape"],
            normalization=recipe.normalization,
        )
        logits = model.eval()(torch.empty(2, *dataset["image_shape"]))
    assert logits.shape == (2, classes)
    objective_of(recipe).check(model)


@each_recipe
def test_defense_and_threat_go_together(name):
    objective_of(load_recipe(name))


@each_recipe
def test_its_loss_can_be_taken(name):
    recipe = load_recipe(name)
    facts = catalog.find("datasets", recipe.dataset).facts
    classes = len(facts["classes"]) or 1000
    shape, device = facts["image_shape"], torch.device("cpu")
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), classes)).requires_grad_(False)
    rehearse(recipe, teacher=teacher, num_classes=classes, input_shape=shape, device=device)


@each_recipe
def test_learning_rates_are_positive_and_reach_the_stated_one(name):
    recipe = load_recipe(name)
    rates = [learning_rate(recipe, step, 20) for step in range(recipe.epochs * 20)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(recipe.optimizer.lr, rel=0.05)


@each_recipe
def test_says_where_it_is_from_and_takes_settings(name):
    recipe = load_recipe(name)
    assert recipe.summary
    assert recipe.source
    assert apply_settings(recipe, ["seed=7"]).seed == 7

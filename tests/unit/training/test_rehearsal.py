"""Options that contradict each other are found before anything is trained, by `--dry-run` too."""

from __future__ import annotations

import functools

import pytest
import torch

from robench import training
from robench.defenses.sgr import StructuredGradientRegularization
from robench.errors import UserError
from robench.recipe import apply_settings
from robench.training.objective import build_objective, rehearse
from tests.unit.training.problems import Watcher, make_workspace, run_training, small_recipe

CONTRADICTIONS = {
    "atent": (["defense.name=atent", "threat=Linf@0.1", "defense.gamma=7"], "gamma = 7 contradicts threat Linf@0.1"),
    "atent alpha": (["defense.name=atent", "defense.alpha=0"], "alpha = 0 averages nothing"),
    "atent gradients": (["defense.name=atent", "defense.raw_reduction=mean"], "raw_reduction = mean changes nothing"),
    "mail": (["defense.name=mail", "defense.beta=2"], "beta = 2.0 belongs to form=trades"),
    "augmentation": (["defense.name=fgsm_adv", "defense.step_size=0.1"], "step_size = 0.1 belongs to attack=pgd"),
    "igr": (
        ["defense.name=smooth_adv", "regularizers.igr.of=loss"],
        "of = loss, but this objective shows none of its images",
    ),
    "emr": (
        ["regularizers.emr.form=exact", "regularizers.emr.temperature=2"],
        "temperature = 2 weighs the rows of the approximate form",
    ),
    "sgr": (["regularizers.sgr.perturbation=fgsm"], "perturbation = fgsm needs epsilon"),
}


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_forecast_and_a_training_refuse_a_contradiction_before_the_first_step(case, workspace):
    settings, message = CONTRADICTIONS[case]
    recipe = apply_settings(small_recipe(workspace), settings)
    run = training.Run(name="x", device=torch.device("cpu"), command="robench train")
    with pytest.raises(UserError, match=message):
        training.forecast(recipe, run, workspace=workspace)
    watcher = Watcher()
    with pytest.raises(UserError, match=message):
        run_training(workspace, recipe, watcher=watcher)
    assert watcher.steps == []
    assert not (workspace.model_zoo / ".training" / "x").exists()


def test_images_that_are_too_large_for_a_full_covariance_are_refused(workspace):
    recipe = apply_settings(small_recipe(workspace), ["regularizers.sgr.form=full"])
    seen = {"teacher": None, "num_classes": 3, "device": torch.device("cpu")}
    rehearse(recipe, input_shape=(1, 64, 64), **seen)
    with pytest.raises(UserError, match=r"form = full keeps a matrix of 4,160 x 4,160"):
        rehearse(recipe, input_shape=(1, 64, 65), **seen)


def test_a_teacher_of_other_classes_is_refused(workspace):
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4)).requires_grad_(False).eval()
    recipe = apply_settings(
        small_recipe(workspace),
        ["defense.name=heat_smoothing", "threat=none", "selection.attack=none", "selection.metric=last"],
    )
    with pytest.raises(UserError, match=r"the teacher gives \(4,\) outputs for an image, the student \(3,\)"):
        rehearse(recipe, teacher=teacher, num_classes=3, input_shape=(1, 16, 16), device=torch.device("cpu"))


def test_what_comes_late_in_a_training_is_rehearsed_too(workspace, monkeypatch):
    seen = []

    class Late:
        def __call__(self, model, images, labels, *, random, progress, **_):
            seen.append(progress)
            if progress > 0.9:
                raise UserError("at the end only")

    monkeypatch.setattr(training.objective, "build_objective", lambda *_, **__: Late())
    with pytest.raises(UserError, match="at the end only"):
        rehearse(
            small_recipe(workspace), teacher=None, num_classes=3, input_shape=(1, 16, 16), device=torch.device("cpu")
        )
    assert seen[0] == 0
    assert 0.999 < seen[1] < 1


def test_a_training_begins_with_an_objective_that_has_learned_nothing(workspace, monkeypatch):
    begun = []

    def watched(recipe, **options):
        begun.append(build_objective(recipe, **options))
        return begun[-1]

    recipe = apply_settings(small_recipe(workspace), ["regularizers.sgr.strength=0.1"])
    monkeypatch.setattr(training, "build_objective", watched)
    calls = []
    original = StructuredGradientRegularization.__call__

    @functools.wraps(original)
    def call(self, *arguments, **options):
        calls.append((self, self.step))
        return original(self, *arguments, **options)

    monkeypatch.setattr(StructuredGradientRegularization, "__call__", call)
    run_training(workspace, recipe)
    (own,) = (term.call for term in begun[0].regularizers)
    assert next(step for regularizer, step in calls if regularizer is own) == 0

"""Recipes as values: TOML one to one, settings typed by their field, one clear line for everything that is wrong."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest

from robench import catalog
from robench.errors import UnknownName, UserError
from robench.recipe import Adam, Recipe, Sgd, apply_settings, load_recipe, parse_recipe

PLAIN = {
    "summary": "s",
    "source": "p",
    "dataset": "digits",
    "epochs": 4,
    "batch_size": 8,
    "architecture": {"name": "digits_cnn"},
    "defense": {"name": "standard"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "selection": {"metric": "clean_accuracy"},
}


def parsed(**changes) -> Recipe:
    return parse_recipe({**PLAIN, **changes}, origin="recipe x")


def pgd_recipe() -> Recipe:
    selection = {"metric": "robust_accuracy", "attack": "pgd-10"}
    return parsed(threat="Linf@8/255", defense={"name": "pgd_training"}, selection=selection)


def test_plugins_get_all_their_parameters():
    parameters = pgd_recipe().defense.parameters
    assert parameters["steps"] == 10
    assert parameters["attack_mode"] == "train"
    assert "threat" not in parameters


def test_what_is_written_reads_back_equal():
    recipe = pgd_recipe()
    assert Recipe.from_json(recipe.to_json(), origin="x") == recipe
    assert recipe.model_dump(mode="json")["threat"] == "Linf@8/255"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epoch": 3}, "unknown key epoch; did you mean 'epochs' or 'teacher'?"),
        (
            {"optimizer": {"name": "sgd", "lr": 1, "momentun": 0.9}},
            "unknown key optimizer.momentun; did you mean 'momentum'?",
        ),
        ({"optimizer": {"name": "adam", "lr": 1, "nesterov": True}}, "unknown key optimizer.nesterov"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.lr is missing"),
        ({"optimizer": {"name": "rmsprop", "lr": 1}}, "optimizer"),
        ({"epochs": 0}, "epochs = 0"),
        ({"schedule": {"name": "step", "milestones": [3, 2]}}, "must ascend"),
        ({"selection": {"metric": "robust_accuracy"}}, "selection.metric robust_accuracy needs selection.attack"),
        ({"selection": {"metric": "clean_accuracy", "attack": "pgd-10"}}, "selection.attack needs selection.threat"),
        ({"threat": "Linf@8"}, "write 8/255"),
        ({"defense": {"name": "pgd_training", "parameters": {"step": 3}}}, "no parameter step; did you mean 'steps'"),
        ({"architecture": {"name": "digits_cnnn"}}, "did you mean 'digits_cnn'"),
        ({"dataset": "digit"}, "did you mean 'digits'?"),
        ({"normalization": {"mean": [0.5], "std": [0.2, 0.2]}}, "differ in length"),
        (
            {"normalization": {"mean": [125.3, 123.0], "std": [63.0, 62.1]}},
            "recipe x: normalization.mean 125.3,123 is of pixels from 0 to 255, images are in [0, 1] here; divide it",
        ),
        ({"normalization": {"mean": [0.5], "std": [51]}}, "normalization.std 51 is of pixels from 0 to 255"),
        ({"normalization": {"mean": [0.5], "std": [0.0]}}, "normalization.std 0 must be positive"),
        ({"normalization": {"mean": [float("nan")], "std": [0.2]}}, "normalization.mean nan is not finite"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(changes, text):
    with pytest.raises(UserError) as caught:
        parsed(**changes)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_typed_by_their_field():
    recipe = apply_settings(
        pgd_recipe(),
        [
            "epochs=8",
            "optimizer.lr=2/255",
            "optimizer.nesterov=true",
            "defense.steps=3",
            "defense.parameters.step_size=1/255",
            "schedule.name=step",
            "schedule.milestones=[2, 3.5]",
            "threat=Linf@4/255",
            "selection.examples=100",
            "averaging=0.99",
        ],
    )
    assert recipe.epochs == 8
    assert isinstance(recipe.optimizer, Sgd)
    assert recipe.optimizer.lr == 2 / 255
    assert recipe.optimizer.nesterov is True
    assert recipe.defense.parameters["steps"] == 3
    assert recipe.defense.parameters["step_size"] == 1 / 255
    assert recipe.schedule.milestones == (2, 3.5)
    assert recipe.threat.epsilon == Fraction(4, 255)
    assert recipe.selection.examples == 100
    assert recipe.averaging == 0.99
    assert apply_settings(recipe, ["selection.examples=none"]).selection.examples is None


def test_another_name_drops_what_belongs_to_the_former_choice():
    recipe = apply_settings(pgd_recipe(), ["optimizer.name=adam", "defense.name=standard", "threat=none", *BOTH])
    assert recipe.optimizer == Adam(name="adam", lr=0.1)
    assert recipe.defense.parameters == {}


BOTH = ["selection.attack=none", "selection.metric=clean_accuracy"]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("epochs", "write KEY=VALUE"),
        ("epocs=3", "did you mean 'epochs'?"),
        ("epochs=three", "epochs = 'three'"),
        ("epochs.x=3", "epochs is a single value"),
        ("optimizer.learning=3", "unknown key optimizer.learning"),
        ("optimizer.lr=fast", "'fast' is no number"),
        ("optimizer.lr=-1", "optimizer.lr = '-1'"),
        ("optimizer.lr.x=1", "no key below optimizer.lr"),
        ("defense.step=3", "no parameter step; did you mean 'steps'"),
        ("defense.steps=many", "steps = 'many'"),
        ("defense.attack_mode=evil", "attack_mode = 'evil'"),
        ("defense.name=pgd", "unknown defense 'pgd'"),
        ("schedule.milestones=[2", "schedule"),
        ("selection.attack=pgd-11", "unknown attack 'pgd-11'"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(setting, text):
    with pytest.raises(UserError) as caught:
        apply_settings(pgd_recipe(), [setting])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_epochs_are_said_in_scale():
    assert apply_settings(parsed(), ["epochs=3"]).scale == "3 of 4 epochs"
    assert apply_settings(parsed(scale="4 of 90 epochs"), ["epochs=3"]).scale == "3 of 4 epochs; 4 of 90 epochs"
    assert apply_settings(parsed(), ["epochs=5"]).scale is None
    assert apply_settings(parsed(), ["epochs=3", "scale=a try"]).scale == "a try"


def test_a_file_is_read_like_a_name(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(UserError, match=r"cannot be read: No such file .* \(robench list recipes\)$"):
        load_recipe(str(path))
    (tmp_path / "min.toml").write_text("")
    with pytest.raises(UserError, match=r"did you mean 'min\.toml'\? \(robench list recipes\)$"):
        load_recipe(str(path))
    path.write_text("epochs = ", encoding="utf-8")
    with pytest.raises(UserError, match="no valid TOML"):
        load_recipe(str(path))
    path.write_text('summary = "s"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.toml: .* is missing"):
        load_recipe(str(path))
    with pytest.raises(UnknownName, match="did you mean 'mnist-pgd'"):
        load_recipe("mnist-pdg")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('summary = "s"\n'.encode("utf-16"), "line 1 has the byte 0xff"),
        (b'summary = "s"\nsource = "\xff"\n', "line 2 has the byte 0xff"),
    ],
)
def test_a_file_that_is_not_utf_8_is_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert str(caught.value) == f"recipe {path} is no UTF-8 text ({problem}); save it as UTF-8"


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + catalog.find("recipes", "digits-pgd").path.read_bytes())
    assert load_recipe(str(path)) == load_recipe("digits-pgd")


def test_reading_recipes_does_not_import_torch():
    code = (
        "import sys; from robench.recipe import load_recipe, apply_settings\n"
        "apply_settings(load_recipe('mnist-pgd'), ['epochs=2'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_augmentation_can_be_switched_off():
    changed = apply_settings(load_recipe("digits-pgd"), ["augmentation.name=none"])
    assert changed.augmentation.name == "none"


def test_a_summary_names_the_network_that_is_trained() -> None:
    recipe = load_recipe("emr-mlp-st")
    assert apply_settings(recipe, ["epochs=3"]).summary == recipe.summary
    other = apply_settings(recipe, ["architecture.name=small_cnn"])
    assert other.summary == f"{recipe.summary}, with small_cnn instead of mlp_4x1024"
    assert apply_settings(recipe, ["architecture.name=small_cnn", "summary=own"]).summary == "own"

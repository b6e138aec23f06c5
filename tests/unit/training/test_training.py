"""The whole of `train`: what is registered, how the best epoch is chosen, what stops it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from robench import datasets, training
from robench.catalog import find
from robench.defenses import LossParts
from robench.errors import UserError
from robench.recipe import apply_settings
from robench.training import Run, forecast, loop, nothing_to_resume, validation
from tests.unit.training.problems import (
    STEPS_PER_EPOCH,
    Watcher,
    log_without_seconds,
    make_workspace,
    run_training,
    small_recipe,
)


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


def objective_of(call):
    return training.objective.Objective(training.objective.Term("own", call, {}, frozenset()))


def weights(workspace, name, file="model.safetensors"):
    return (workspace.model_zoo / name / file).read_bytes()


def test_registers_a_model_that_learned_with_its_log(workspace):
    watcher = Watcher()
    recipe = small_recipe(workspace, epochs=6, averaging=None, augmentation={"name": "none"}, optimizer=ADAM)
    card = run_training(workspace, recipe, watcher=watcher)
    assert watcher.steps == list(range(1, 6 * STEPS_PER_EPOCH + 1))
    assert watcher.rows[-1]["train_loss"] < 0.7 * watcher.rows[0]["train_loss"]
    assert card.clean_accuracy.value == card.weights.validation["clean_accuracy"]
    assert card.clean_accuracy_split == "validation"
    assert card.threat == recipe.threat
    assert card.dataset == card.recipe["dataset"] == "npz:data"
    assert str(workspace.root) not in card.to_json()
    folder = workspace.model_zoo / "x"
    assert len((folder / "training.csv").read_text(encoding="utf-8").splitlines()) == 7
    scalars = [json.loads(line) for line in (folder / "scalars.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all({"step", "loss", "accuracy"} <= s.keys() for s in scalars)
    assert not (workspace.model_zoo / ".training" / "x").exists()


ADAM = {"name": "adam", "lr": 0.01}


def test_seeds_decide_and_nothing_else(workspace):
    recipe = small_recipe(workspace, epochs=1)
    before = torch.get_rng_state()
    run_training(workspace, recipe, "a")
    torch.empty(3).uniform_()
    run_training(workspace, recipe, "b")
    run_training(workspace, apply_settings(recipe, ["seed=1"]), "c")
    assert weights(workspace, "a") == weights(workspace, "b") != weights(workspace, "c")
    torch.set_rng_state(before)


def test_the_callers_generator_is_untouched(workspace):
    before = torch.get_rng_state()
    run_training(workspace, small_recipe(workspace, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_test_split_is_never_opened(workspace, monkeypatch):
    opened = []

    def watched(dataset, split, place):
        opened.append(split)
        return datasets.open_split(dataset, split, place)

    monkeypatch.setattr(training, "open_split", watched)
    run_training(workspace, small_recipe(workspace, epochs=1))
    assert set(opened) == {"train", "validation"}


def test_the_best_epoch_is_selected_and_the_last_one_kept(workspace, monkeypatch):
    answers = iter([(6, 3, 1), (6, 5, 4), (6, 6, 4), (6, 6, 2)])
    measured = []

    def measure(_self, model):
        measured.append({k: v.clone() for k, v in model.network.state_dict().items()})
        return validation.Measurement(*next(answers))

    monkeypatch.setattr(validation.Examiner, "measure", measure)
    card = run_training(workspace, small_recipe(workspace, epochs=4))
    # Of two equally robust epochs the later one.
    assert card.weights.epoch == 3
    assert card.weights.validation == {"clean_accuracy": 1.0, "robust_accuracy": 4 / 6}
    assert (card.last.epoch, card.last.validation["robust_accuracy"]) == (4, 2 / 6)
    folder = workspace.model_zoo / "x"
    for file, epoch in (("model.safetensors", 3), ("last.safetensors", 4)):
        for name, value in load_file(folder / file).items():
            assert torch.equal(value, measured[epoch - 1][name])


def test_epochs_between_measurements_have_an_empty_column(workspace):
    selection = {"metric": "clean_accuracy", "every": 2, "examples": 3}
    card = run_training(workspace, small_recipe(workspace, selection=selection))
    lines = (workspace.model_zoo / "x" / "training.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("validation_clean_accuracy")
    assert [bool(line.split(",")[column]) for line in lines[1:]] == [False, True, True]
    assert card.clean_accuracy.n == 3


def test_averaged_weights_are_what_is_measured_and_kept(workspace):
    recipe = small_recipe(workspace, epochs=1)
    run_training(workspace, recipe, "averaged")
    run_training(workspace, apply_settings(recipe, ["averaging=none"]), "plain")
    assert weights(workspace, "averaged") != weights(workspace, "plain")


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(workspace, monkeypatch):
    def poisoned(model, images, labels, *, random, progress):
        total = model(images).logsumexp(1).mean()
        return LossParts(total * (float("nan") if progress > 0.5 else 1.0))

    monkeypatch.setattr(training, "build_objective", lambda *_, **__: objective_of(poisoned))
    with pytest.raises(UserError, match=r"epoch 2, step 5 of 7; the last good checkpoint is kept in .*optimizer.lr"):
        run_training(workspace, small_recipe(workspace))
    folder = workspace.model_zoo / ".training" / "x"
    kept = load_file(folder / "snapshot.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    assert not (workspace.model_zoo / "x").exists()


def test_names_and_interrupted_runs_are_respected(workspace):
    recipe = small_recipe(workspace)
    with pytest.raises(KeyboardInterrupt):
        run_training(workspace, recipe, watcher=Watcher(stop_after=STEPS_PER_EPOCH + 3))
    with pytest.raises(UserError, match=r"--resume .* or --restart"):
        run_training(workspace, recipe)
    with pytest.raises(UserError, match=r"optimizer.lr = 0.003, not 0.1.*--restart"):
        run_training(workspace, apply_settings(recipe, ["optimizer.lr=0.1"]), resume=True)
    with pytest.raises(UserError, match="precision"):
        run_training(workspace, recipe, resume=True, precision="bf16")
    watcher = Watcher()
    run_training(workspace, apply_settings(recipe, ["epochs=1"]), watcher=watcher, restart=True)
    assert watcher.steps[0] == 1
    with pytest.raises(UserError, match="--replace"):
        run_training(workspace, recipe)
    run_training(workspace, recipe, replace=True)


def test_defense_and_threat_must_go_together(workspace):
    recipe = small_recipe(workspace)
    without = apply_settings(recipe, ["threat=none", "selection.threat=Linf@0.1"])
    with pytest.raises(UserError, match="trains against a threat model"):
        run_training(workspace, without)
    undefended = apply_settings(recipe, ["defense.name=standard"])
    with pytest.raises(UserError, match="trains against no threat model"):
        run_training(workspace, undefended)


def test_bf16_trains(workspace):
    watcher = Watcher()
    run_training(workspace, small_recipe(workspace, epochs=1), watcher=watcher, precision="bf16")
    assert watcher.rows[0]["train_loss"] < 10


def test_validation_counts_what_the_attack_leaves(workspace):
    pixels = validation.Pixels(
        datasets.open_split(small_recipe(workspace).dataset, "train", workspace), torch.device("cpu")
    )

    class Brightest(torch.nn.Module):
        """The class whose corner is brightest: right on all images, wrong within a large ball."""

        def forward(self, images):
            return torch.stack(
                [images[:, 0, 8 * (k // 2) :, 8 * (k % 2) :][:, :8, :8].mean((1, 2)) for k in range(3)], dim=1
            )

    def measured(threat, attack="pgd-10"):
        examiner = validation.Examiner(pixels=pixels, ids=torch.arange(10), attack=attack, threat=threat, seed=0)
        return examiner.measure(Brightest())

    threat = small_recipe(workspace).threat
    assert measured(None, attack=None) == validation.Measurement(10, 10, None)
    assert measured(threat.model_copy(update={"epsilon": 0.05})) == validation.Measurement(10, 10, 10)
    assert measured(threat.model_copy(update={"epsilon": 0.9})) == validation.Measurement(10, 10, 0)


def test_state_of_a_defense_is_kept_across_a_resume(workspace, monkeypatch):
    """A defense whose loss depends on what it saw before: lost state would show."""

    class Remembering:
        def __init__(self):
            self.seen = torch.zeros(())

        def __call__(self, model, images, labels, *, random, progress):
            self.seen = self.seen + images.mean()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            return LossParts(loss * (1 + self.seen), {"seen": self.seen.clone()})

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    monkeypatch.setattr(training, "build_objective", lambda *_, **__: objective_of(Remembering()))
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    recipe = small_recipe(workspace, epochs=2)
    run_training(workspace, recipe, "straight")
    with pytest.raises(KeyboardInterrupt):
        run_training(workspace, recipe, "resumed", Watcher(stop_after=9))
    run_training(workspace, recipe, "resumed", resume=True)
    assert log_without_seconds(workspace, "straight") == log_without_seconds(workspace, "resumed")


def test_every_step_draws_its_own_numbers(workspace, monkeypatch):
    dropout, examples = [], []

    def watching(model, images, labels, *, random, progress):
        dropout.append(torch.empty(1).uniform_().item())
        examples.extend(random.uniform(torch.empty(len(images))).tolist())
        return LossParts(torch.nn.functional.cross_entropy(model(images), labels))

    monkeypatch.setattr(training, "build_objective", lambda *_, **__: objective_of(watching))
    run_training(workspace, small_recipe(workspace, epochs=3))
    assert len(set(dropout)) == len(dropout) == 3 * STEPS_PER_EPOCH
    assert len(set(examples)) == len(examples) == 3 * 54


def test_objectives_get_their_parameters_and_the_threat(workspace):
    objective = training.build_objective(small_recipe(workspace))
    assert objective.base.call is find("defenses", "pgd_training").load().objective
    assert objective.base.bound["steps"] == 2
    assert str(objective.base.bound["threat"]) == "Linf@0.1"
    assert objective.state() == {}


def test_training_begins_with_the_weights_of_start_and_says_whose(workspace):
    first = run_training(workspace, small_recipe(workspace, averaging=None, epochs=1), name="first")
    still = {"name": "sgd", "lr": 1e-12}
    recipe = small_recipe(workspace, averaging=None, epochs=1, start="first", optimizer=still)
    second = run_training(workspace, recipe, name="second")
    assert second.learned_from == {"start": first.weights.sha256}
    before, after = (
        load_file(workspace.model_zoo / name / "model.safetensors")["linear2.weight"] for name in ("first", "second")
    )
    assert torch.allclose(before, after, atol=1e-6)


def test_a_start_that_is_missing_or_another_network_is_refused(workspace):
    with pytest.raises(UserError, match=r"start = nobody: .*--set start=MODEL"):
        run_training(workspace, small_recipe(workspace, start="nobody"))
    run_training(workspace, small_recipe(workspace, epochs=1), name="first")
    other = small_recipe(workspace, start="first", architecture={"name": "mlp_4x1024"})
    with pytest.raises(UserError, match="start first is no mlp_4x1024 with the recipe's parameters"):
        run_training(workspace, other)
    assert not (workspace.model_zoo / "x").exists()


def test_selection_last_keeps_the_last_epoch(workspace):
    card = run_training(workspace, small_recipe(workspace, epochs=3, selection={"metric": "last"}))
    assert card.weights.epoch == 3
    assert card.last is None


def test_forecast_counts_the_steps_and_writes_nothing(workspace):
    run = training.Run(name="x", device=torch.device("cpu"), command="robench train")
    found = training.forecast(small_recipe(workspace), run, workspace=workspace)
    # 54 examples in batches of at most 8; two steps of the inner maximisation and one of the loss.
    assert (found.steps_per_epoch, found.steps, found.examples, found.passes) == (7, 21, 54, 3)
    assert found.seconds > 0
    assert (found.batch, found.bytes) == (8, found.bytes_besides + 8 * found.bytes_per_image)
    parts = small_recipe(workspace, accumulate=2)
    assert training.forecast(parts, run, workspace=workspace).batch == 4
    assert list(workspace.model_zoo.iterdir()) == []


def test_fewer_training_images_resume_and_are_said(tmp_path):
    workspace = make_workspace(tmp_path)
    recipe = apply_settings(small_recipe(workspace), ["train_examples=20", "epochs=2"])
    assert recipe.scale == "2 of 3 epochs, 20 training images"
    straight = run_training(workspace, recipe, "straight")
    with pytest.raises(KeyboardInterrupt):
        run_training(workspace, recipe, "stopped", Watcher(stop_after=4))
    said_otherwise = recipe.model_copy(update={"summary": "the same, told in other words"})
    resumed = run_training(workspace, said_otherwise, "stopped", resume=True)
    assert resumed.weights.sha256 == straight.weights.sha256
    assert resumed.summary == "the same, told in other words"
    assert straight.scale == "2 of 3 epochs, 20 training images"
    run = Run(name="z", device=torch.device("cpu"), command="")
    assert forecast(recipe, run, workspace=workspace).examples == 20


def test_more_training_images_than_there_are_are_refused(workspace):
    available = len(datasets.open_split(small_recipe(workspace).dataset, "train", workspace))
    recipe = small_recipe(workspace, train_examples=available + 1)
    refused = rf"train_examples = {available + 1} is more than the {available} images .*; set it to fewer"
    with pytest.raises(UserError, match=refused):
        forecast(recipe, Run(name="z", device=torch.device("cpu"), command=""), workspace=workspace)
    with pytest.raises(UserError, match=refused):
        run_training(workspace, recipe)
    exactly = small_recipe(workspace, train_examples=available)
    run = Run(name="z", device=torch.device("cpu"), command="")
    assert forecast(exactly, run, workspace=workspace).examples == available


def test_nothing_to_resume_is_said(workspace):
    def look(name, **options):
        return nothing_to_resume(Run(name=name, device=torch.device("cpu"), command="", **options), workspace)

    trainings = workspace.model_zoo / ".training"
    refused = rf"^nothing to resume: {trainings} has no '%s' \(%s\); leave --resume out to begin at epoch 1$"
    with pytest.raises(UserError, match=refused % ("stoped", "there is none")):
        look("stoped")
    with pytest.raises(KeyboardInterrupt):
        run_training(workspace, small_recipe(workspace), "stopped", Watcher(stop_after=2))
    assert look("stopped") == f"nothing to resume in {trainings / 'stopped'} yet: begins at epoch 1"
    with pytest.raises(KeyboardInterrupt):
        run_training(workspace, small_recipe(workspace), "stopped", Watcher(stop_after=STEPS_PER_EPOCH + 1))
    assert look("stopped") is None
    with pytest.raises(UserError, match=refused % ("stoped", r"did you mean 'stopped'\?")):
        look("stoped")
    (workspace.model_zoo / "done").mkdir()
    with pytest.raises(UserError, match="model 'done' exists"):
        look("done")

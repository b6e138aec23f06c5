"""Rounds, accumulated gradients, and the network that a start brings along."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from robench import training
from robench.errors import UserError
from robench.recipe import apply_settings
from robench.training import loop, rounds
from robench.training.snapshot import read_snapshot
from tests.unit.training.problems import (
    STEPS_PER_EPOCH,
    Watcher,
    log_without_seconds,
    make_workspace,
    run_training,
    small_recipe,
)

CPU = torch.device("cpu")


@pytest.fixture
def workspace(tmp_path):
    place = make_workspace(tmp_path)
    plain = {"threat": None, "defense": {"name": "standard"}, "selection": {"metric": "last"}}
    run_training(place, small_recipe(place, **plain, epochs=2, averaging=None), "first")
    return place


def heat_recipe(workspace, **changes):
    values = {
        "threat": None,
        "defense": {"name": "heat_smoothing", "parameters": {"kappa": 2, "distance_on": "logits"}},
        "teacher": "first",
        "rounds": 3,
        "epochs": 2,
        "averaging": None,
        "selection": {"metric": "last"},
        **changes,
    }
    return small_recipe(workspace, **values)


class Spy(Watcher):
    """Also remembers, at every step, who teaches and what the student is."""

    def __init__(self, monkeypatch, stop_after=None):
        super().__init__(stop_after)
        self.teachers, self.students, self.progress, self.rates, self.numbers = [], [], [], [], []
        build = training.build_objective

        def spied(recipe, *, teacher=None, new_network=None):
            objective = build(recipe, teacher=teacher, new_network=new_network)
            heat = objective.base.call
            call = type(heat).__call__

            def watched(model, images, labels, *, random, progress):
                assert not any(m.training for m in heat.teacher.modules())
                assert not any(p.requires_grad for p in heat.teacher.parameters())
                assert all(m.training for m in model.modules())
                self.teachers.append({k: v.clone() for k, v in heat.teacher.state_dict().items()})
                self.students.append({k: v.clone() for k, v in model.state_dict().items()})
                self.progress.append(progress)
                self.numbers.append(random.uniform(torch.empty(len(images))))
                return call(heat, model, images, labels, random=random, progress=progress)

            term = training.objective.Term("heat_smoothing", Passing(heat, watched), {}, frozenset())
            return training.objective.Objective(term)

        monkeypatch.setattr(training, "build_objective", spied)


class Passing:
    """A defense whose calls go another way."""

    def __init__(self, heat, call):
        self.call = call
        self.finish_round, self.state_dict, self.load_state_dict = (
            heat.finish_round,
            heat.state_dict,
            heat.load_state_dict,
        )

    def __call__(self, *arguments, **named):
        return self.call(*arguments, **named)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


PER_ROUND = 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("begin", "architecture"), [("teacher", "digits_cnn"), ("start", "digits_cnn"), ("teacher", "resnet20")]
)
def test_each_round_learns_from_what_the_one_before_made(workspace, monkeypatch, begin, architecture):
    ends = []
    begin_next_round = rounds.begin_next_round

    def watched(state, recipe):
        ends.append({k: v.clone() for k, v in state.model.state_dict().items()})
        begin_next_round(state, recipe)

    monkeypatch.setattr(loop, "begin_next_round", watched)
    spy = Spy(monkeypatch)
    recipe = heat_recipe(workspace, **{"teacher": None, "architecture": {"name": architecture}, begin: "first"})
    run_training(workspace, recipe, watcher=spy)
    first = load_file(workspace.model_zoo / "first" / "model.safetensors")
    assert len(spy.teachers) == 3 * PER_ROUND
    assert equal({k.removeprefix("network."): v for k, v in spy.teachers[0].items()}, first)
    for number in range(3):
        own = spy.teachers[number * PER_ROUND : (number + 1) * PER_ROUND]
        assert all(equal(own[0], teacher) for teacher in own), "it never changes within a round"
        if number:
            assert equal(own[0], ends[number - 1])
            assert not equal(own[0], spy.teachers[0])
    students = [spy.students[number * PER_ROUND] for number in range(3)]
    if begin == "start":
        assert all(equal(s, spy.teachers[n * PER_ROUND]) for n, s in enumerate(students))
    else:
        assert not any(equal(a, b) for a, b in [students[:2], students[1:]]), "other random weights each time"
        expected = rounds.untrained(recipe, num_classes=3, input_shape=(1, 16, 16), completed_rounds=2).state_dict()
        assert equal(students[2], expected)
    assert spy.progress == [step / PER_ROUND for step in range(PER_ROUND)] * 3
    drawn = torch.cat(spy.numbers)
    assert len(drawn.unique()) == len(drawn), "no round repeats another's numbers"
    assert [row["round"] for row in spy.rows] == [1, 1, 2, 2, 3, 3]
    assert [row["epoch"] for row in spy.rows] == [1, 2, 3, 4, 5, 6]
    rates = [row["learning_rate"] for row in spy.rows]
    assert rates == rates[:2] * 3


def test_a_round_hands_on_what_it_selected_and_selects_anew(workspace, monkeypatch):
    answers = iter([(6, 5), (6, 2), (6, 1), (6, 3)])
    measured = []

    def measure(_self, model):
        measured.append({k: v.clone() for k, v in model.state_dict().items()})
        return training.validation.Measurement(*next(answers), None)

    monkeypatch.setattr(training.validation.Examiner, "measure", measure)
    spy = Spy(monkeypatch)
    recipe = heat_recipe(workspace, rounds=2, averaging=0.9, selection={"metric": "clean_accuracy"})
    card = run_training(workspace, recipe, watcher=spy)
    assert equal(spy.teachers[-1], measured[0]), "the averaged weights of the first epoch, which was better"
    assert card.weights.epoch == 4


def test_learning_rate_average_and_optimizer_begin_anew_in_each_round(workspace, monkeypatch):
    rates, steps, fresh = [], [], []
    update, adam = loop.update_average, torch.optim.Adam.step

    def averaging(*arguments, step, **named):
        steps.append(step)
        update(*arguments, step=step, **named)

    def stepping(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        fresh.append(not optimizer.state)
        return adam(optimizer, *arguments)

    monkeypatch.setattr(loop, "update_average", averaging)
    monkeypatch.setattr(torch.optim.Adam, "step", stepping)
    run_training(workspace, heat_recipe(workspace, averaging=0.9))
    assert rates == rates[:PER_ROUND] * 3
    assert len(set(rates)) > 2
    assert steps == list(range(PER_ROUND)) * 3
    assert fresh == ([True] + [False] * (PER_ROUND - 1)) * 3


@pytest.mark.parametrize("begin", ["teacher", "start"])
def test_a_training_stopped_in_any_round_ends_with_the_same_bits(workspace, monkeypatch, begin):
    monkeypatch.setattr(loop, "LOOK_EVERY", 2)
    recipe = heat_recipe(workspace, **{"teacher": None, "averaging": 0.9, begin: "first"})
    run_training(workspace, recipe, "straight")
    for seconds, stops in ((0.0, [3, PER_ROUND - 1, PER_ROUND + 3]), (1e9, [2 * PER_ROUND, 2 * PER_ROUND + 10])):
        monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", seconds)
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                run_training(workspace, recipe, "stopped", Watcher(stop_after=stop), resume=True)
    tensors, facts = read_snapshot(workspace.model_zoo / ".training" / "stopped" / "snapshot.safetensors")
    assert facts["round"] == 2
    assert any(name.startswith("objective/heat_smoothing/") for name in tensors)
    watcher = Watcher()
    run_training(workspace, recipe, "stopped", watcher, resume=True)
    assert watcher.steps[0] > 2 * PER_ROUND
    for file in ("model.safetensors", "scalars.jsonl"):
        assert (workspace.model_zoo / "stopped" / file).read_bytes() == (
            workspace.model_zoo / "straight" / file
        ).read_bytes()
    assert log_without_seconds(workspace, "stopped") == log_without_seconds(workspace, "straight")


def test_rounds_that_nobody_learns_from_are_refused(workspace):
    plain = small_recipe(workspace, rounds=2)
    with pytest.raises(UserError, match=r"pgd_training learns nothing from round to round.*--set rounds=1"):
        run_training(workspace, plain)
    with pytest.raises(UserError, match="rounds = '0'"):
        apply_settings(plain, ["rounds=0"])
    assert apply_settings(heat_recipe(workspace), ["rounds=1", "epochs=1"]).scale == "1 of 3 rounds, 1 of 2 epochs"


def test_the_forecast_counts_all_rounds(workspace):
    run = training.Run(name="x", device=CPU, command="robench train")
    found = training.forecast(heat_recipe(workspace), run, workspace=workspace)
    assert (found.steps_per_epoch, found.steps) == (STEPS_PER_EPOCH, 3 * PER_ROUND)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teacher": None}, "heat_smoothing learns from a registered model; add --set start=MODEL"),
        ({"teacher": "nobody"}, "teacher = nobody: .*--set teacher=MODEL"),
        ({"teacher": "mnist"}, r"teacher = mnist: .*maps \(1, 28, 28\) images to 10 classes.*--set teacher=MODEL"),
        ({"defense": {"name": "heat_smoothing", "parameters": {"sigma": 0}}}, "sigma = 0: .*greater than 0"),
        ({"defense": {"name": "heat_smoothing", "parameters": {"sigma": -1}}}, "sigma = -1: .*greater than 0"),
        ({"rounds": 0}, "rounds = 0: .*greater than or equal to 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(workspace, changes, text):
    recipe = {"dataset": "digits"} if changes.get("teacher") == "mnist" else {}
    with pytest.raises(UserError, match=text) as caught:
        run_training(_with_mnist(workspace), heat_recipe(workspace, **changes, **recipe))
    assert "\n" not in str(caught.value)


def _with_mnist(workspace):
    """Register a model for other images and classes."""
    from robench.checkpoints import build_classifier
    from robench.registry import read_card

    card = read_card(workspace.model_zoo / "first" / "card.json")
    folder = workspace.model_zoo / "mnist"
    if not folder.exists():
        model = build_classifier(card.architecture, num_classes=10, input_shape=(1, 28, 28))
        facts = {key: getattr(card, key) for key in ("architecture", "data_licence", "threat", "provenance")}
        training.save_checkpoint(
            model,
            workspace.model_zoo,
            facts={"id": "mnist", "summary": "s", "dataset": "mnist", **facts},
            selected=training.Weights(state=model.network.state_dict()),
        )
    return workspace


def test_a_recipe_without_a_network_takes_that_of_its_start(workspace):
    normalization = {"mean": [0.4], "std": [0.3]}
    plain = {"threat": None, "defense": {"name": "standard"}, "selection": {"metric": "last"}, "averaging": None}
    network = {"name": "mlp_4x1024"}
    run_training(workspace, small_recipe(workspace, **plain, architecture=network, normalization=normalization), "mlp")
    recipe = heat_recipe(workspace, teacher=None, start="mlp", architecture=None, rounds=1, epochs=1)
    card = run_training(workspace, recipe)
    assert card.architecture.name == card.recipe["architecture"]["name"] == "mlp_4x1024"
    assert card.normalization.model_dump(mode="json") == normalization
    # With the same network and no normalisation the same weights are another function.
    other = heat_recipe(workspace, teacher=None, start="mlp", architecture=network)
    with pytest.raises(UserError, match=r"normalisation; add --set architecture=none --set normalization=none"):
        run_training(workspace, other, "y")
    repaired = apply_settings(other, ["architecture=none", "normalization=none"])
    assert repaired.architecture is None
    training.forecast(repaired, training.Run(name="y", device=CPU, command="x"), workspace=workspace)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architecture": None, "teacher": "first"}, "architecture is missing; only where start names a model"),
        ({"architecture": None, "start": "first", "normalization": {"mean": [0.4], "std": [0.3]}}, "leave both out"),
        ({"accumulate": 9}, "accumulate = 9 makes more parts than batch_size = 8"),
    ],
)
def test_contradicting_recipes_are_refused(workspace, changes, text):
    with pytest.raises(UserError, match=text):
        heat_recipe(workspace, **changes)


def test_a_reference_brings_no_network_along(workspace):
    recipe = heat_recipe(workspace, teacher=None, start="torchvision:resnet18", architecture=None)
    with pytest.raises(UserError, match=r"torchvision:resnet18 has no card.*--set architecture.name=NAME"):
        run_training(workspace, recipe)


@pytest.mark.parametrize("defense", ["standard", "heat_smoothing"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_batch_add_up_to_the_whole(workspace, defense, parts):
    parameters = {"kappa": 2} if defense == "heat_smoothing" else {}
    changes = {
        "defense": {"name": defense, "parameters": parameters},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "rounds": 1,
    }
    found = []
    for accumulate in (1, parts):
        watcher = Watcher()
        recipe = heat_recipe(workspace, **changes, accumulate=accumulate)
        run_training(workspace, recipe, f"a{accumulate}", watcher)
        found.append((load_file(workspace.model_zoo / f"a{accumulate}" / "model.safetensors"), watcher))
    (whole, straight), (summed, watched) = found
    assert len(straight.steps) == len(watched.steps) == PER_ROUND
    for name, value in whole.items():
        torch.testing.assert_close(summed[name], value, rtol=1e-4, atol=1e-6)
    for name, value in straight.rows[-1].items():
        if name != "seconds":
            assert watched.rows[-1][name] == pytest.approx(value, rel=1e-4), name


def test_the_network_sees_no_more_than_a_part_at_once(workspace, monkeypatch):
    sizes = []

    def watching(model, images, labels, *, random, progress):
        sizes.append(len(images))
        return training.objective.LossParts(torch.nn.functional.cross_entropy(model(images), labels))

    term = training.objective.Term("own", watching, {}, frozenset())
    monkeypatch.setattr(training, "build_objective", lambda *_, **__: training.objective.Objective(term))
    run_training(workspace, heat_recipe(workspace, rounds=1, epochs=1, accumulate=3))
    assert len(sizes) == 3 * STEPS_PER_EPOCH
    assert sum(sizes) == 54
    assert set(sizes) == {2, 3}

"""Training: a recipe becomes a registered model. One loop serves every defense.

A run can be killed at any moment: it goes on from its last snapshot (`<registry>/.training/<name>/`), and on a CPU
ends with the same bits as if nothing had happened, because order, augmentation, attacks and dropout are keyed by
(seed, epoch, step, example), not by a generator's history. So several processes could share a training: each would take
a part of every batch of `epoch_order`, and gradients would be summed where `Training` takes the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robench import catalog
from robench.checkpoints import LoadedModel, Weights, build_classifier, load_model, require_free, save_checkpoint
from robench.classifier import Classifier, keep_large_buffers
from robench.datasets import dataset_facts, open_split, select_examples
from robench.errors import UserError, suggestion
from robench.provenance import provenance
from robench.recipe import DESCRIPTIVE, Recipe
from robench.records import Configured, ModelCard
from robench.registry import checked_id, find_card, is_reference
from robench.statistics import proportion
from robench.training.data import Pixels, check_count, steps_per_epoch
from robench.training.loop import Steps, Training
from robench.training.memory import Ledger, growth
from robench.training.objective import build_objective, rehearse
from robench.training.optimization import averaged_copy, build_optimizer
from robench.training.progress import TrainingProgress
from robench.training.rounds import untrained
from robench.training.seeding import seeded
from robench.training.snapshot import Tensors, read_snapshot
from robench.training.state import TrainingState, weights_of
from robench.training.stopwatch import Stopwatch
from robench.training.validation import Examiner
from robench.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a recipe is carried out; with the recipe, what the card records."""

    name: str
    """The model's id."""
    device: torch.device
    precision: str = "fp32"
    """`fp32`, `tf32` or `bf16` (autocast)."""
    resume: bool = False
    """Go on with an interrupted run; begin if it left nothing (:func:`nothing_to_resume`)."""
    restart: bool = False
    """Throw an interrupted run away."""
    replace: bool = False
    """Replace a registered model of that name."""
    command: str


def train(recipe: Recipe, run: Run, *, workspace: Workspace, progress: TrainingProgress) -> ModelCard:
    """Train, register and return the card; the test split is never opened.

    Raises UserError for a name that is taken, an interrupted run that is neither to be resumed nor thrown away, one
    that had another recipe, or a loss that is no longer finite; MissingData; StorageError.
    """
    recipe = _with_its_network(recipe, workspace)
    registry = workspace.model_zoo
    require_free(registry / checked_id(run.name), replace=run.replace)
    folder = registry / ".training" / run.name
    earlier = _interrupted_run(folder, recipe, run)
    keep_large_buffers()
    state = _initial_state(recipe, run, workspace)
    if earlier is not None:
        state.restore(*earlier)
    training = Training(
        recipe=recipe,
        precision=run.precision,
        pixels=Pixels(open_split(recipe.dataset, "train", workspace), run.device, count=recipe.train_examples),
        examiner=_examiner(recipe, run, workspace),
        folder=folder,
        progress=progress,
    )
    training.run(state)
    with state.result() as model:
        card = _register(recipe, run, state, model, workspace=workspace, folder=folder)
    shutil.rmtree(folder, ignore_errors=True)
    return card


@dataclass(frozen=True)
class Effort:
    """How long a training would take."""

    steps: int
    steps_per_epoch: int
    examples: int
    passes: int
    """Forward and backward passes per example and step, as the defense and its regularizers state them."""
    seconds: float
    """Of all steps, by how long one pass takes on this device; validation comes on top."""
    batch: int
    """Images of one pass: of a batch, or of the part of it that `accumulate` leaves."""


@dataclass(frozen=True)
class Forecast(Effort):
    """How long a training would take, and how much memory."""

    bytes_per_image: int
    """What a step holds at once for each image of a pass."""
    bytes_besides: int
    """Weights, their gradients, the optimiser's state and whatever else does not grow with the batch."""

    @property
    def bytes(self) -> int:
        """Return what a step holds at once."""
        return self.bytes_besides + self.batch * self.bytes_per_image


def forecast(recipe: Recipe, run: Run, *, workspace: Workspace) -> Forecast:
    """Check everything that a training checks before its first step, try a pass and a small step, and write nothing."""
    effort = forecast_effort(recipe, run, workspace=workspace, stopwatch=Stopwatch(run.device, run.precision))
    recipe = _with_its_network(recipe, workspace)
    per_image, besides = _bytes_of_a_step(recipe, run, workspace, effort.batch)
    return Forecast(**asdict(effort), bytes_per_image=per_image, bytes_besides=besides)


def forecast_effort(recipe: Recipe, run: Run, *, workspace: Workspace, stopwatch: Stopwatch) -> Effort:
    """Check everything that a training checks before its first step, try a pass unless the stopwatch knows it, and
    write nothing.
    """
    recipe = _with_its_network(recipe, workspace)
    assert recipe.architecture is not None, "it was taken from the model that start names"
    require_free(workspace.model_zoo / checked_id(run.name), replace=run.replace)
    available = len(open_split(recipe.dataset, "train", workspace))
    check_count(recipe.train_examples, available)
    examples = recipe.train_examples or available
    keep_large_buffers()
    state = _initial_state(recipe, run, workspace)
    per_epoch = steps_per_epoch(examples, recipe.batch_size)
    chosen = (recipe.defense, *recipe.regularizers)
    passes = sum(
        catalog.find("defenses", c.name).training_passes(c.parameters, classes=state.model.num_classes) for c in chosen
    )
    batch = -(-examples // (per_epoch * recipe.accumulate))
    steps = recipe.total_epochs * per_epoch
    of_a_pass = stopwatch.of_batch(recipe.architecture, state.model, batch)
    return Effort(steps, per_epoch, examples, passes, steps * recipe.accumulate * passes * of_a_pass, batch)


def _bytes_of_a_step(recipe: Recipe, run: Run, workspace: Workspace, batch: int) -> tuple[int, int]:
    """Return what a step on a batch holds for each image, and besides, by first steps on two images and on three."""
    histories = []
    pixels = Pixels(open_split(recipe.dataset, "train", workspace), run.device)
    for count in (2, 3):
        with Ledger(run.device) as ledger:
            state = _initial_state(recipe, run, workspace)
            state.model.train()
            begun = len(ledger.history)
            steps = Steps(recipe=recipe.model_copy(update={"accumulate": 1}), precision=run.precision, pixels=pixels)
            ((ids, raw),) = pixels.batches([torch.arange(count)])
            steps.take_step(state, ids, raw, total_step=0)
        # What the optimiser remembers came at the end of this step, and is there all through every other.
        remembered = (value for values in state.optimizer.state.values() for value in values.values())
        more = sum(value.nbytes for value in remembered if isinstance(value, Tensor))
        histories.append([live + more for live in ledger.history[begun:]])
        del state
    return growth(*histories, batch=batch)


def nothing_to_resume(run: Run, workspace: Workspace) -> str | None:
    """Return a line if the interrupted run that is asked for left nothing to go on from, so that it begins again.

    Raises UserError where there is no interrupted run of that name: a misspelt one would begin, too.
    """
    require_free(workspace.model_zoo / checked_id(run.name), replace=run.replace)
    trainings = workspace.model_zoo / ".training"
    folder = trainings / run.name
    if not folder.is_dir():
        begun = [path.name for path in trainings.glob("*") if path.is_dir()]
        raise UserError(
            f"nothing to resume: {trainings} has no {run.name!r} ({suggestion(run.name, begun)}); "
            "leave --resume out to begin at epoch 1"
        )
    return None if _snapshot(folder).exists() else f"nothing to resume in {folder} yet: begins at epoch 1"


def _snapshot(folder: Path) -> Path:
    return folder / "snapshot.safetensors"


def _interrupted_run(folder: Path, recipe: Recipe, run: Run) -> tuple[Tensors, Mapping[str, Any]] | None:
    """Return the snapshot to go on from, if there is one and it was asked for."""
    snapshot = _snapshot(folder)
    if run.restart:
        shutil.rmtree(folder, ignore_errors=True)
    if not snapshot.exists():
        return None
    if not run.resume:
        raise UserError(
            f"an interrupted training of {run.name!r} is in {folder}; add --resume to go on with it, "
            "or --restart to throw it away"
        )
    tensors, facts = read_snapshot(snapshot)
    now = {"precision": run.precision, **_flat(recipe.model_dump(mode="json"))}
    then = {"precision": facts["precision"], **_flat(facts["recipe"])}
    for key in sorted((now.keys() | then.keys()) - DESCRIPTIVE):
        if now.get(key) != then.get(key):
            raise UserError(
                f"the interrupted training of {run.name!r} had {key} = {then.get(key)}, not {now.get(key)}; "
                "resume it with the same recipe, or add --restart"
            )
    return tensors, facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _with_its_network(recipe: Recipe, workspace: Workspace) -> Recipe:
    """Return the recipe with its architecture: where it leaves it out, that of the model that `start` names."""
    if recipe.architecture is not None or recipe.start is None:
        return recipe
    if is_reference(recipe.start):
        raise UserError(
            f"start = {recipe.start} has no card that says what network it is; add --set architecture.name=NAME"
        )
    with _naming("start", recipe.start):
        _, card = find_card(recipe.start, workspace)
    return recipe.model_copy(update={"architecture": card.architecture, "normalization": card.normalization})


@contextmanager
def _naming(key: str, model: str) -> Iterator[None]:
    """Say which setting named the model that is wrong."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key} = {model}: {error}; name another with --set {key}=MODEL") from None


def _initial_state(recipe: Recipe, run: Run, workspace: Workspace) -> TrainingState:
    facts = dataset_facts(recipe.dataset, workspace)
    if recipe.normalization and (problem := recipe.normalization.problem(channels=facts.image_shape[0])):
        raise UserError(f"normalization.{problem}")
    named = {key: _named(recipe, key, workspace) for key in ("start", "teacher") if getattr(recipe, key)}
    model = untrained(recipe, num_classes=len(facts.classes), input_shape=facts.image_shape)
    if "start" in named:
        _begin_with(model, named["start"].model, recipe)
    model.to(run.device).to(memory_format=torch.channels_last)
    shown = named.get("teacher", named.get("start"))
    teacher = None
    if shown is not None:
        teacher = shown.model.to(run.device).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    with seeded(run.device, recipe.seed, "rehearsal"):
        rehearse(
            recipe,
            teacher=teacher,
            num_classes=len(facts.classes),
            input_shape=facts.image_shape,
            device=run.device,
        )
    with seeded(run.device, recipe.seed, "objective"):
        objective = build_objective(recipe, teacher=teacher, new_network=partial(_new_network, recipe, model))
    objective.check(model)
    return TrainingState(
        learned_from={key: found.identity.weights_sha256 for key, found in named.items()},
        model=model,
        average=averaged_copy(model) if recipe.averaging is not None else None,
        optimizer=build_optimizer(recipe.optimizer, model, *objective.companions(), seed=recipe.seed),
        objective=objective,
    )


def _new_network(recipe: Recipe, model: Classifier, architecture: str) -> Classifier:
    """Return an untrained network for the data of `model`, where that one is."""
    fresh = build_classifier(
        Configured(name=architecture),
        num_classes=model.num_classes,
        input_shape=model.input_shape,
        normalization=recipe.normalization,
    )
    return fresh.to(model.device).to(memory_format=torch.channels_last)


def _named(recipe: Recipe, key: str, workspace: Workspace) -> LoadedModel:
    """Return the registered model that the recipe names as `start` or `teacher`, which must fit its data."""
    facts, name = dataset_facts(recipe.dataset, workspace), getattr(recipe, key)
    with _naming(key, name):
        return load_model(name, workspace, input_shape=facts.image_shape, num_classes=len(facts.classes))


def _begin_with(model: Classifier, start: Classifier, recipe: Recipe) -> None:
    """Copy the weights of `start`; raise UserError where they are another network's."""
    assert recipe.architecture is not None
    # Weights files do not have the normalisation: with another one, the same weights are another model.
    fits = model.normalization == start.normalization
    with suppress(RuntimeError):
        model.load_state_dict(start.state_dict())
        if fits:
            return
    raise UserError(
        f"start {recipe.start} is no {recipe.architecture.name} with the recipe's parameters and normalisation; "
        "add --set architecture=none --set normalization=none to take them from its card"
    )


def _examiner(recipe: Recipe, run: Run, workspace: Workspace) -> Examiner:
    validation = open_split(recipe.dataset, "validation", workspace)
    selection = recipe.selection
    _, ids = select_examples(validation, dataset=recipe.dataset, split="validation", count=selection.examples)
    return Examiner(
        pixels=Pixels(validation, run.device),
        ids=torch.from_numpy(ids),
        attack=selection.attack,
        threat=selection.threat or recipe.threat,
        seed=recipe.seed,
    )


def _register(
    recipe: Recipe, run: Run, state: TrainingState, model: Classifier, *, workspace: Workspace, folder: Path
) -> ModelCard:
    facts = dataset_facts(recipe.dataset, workspace)
    best = state.best
    assert best is not None, "the last epoch is always measured"
    final = {k.removeprefix("validation_"): v for k, v in state.rows[-1].items() if k.startswith("validation_")}
    last = Weights(state=_network(weights_of(model)), epoch=state.epoch, validation=final)
    learned = state.objective.state()
    return save_checkpoint(
        model,
        workspace.model_zoo,
        facts={
            "id": run.name,
            "summary": recipe.summary,
            "architecture": recipe.architecture,
            "dataset": facts.name,
            "data_licence": facts.licence,
            "threat": recipe.threat,
            # The recorded name of the data: a path of this machine says nothing elsewhere.
            "recipe": recipe.model_copy(update={"dataset": facts.name}).model_dump(mode="json"),
            "scale": recipe.scale,
            "learned_from": state.learned_from,
            "clean_accuracy": proportion(best.counts["clean"], best.counts["examples"]),
            "clean_accuracy_split": "validation",
            "clean_accuracy_data": open_split(recipe.dataset, "validation", workspace).sha256,
            "training_seconds": round(state.seconds, 1),
            "provenance": provenance(run.device, run.command),
        },
        selected=Weights(state=_network(best.weights), epoch=best.epoch, validation=best.validation),
        last=None if best.epoch == state.epoch else last,
        defense=Weights(state=learned, epoch=state.epoch) if learned else None,
        extra_files={name: (folder / name).read_bytes() for name in ("training.csv", "scalars.jsonl")},
        replace=run.replace,
    )


def _network(weights: Tensors) -> Tensors:
    """Return a classifier's weights by the names that its network alone has."""
    return {name.removeprefix("network."): value for name, value in weights.items()}

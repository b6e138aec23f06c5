"""The one loop that trains every defense."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robench.classifier import tensor_float32
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import Recipe
from robench.training.augmentation import augmented
from robench.training.data import Pixels, as_floats, epoch_order, steps_per_epoch
from robench.training.log import ScalarsFile, write_log
from robench.training.optimization import update_average
from robench.training.progress import TrainingProgress
from robench.training.rounds import begin_next_round
from robench.training.schedules import learning_rate
from robench.training.seeding import seeded
from robench.training.snapshot import write_snapshot
from robench.training.state import Chosen, TrainingState, weights_of
from robench.training.validation import Examiner

#: At least so many seconds lie between two snapshots inside an epoch.
SNAPSHOT_SECONDS = 30.0
#: On an accelerator looking at the loss makes the host wait, so it is done at intervals of steps.
LOOK_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What stays the same from step to step."""

    recipe: Recipe
    precision: str
    pixels: Pixels
    """Of the train split."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps of each epoch."""
        return steps_per_epoch(len(self.pixels), self.recipe.batch_size)

    def take_step(self, state: TrainingState, ids: Tensor, raw: Tensor, total_step: int) -> Mapping[str, Tensor]:
        """Take one step on the examples `ids` and return the batch's loss and its parts, detached."""
        recipe, device = self.recipe, self.pixels.device
        round_step = total_step - state.round * recipe.epochs * self.steps_per_epoch
        rate = learning_rate(recipe, round_step, self.steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        random = RandomStream(recipe.seed, ids, ("training", state.epoch, "augmentation"))
        images = as_floats(augmented(raw, recipe.augmentation, random))
        if device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        half = self.precision == "bf16"
        sums: dict[str, Tensor] = {}
        with seeded(device, recipe.seed, "step", total_step), tensor_float32(allowed=self.precision == "tf32"):
            state.optimizer.zero_grad()
            parts = min(recipe.accumulate, len(ids))
            for some, seen in zip(ids.tensor_split(parts), images.tensor_split(parts), strict=True):
                with torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext():
                    loss = state.objective(
                        state.model,
                        seen,
                        self.pixels.labels[some],
                        random=RandomStream(recipe.seed, some, ("training", state.epoch, "defense")),
                        progress=round_step / (recipe.epochs * self.steps_per_epoch),
                        learning_rate=rate / recipe.optimizer.lr,
                    )
                (loss.total * (len(some) / len(ids))).backward()
                _add(sums, {"loss": loss.total.detach(), **loss.parts}, count=len(some))
            state.optimizer.step()
        if state.average is not None and recipe.averaging is not None:
            update_average(state.average, state.model, decay=recipe.averaging, step=round_step)
        _add(state.sums, sums)
        return {name: value / len(ids) for name, value in sums.items()}


@dataclass(frozen=True, kw_only=True)
class Training(Steps):
    """What stays the same throughout one training."""

    examiner: Examiner
    folder: Path
    """Where snapshots and logs are written."""
    progress: TrainingProgress

    @property
    def snapshot(self) -> Path:
        """Return the snapshot's file."""
        return self.folder / "snapshot.safetensors"

    def run(self, state: TrainingState) -> None:
        """Go on from `state` to the end of the last epoch; raise UserError where the loss stops being finite."""
        clock = _Clock(state)
        state.model.train()
        with ScalarsFile(self.folder / "scalars.jsonl", state.scalars) as scalars:
            while state.epoch < self.recipe.total_epochs:
                self._epoch(state, clock, scalars)
                self._finish_epoch(state, clock)
                if state.epoch % self.recipe.epochs == 0 and state.epoch < self.recipe.total_epochs:
                    begin_next_round(state, self.recipe)
                self._save(state, clock, scalars)

    def _epoch(self, state: TrainingState, clock: _Clock, scalars: ScalarsFile) -> None:
        """Take the steps that the running epoch still has."""
        recipe = self.recipe
        order = epoch_order(len(self.pixels), recipe.batch_size, seed=recipe.seed, epoch=state.epoch)
        for ids, raw in self.pixels.batches(order[state.step :]):
            total_step = state.epoch * self.steps_per_epoch + state.step
            losses = self.take_step(state, ids, raw, total_step)
            state.step += 1
            watched = state.step % LOOK_EVERY == 0 or self.pixels.device.type == "cpu"
            if watched and not bool(losses["loss"].isfinite()):
                self._diverged(state)
            if state.step % LOOK_EVERY == 0:
                scalars.append(total_step + 1, {name: value.item() for name, value in losses.items()})
            if clock.since_snapshot() >= SNAPSHOT_SECONDS:
                self._save(state, clock, scalars)
            self.progress.on_step(
                step=total_step + 1,
                total_steps=recipe.total_epochs * self.steps_per_epoch,
                epoch=state.epoch + 1,
                epochs=recipe.total_epochs,
            )

    def _finish_epoch(self, state: TrainingState, clock: _Clock) -> None:
        """Close the epoch: log row, measurement on the validation split, choice of the best weights."""
        recipe = self.recipe
        if not _all_finite(state):
            self._diverged(state)
        epoch = state.epoch + 1 - state.round * recipe.epochs
        row = {"epoch": state.epoch + 1.0, **({"round": state.round + 1.0} if recipe.rounds > 1 else {})}
        row["learning_rate"] = learning_rate(recipe, epoch * self.steps_per_epoch - 1, self.steps_per_epoch)
        row |= {f"train_{name}": value.item() / len(self.pixels) for name, value in state.sums.items()}
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        if epoch % recipe.selection.every == 0 or epoch == recipe.epochs:
            with state.result() as model:
                with tensor_float32(allowed=False):
                    measured = self.examiner.measure(model)
                metric, best = recipe.selection.metric, state.best
                # Of equally good epochs the later one: it has seen more and its learning rate is mostly lower.
                if metric == "last" or best is None or measured.accuracies[metric] >= best.validation[metric]:
                    state.best = Chosen(state.epoch, measured.accuracies, measured.counts, weights_of(model))
            row |= {f"validation_{name}": value for name, value in measured.accuracies.items()}
        row["seconds"] = clock.seconds()
        state.rows.append(row)
        write_log(self.folder / "training.csv", state.rows)
        self.progress.on_epoch(row)

    def _save(self, state: TrainingState, clock: _Clock, scalars: ScalarsFile) -> None:
        if not _all_finite(state):
            self._diverged(state)
        state.scalars, state.seconds = scalars.flushed(), clock.seconds()
        facts = {"recipe": self.recipe.model_dump(mode="json"), "precision": self.precision, **state.facts()}
        write_snapshot(self.snapshot, state.tensors(), facts)
        clock.snapshot_taken()

    def _diverged(self, state: TrainingState) -> None:
        kept = f"; the last good checkpoint is kept in {self.folder}" if self.snapshot.exists() else ""
        place = f"epoch {state.epoch + 1}, step {state.step} of {self.steps_per_epoch}"
        raise UserError(
            f"training is no longer finite at {place}{kept}; "
            f"try a lower learning rate: --restart --set optimizer.lr={self.recipe.optimizer.lr / 10:g}"
        )


class _Clock:
    """Training time, summed over resumed runs, and the time since the last snapshot."""

    def __init__(self, state: TrainingState) -> None:
        self.before, self.started = state.seconds, time.monotonic()
        self.snapshot = self.started

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def since_snapshot(self) -> float:
        return time.monotonic() - self.snapshot

    def snapshot_taken(self) -> None:
        self.snapshot = time.monotonic()


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], *, count: int = 1) -> None:
    """Add `count` times the values to the sums, in float64."""
    for name, value in values.items():
        weighted = value.to(torch.float64) * count
        sums[name] = sums[name] + weighted if name in sums else weighted


def _all_finite(state: TrainingState) -> bool:
    """Return whether the loss of every step since the epoch began, and every weight, is finite."""
    values = [*state.sums.values(), *state.model.parameters()]
    return bool(torch.stack([v.detach().isfinite().all() for v in values]).all())

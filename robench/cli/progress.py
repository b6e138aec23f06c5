"""Progress bars: drawn on standard error where it is a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robench.confidence_sequences import draws_needed
from robench.findings import probe_work, unexamined
from robench.records import EvalRecord, EvalSpec
from robench.reporting.formatting import duration

#: Seconds between lines where no bar can be drawn.
_INTERVAL = 15.0


class Bars:
    """One bar per piece of work; a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Draw nothing if `quiet`."""
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.drawn = self.console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._said: dict[TaskID, float] = {}

    def __enter__(self) -> Bars:
        if self.drawn:
            self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self.drawn:
            self._progress.stop()

    def add(self, description: str, total: float) -> TaskID:
        """Begin a piece of work."""
        task = self._progress.add_task(description, total=total, note="")
        self._said[task] = time.monotonic()
        return task

    def update(self, task: TaskID, completed: float, note: str = "", *, total: float | None = None) -> None:
        """Say how much of it is done, and how much there is if that has changed."""
        self._progress.update(task, completed=completed, total=total, note=note)
        if self.drawn or self.quiet or time.monotonic() - self._said[task] < _INTERVAL:
            return
        self._said[task] = time.monotonic()
        state = self._progress.tasks[self._progress.task_ids.index(task)]
        print(f"{state.description}: {completed:,.0f}/{state.total:,.0f} {note}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Leave a line above the bars."""
        if not self.quiet:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def finish(self, task: TaskID, line: str) -> None:
        """End a piece of work and leave a line that says what came out."""
        self._progress.remove_task(task)
        self.say(line)


class Outlook:
    """How long a command still takes, going by how long it took so far.

    Questions are weighed by the passes that they take at most. Examples that fall early make all questions shorter
    alike, more or less; so this is a guess that becomes better.
    """

    def __init__(
        self,
        work: Iterable[tuple[EvalSpec, float]] = (),
        announcement: str = "",
        *,
        probes: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the questions that are to be computed, each with the passes that an example takes at most.

        The announcement is a line for the moment when the first of them begins. `probes` are the passes of the
        diagnostics' own attacks, by the key of the questions that share them.
        """
        listed = list(work)
        self._passes = {spec.identity: passes for spec, passes in listed}
        self._rest = {spec.identity: passes * spec.examples.count for spec, passes in listed}
        self._probes = dict(probes or {})
        self.announcement = announcement
        self._clock, self._done = clock, 0.0
        self._begun: float | None = None

    def expect(self, spec: EvalSpec, examples: int) -> None:
        """Say how many examples of a question are still to be answered; until then it is all of them."""
        self._begun = self._clock() if self._begun is None else self._begun
        self._rest[spec.identity] = self._passes.get(spec.identity, 1.0) * examples

    def answered(self, spec: EvalSpec, examples: int) -> None:
        """Count examples that were just answered."""
        self._done += self._passes.get(spec.identity, 1.0) * examples

    def examined(self, spec: EvalSpec, *, now: bool) -> None:
        """Say that a question's diagnostics are made; `now` if the probes ran for it."""
        passes = self._probes.pop(probe_work(spec)[0], 0.0)
        self._done += passes if now else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Return how long everything still takes; None before anything was answered."""
        if self._begun is None or not self._done:
            return None
        passes = sum(self._rest.values()) + sum(self._probes.values())
        return passes * (self._clock() - self._begun) / self._done


class EvaluationBar:
    """Shows a campaign's questions one after another (:class:`robench.evaluation.campaign.Progress`)."""

    def __init__(self, bars: Bars, outlook: Outlook | None = None) -> None:
        """Draw on `bars`; `outlook` is of the whole command."""
        self.bars, self.outlook = bars, outlook or Outlook()
        self.tasks: dict[str, TaskID] = {}
        """By question: with a deadline bars wait for the diagnostics while other questions are answered."""
        self.done: dict[str, int] = {}
        self.probed: set[str] = set()
        self.fresh = self.robust = 0

    def begin(self, spec: EvalSpec, *, done: int) -> None:
        """Start a bar; examples of an interrupted run are done already."""
        self.done[spec.identity], self.fresh, self.robust = done, 0, 0
        if self.outlook.announcement:
            self.bars.say(self.outlook.announcement)
            self.outlook.announcement = ""
        task = self.bars.add(f"{spec.model.id} {spec.attack.title} {spec.threat}", spec.examples.count)
        self.tasks[spec.identity] = task
        self.outlook.expect(spec, spec.examples.count - done)
        self.bars.update(task, done)

    def advance(self, spec: EvalSpec, *, examples: int, robust: int) -> None:
        """Move the bar; the note is the robust accuracy of what this run has answered so far, and the time left."""
        self.fresh, self.robust = self.fresh + examples, self.robust + robust
        done = self.done[spec.identity] = self.done[spec.identity] + examples
        share, total = self.robust / self.fresh, spec.examples.count
        if spec.until is not None:
            total = max(done, draws_needed(share, spec.examples.count, width=spec.until))
        self.outlook.answered(spec, examples)
        self.outlook.expect(spec, total - done)
        left = self.outlook.seconds_left
        note = f"robust {100 * share:.1f} %" + (f", {duration(left)} left" if left is not None else "")
        self.bars.update(self.tasks[spec.identity], done, note, total=total)

    def probe(self, spec: EvalSpec, *, examples: int) -> None:
        """Say why the bar stands still at its end."""
        self.probed.add(spec.identity)
        self.bars.update(self.tasks[spec.identity], self.done[spec.identity], f"diagnostics on {examples} examples")

    def end(self, record: EvalRecord, path: Path, *, known: bool) -> None:  # noqa: ARG002  the protocol's
        """Leave a line with the result."""
        spec = record.spec
        line = (
            f"{spec.model.id} {spec.attack.title} {spec.threat}: clean {100 * record.clean.value:.2f} %, "
            f"robust {100 * record.robust.value:.2f} % of {record.robust.n:,}"
        )
        if record.status == "partial":
            line += f" (of {spec.examples.count:,}; time is up)"
        line += f" ({'known' if known else f'{record.cost.seconds:.1f} s'})"
        if not known and (reason := unexamined(record.diagnostics)):
            line += f"; diagnostics {reason}"
        self.outlook.expect(spec, 0)
        if not known and record.status == "complete":
            self.outlook.examined(spec, now=spec.identity in self.probed)
        self._finish(spec, line)

    def abandon(self, spec: EvalSpec) -> None:
        """Leave a line that says that there is no result."""
        self._finish(spec, f"{spec.model.id} {spec.attack.title} {spec.threat}: no image was answered; time is up")

    def _finish(self, spec: EvalSpec, line: str) -> None:
        if spec.identity in self.tasks:
            self.bars.finish(self.tasks.pop(spec.identity), line)
        else:
            self.bars.say(line)


class TrainingBar:
    """Shows a training's steps and a line per epoch (:class:`robench.training.progress.TrainingProgress`)."""

    def __init__(self, bars: Bars) -> None:
        """Draw on `bars`."""
        self.bars = bars
        self.task: TaskID | None = None

    def on_step(self, *, step: int, total_steps: int, epoch: int, epochs: int) -> None:
        """Move the bar."""
        if self.task is None:
            self.task = self.bars.add("training", total_steps)
        self.bars.update(self.task, step, f"epoch {epoch} of {epochs}")

    def on_epoch(self, row: Mapping[str, float]) -> None:
        """Leave a line with what the epoch gave."""
        shown = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items() if name != "epoch"]
        self.bars.say(f"epoch {row['epoch']:.0f}: {', '.join(shown)}")

"""`--dry-run` of a table: what is there already, and what the rest would cost at most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from robench.cli import answering, transferring
from robench.cli.options import print_table, resolve_device
from robench.cli.posing import Doing, Posed, pose, pose_transfers
from robench.errors import RobenchError
from robench.papers.definitions import ScaleName, load_table
from robench.papers.work import (
    Making,
    Passes,
    askings,
    datasets_of,
    evaluation_passes,
    makings,
    movings,
    question_passes,
    training_passes,
    transfer_passes,
)
from robench.recipe import Recipe
from robench.records import Configured, ModelCard
from robench.registry import cards
from robench.reporting.formatting import duration
from robench.store import Store, StoredCard

if TYPE_CHECKING:
    from robench.cli.progress import Bars

#: Images in the batch that evaluations are timed with where no training of the network is: on a CPU it hardly matters.
_BATCH = 128


@dataclass
class Tally:
    """What a table asks of a model: how much of it is answered, and what the rest takes at most."""

    answered: int = 0
    rest: list[Passes | None] = field(default_factory=list)
    """None where the size of the data is not known."""
    problem: RobenchError | None = None
    """Why what is asked cannot be looked at."""

    @property
    def asked(self) -> int:
        """Return the number of questions."""
        return self.answered + len(self.rest)

    @property
    def passes(self) -> Passes | None:
        """Return what the rest takes at most; None where it is not known of all of it."""
        known = [passes for passes in self.rest if passes is not None]
        if len(known) < len(self.rest):
            return None
        return Passes(sum(p.gradient for p in known), sum(p.forward for p in known))

    def seconds(self, of_image: float) -> float | None:
        """Return what the rest takes at most, by what a pass of an image takes; None where it is not known.

        Logits alone cost about a third of what they and a gradient cost.
        """
        return None if self.passes is None else (self.passes.gradient + self.passes.forward / 3) * of_image

    def count(self, passes: Passes, *, answered: bool) -> None:
        """Count a question."""
        if answered:
            self.answered += 1
        else:
            self.rest.append(passes)


def costs(table: str, scale: ScaleName, doing: Doing) -> list[dict[str, Any]]:
    """Return what each model of a table would still cost: its training, and at most its evaluation."""
    from robench.cli.progress import Bars

    known = cards(doing.workspace)
    tallies, planned = _tallies(table, scale, known, doing), makings(table, scale)
    absent = {m.model: m.recipe for m in planned if m.model not in known and m.recipe is not None}
    rows = []
    with Bars(quiet=doing.quiet) as bars:
        timing, task = _Timing(doing, bars), bars.add("models", len(planned))
        for position, making in enumerate(planned):
            bars.update(task, position, making.model)
            tally = tallies.get(making.model, Tally())
            passes = tally.passes
            row: dict[str, Any] = {
                "model": making.model,
                "status": making.problem or ("trained" if making.model in known else "to train"),
                "training seconds": None,
                "questions": tally.asked,
                "answered": tally.answered,
                "evaluation passes at most": passes and passes.gradient + passes.forward,
                "evaluation seconds at most": None,
            }
            if making.model in known:
                row |= _of_trained(known[making.model].card, tally, timing)
            elif making.recipe is not None:
                row |= _of_untrained(making, making.recipe, absent, tally, timing)
            rows.append(row)
        bars.update(task, len(planned))
    return rows


def _tallies(table: str, scale: ScaleName, known: Mapping[str, StoredCard], doing: Doing) -> dict[str, Tally]:
    """Return what is asked of each model. Of one that is not trained nothing is answered."""
    found, datasets, store = load_table(table), datasets_of(table, scale), Store(doing.workspace.reports)
    whole = evaluation_passes(table, scale)
    tallies = defaultdict(Tally, {model: Tally(rest=passes) for model, passes in whole.items() if model not in known})
    for asking in askings(table, scale):
        if asking.model in known:
            count = found.examples_at(scale, datasets.get(asking.model, ""))
            try:
                _count_questions(pose(asking, count, doing), store, tallies[asking.model])
            except RobenchError as error:
                tallies[asking.model].problem = error
    for moving in movings(table, scale):
        # Nobody makes images for a model that cannot be made.
        pairs = [pair for pair in moving.pairs if all(name in known or name in datasets for name in pair)]
        if present := [name for name in dict.fromkeys(n for pair in pairs for n in pair) if name in known]:
            count = found.examples_at(scale, datasets.get(present[0], ""))
            try:
                _count_transfers(pairs, pose_transfers(moving, present, count, doing).jobs, store, tallies)
            except RobenchError as error:
                for name in present:
                    tallies[name].problem = error
    return {
        model: tally if tally.problem is None else Tally(rest=whole.get(model, []), problem=tally.problem)
        for model, tally in tallies.items()
    }


def _count_questions(posed: Posed, store: Store, tally: Tally) -> None:
    classes = len(posed.job.images.classes)
    for spec in posed.job.specs:
        tally.count(question_passes(spec, classes=classes), answered=answering.is_answered(spec, store))
    for certificate in posed.certificates:
        known = store.find_certificate(certificate) is not None
        tally.count(question_passes(certificate, classes=classes), answered=known)


def _count_transfers(
    pairs: Sequence[tuple[str, str]], jobs: Mapping[str, answering.Job], store: Store, tallies: Mapping[str, Tally]
) -> None:
    """Count the images that the models that are there make, and the looks that they take at others' images."""
    wanted = set()
    for target, source in pairs:
        entries = transferring.questions(jobs, [(target, source)]) if {target, source} <= jobs.keys() else []
        answered = bool(entries) and all(transferring.is_answered(entry, store) for entry in entries)
        if not answered:
            wanted.add(source)
        if target in jobs:
            tallies[target].count(transfer_passes(jobs[target].examples.count), answered=answered)
    for source in dict.fromkeys(source for _, source in pairs if source in jobs):
        for spec in jobs[source].specs:
            # Images are made for others to look at: where all have looked, nobody misses them.
            made = source not in wanted or answering.is_answered(spec, store, transferring.MAKING)
            tallies[source].count(question_passes(spec, classes=len(jobs[source].images.classes)), answered=made)


class _Timing:
    """Times the networks of a table, and says which."""

    def __init__(self, doing: Doing, bars: Bars) -> None:
        from robench.training.stopwatch import Stopwatch

        self.doing, self.bars, self.model = doing, bars, ""
        self.device = resolve_device(doing.device)
        self.stopwatch = Stopwatch(self.device, doing.precision, announce=self._announce)

    def _announce(self, architecture: Configured, count: int) -> None:
        self.bars.say(f"timing {architecture.name} in batches of {count} for {self.model}")

    def of_image(self, card: ModelCard) -> float:
        """Return the seconds that a pass of an image through a model that is there takes."""
        from robench.checkpoints import build_classifier

        self.model = card.id
        model = build_classifier(
            card.architecture,
            num_classes=card.num_classes,
            input_shape=card.input_shape,
            normalization=card.normalization,
        )
        return self.stopwatch.of_image(card.architecture, model, _BATCH)

    def of_training(self, recipe: Recipe, model: str) -> tuple[float, float]:
        """Return the seconds that a training takes, and those of a pass of an image through its network."""
        from robench.training import Run, forecast_effort

        self.model = model
        run = Run(name=model, device=self.device, precision=self.doing.precision, command="")
        found = forecast_effort(recipe, run, workspace=self.doing.workspace, stopwatch=self.stopwatch)
        return found.seconds, found.seconds / (found.passes * found.examples * recipe.total_epochs)


def _of_trained(card: ModelCard, tally: Tally, timing: _Timing) -> dict[str, Any]:
    """Return what a model that is there costs; its network is timed only if something is still to be answered."""
    try:
        if tally.problem is not None:
            raise tally.problem
        seconds = tally.seconds(timing.of_image(card)) if tally.rest else 0.0
    except RobenchError as error:
        return {"status": f"trained ({error})", "training seconds": 0.0}
    return {"training seconds": 0.0, "evaluation seconds at most": seconds}


def _of_untrained(
    making: Making, recipe: Recipe, absent: Mapping[str, Recipe], tally: Tally, timing: _Timing
) -> dict[str, Any]:
    """Return what a model costs that is to be trained, by a pass of its network."""
    status, timed = "to train", recipe
    if first := [name for name in (recipe.start, recipe.teacher) if name is not None and name in absent]:
        status += f" after {' and '.join(first)}"
        timed = _standing_alone(recipe, absent[first[0]])
    training: float | None
    try:
        training, of_image = timing.of_training(timed, making.model)
    except RobenchError as error:
        return {"status": f"to train ({error})"}
    if timed is not recipe:
        passes = training_passes(recipe)
        training = passes.gradient * of_image if passes else None
    return {"status": status, "training seconds": training, "evaluation seconds at most": tally.seconds(of_image)}


def _standing_alone(recipe: Recipe, other: Recipe) -> Recipe:
    """Return standard training of the recipe's network, or of the other's from which it starts: it needs no model."""
    network = recipe if recipe.architecture else other
    return recipe.model_copy(
        update={
            "architecture": network.architecture,
            "normalization": network.normalization,
            "defense": Configured(name="standard"),
            "regularizers": (),
            "rounds": 1,
            "start": None,
            "teacher": None,
        }
    )


def print_costs(table: str, scale: ScaleName, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a plan and its sum."""
    cells = [
        [
            row["model"],
            row["status"],
            _time(row["training seconds"]),
            f"{row['answered']} of {row['questions']}" if row["questions"] else "-",
            "-" if row["evaluation passes at most"] is None else f"{row['evaluation passes at most']:,}",
            _time(row["evaluation seconds at most"]),
        ]
        for row in rows
    ]
    columns = ["model", "status", "training", "answered", "evaluation passes at most", "evaluation at most"]
    print_table(columns, cells, title=f"{table} at scale {scale} (nothing was computed)")
    print(_sum(rows))


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else "0" if seconds == 0 else duration(seconds)


def _sum(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the line that says what everything would cost that is not there yet."""
    times = ("training seconds", "evaluation seconds at most")
    unknown = sum(any(row[time] is None for time in times) for row in rows)
    if unknown == len(rows):
        return "how long it takes is not known of any of the models"
    total = sum(row[time] or 0.0 for row in rows for time in times)
    if not unknown and not total:
        return "in all 0: every model is trained and every question answered already"
    others = f", and {unknown} of the models, of which it is not known" if unknown else ""
    there = any(row["status"] == "trained" for row in rows)
    return f"in all about {_time(total)} at most{others}" + (", what is there already left out" if there else "")

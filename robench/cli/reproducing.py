"""`robench train --table` and `robench reproduce`: a paper's table from nothing, interrupted as often as need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast, get_args

import typer

from robench.cli import answering, certifying, ranking, transferring
from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    print_json,
    print_table,
    resolve_device,
)
from robench.datasets import open_split
from robench.errors import EvaluationFailed, MissingData, RobenchError, UserError
from robench.papers.definitions import PaperTable, ScaleName
from robench.papers.work import (
    Asking,
    Making,
    Moving,
    Passes,
    askings,
    check_scale,
    datasets_of,
    evaluation_passes,
    makings,
    movings,
    training_passes,
)
from robench.recipe import Recipe
from robench.records import Configured
from robench.registry import cards
from robench.reporting.formatting import duration
from robench.store import Store
from robench.workspace import Workspace

SCALES = get_args(ScaleName)


def reproduce(
    table: Annotated[str, typer.Argument(help="A paper's table: atent-2, emr-1, ... (robench list tables).")],
    scale: Annotated[
        str, typer.Option(help="paper: the recipes as they are; reduced and smoke: what the table's file says.")
    ] = "paper",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; compute nothing.")] = False,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="Of the trainings: fp32, tf32 or bf16.")] = "fp32",
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train what a paper's table needs, evaluate it, and write the table: HTML and CSV.

    What is there already is not computed again, so after an interruption the same command goes on from there.
    Example: robench reproduce atent-2 --scale smoke
    """
    asked = checked_scale(scale)
    found = check_scale(table, asked)
    place = Workspace.locate(workspace, data_root)
    doing = Doing(place, device, precision, quiet=json_output)
    doing.check()
    if dry_run:
        rows = costs(table, asked, doing)
        if json_output:
            print_json(rows)
        else:
            print_costs(table, asked, rows)
        return
    problems = train_table(table, asked, doing)
    problems += evaluate_table(table, found, asked, doing)
    written = ranking.write_all(place)
    own = [path for path in written.files if path.name in {f"{table}.csv", f"paper-{found.paper}.html", "claims.html"}]
    if json_output:
        print_json([str(path) for path in own])
    for path in own:
        doing.say(str(path))
    ranking.say_removed(written.removed)
    if problems:
        raise EvaluationFailed(
            f"{len(problems)} of the table's models and questions have no answer: {problems[0]}"
            + ("" if len(problems) == 1 else " (the others are said above)")
        )


def train_command(
    table: str | None,
    scale: str,
    doing: Doing,
    of_one_model: Mapping[str, Any],
    *,
    replace_models: bool,
    dry_run: bool,
) -> None:
    """Carry out `robench train --table`; `of_one_model` are the options that make no sense with it."""
    if table is None:
        raise UserError(
            "robench train needs the name of a recipe (robench list recipes), or --table NAME (robench list tables)"
        )
    if wrong := [option for option, value in of_one_model.items() if value]:
        raise UserError(f"--table trains the models as the table's file says; leave {wrong[0]} out")
    asked = checked_scale(scale)
    check_scale(table, asked)
    doing.check()
    if dry_run:
        print_costs(table, asked, costs(table, asked, doing))
        return
    if problems := train_table(table, asked, doing, replace_models=replace_models):
        raise EvaluationFailed(f"{len(problems)} of the table's models could not be trained: {problems[0]}")


def checked_scale(scale: str) -> ScaleName:
    """Return the scale, or raise UserError."""
    if scale not in SCALES:
        raise UserError(f"--scale {scale!r} is unknown; write {', '.join(SCALES)}")
    return cast(ScaleName, scale)


def check_precision(precision: str) -> None:
    """Raise UserError for a precision that no training has."""
    if precision not in {"fp32", "tf32", "bf16"}:
        raise UserError(f"--precision {precision!r} is unknown; write fp32, tf32 or bf16")


@dataclass(frozen=True)
class Doing:
    """Where and how it is computed."""

    workspace: Workspace
    device: str
    precision: str = "fp32"
    quiet: bool = False

    def check(self) -> None:
        """Raise UserError for what nothing can be computed with; else every model would say it."""
        check_precision(self.precision)
        resolve_device(self.device)

    def say(self, line: str) -> None:
        """Print a line, unless what is printed is for a program."""
        if not self.quiet:
            print(line, flush=True)


def train_table(table: str, scale: ScaleName, doing: Doing, *, replace_models: bool = False) -> list[str]:
    """Train the models of a table that are not there; return what could not be trained, and why.

    Raises MissingData where not one model is there, nor the images to train one.
    """
    problems = []
    known = cards(doing.workspace)
    planned = makings(table, scale)
    if not any(making.model in known for making in planned):
        _check_data([making.recipe.dataset for making in planned if making.recipe is not None], doing)
    for position, making in enumerate(planned, start=1):
        label = f"[{position}/{len(planned)}] {making.model}"
        if making.recipe is None:
            # A row without a recipe is no failure of this run: the page says so, too.
            doing.say(f"{label}: {making.problem}; skipped")
        elif making.model in known and not replace_models:
            doing.say(f"{label}: there already")
        else:
            try:
                _train(making, doing, replace_model=replace_models)
            except RobenchError as error:
                problems.append(f"{making.model}: {error}")
                doing.say(f"{label}: {error}")
    return problems


def _check_data(datasets: Sequence[str], doing: Doing) -> None:
    """Raise MissingData if none of the data sets is on this machine."""
    missing: list[MissingData] = []
    for name in dict.fromkeys(datasets):
        try:
            open_split(name, "train", doing.workspace)
        except MissingData as error:
            missing.append(error)
        else:
            return
    if missing:
        raise missing[0]


def _train(making: Making, doing: Doing, *, replace_model: bool) -> None:
    from robench.cli.progress import Bars, TrainingBar
    from robench.training import Run, train

    run = Run(
        name=making.model,
        device=resolve_device(doing.device),
        precision=doing.precision,
        resume=True,
        replace=replace_model,
        command=making.command,
    )
    assert making.recipe is not None
    with Bars(quiet=doing.quiet) as bars:
        train(making.recipe, run, workspace=doing.workspace, progress=TrainingBar(bars))


def evaluate_table(table: str, found: PaperTable, scale: ScaleName, doing: Doing) -> list[str]:
    """Answer what a table asks of the models that are there; return what could not be answered, and why."""
    problems, store = [], Store(doing.workspace.reports)
    known = cards(doing.workspace)
    datasets = datasets_of(table, scale)
    for asking in askings(table, scale):
        if asking.model in known:
            try:
                _ask(asking, found.examples_at(scale, datasets.get(asking.model, "")), store, doing)
            except RobenchError as error:
                problems.append(f"{asking.model}: {error}")
                doing.say(problems[-1])
    for moving in movings(table, scale):
        pairs = tuple((t, s) for t, s in moving.pairs if t in known and s in known)
        try:
            if pairs:
                dataset = datasets.get(pairs[0][0], "")
                _move(replace(moving, pairs=pairs), found.examples_at(scale, dataset), store, doing)
        except RobenchError as error:
            problems.append(f"{moving.attack} at {moving.threat}: {error}")
            doing.say(problems[-1])
    return problems


def _options(count: int | None, doing: Doing) -> answering.Options:
    return answering.Options(
        workspace=doing.workspace,
        dataset=None,
        examples=count,
        examples_by_default=count is not None,  # a split that has fewer gives all that it has
        threats=(),
        attacks=(),
        seed=0,
        precision="fp32",
        device=doing.device,
    )


def _ask(asking: Asking, count: int | None, store: Store, doing: Doing) -> None:
    options = replace(
        _options(count, doing),
        split=cast("Any", asking.split),
        threats=[asking.threat] if asking.threat else [],
        attacks=asking.attacks,
        decision=asking.decision,
    )
    job = answering.prepare(asking.model, options)
    how = answering.Manner(quiet=doing.quiet)
    records = answering.run(job, options, store, how)
    for record in records:
        shown = f"{record.spec.attack.title} at {record.spec.threat}"
        doing.say(f"{asking.model}: {shown}: {100 * record.robust.value:.1f} % of {record.robust.n:,}")
    specs = certifying.questions(job, asking.certificates, options, sigma=0.0)
    for certificate in certifying.run(job, specs, options, store, how):
        spec = certificate.spec
        doing.say(f"{asking.model}: {spec.certificate.name} of {spec.examples.count:,} {spec.examples.split} images")


def _move(moving: Moving, count: int | None, store: Store, doing: Doing) -> None:
    options = replace(_options(count, doing), threats=[moving.threat], attacks=[moving.attack])
    names = list(dict.fromkeys(name for pair in moving.pairs for name in pair))
    jobs = {name: answering.prepare(name, options) for name in names}
    transferring.fill(jobs, moving.pairs, options=options, store=store, quiet=doing.quiet)
    doing.say(f"{len(moving.pairs)} transfers of {moving.attack} at {moving.threat}")


def costs(table: str, scale: ScaleName, doing: Doing) -> list[dict[str, Any]]:
    """Return what each model of a table would cost: its training, and at most its evaluation."""
    known = cards(doing.workspace)
    asked, planned = evaluation_passes(table, scale), makings(table, scale)
    absent = {m.model: m.recipe for m in planned if m.model not in known and m.recipe is not None}
    rows = []
    for making in planned:
        evaluation = asked.get(making.model, [])
        row: dict[str, Any] = {
            "model": making.model,
            "status": making.problem or ("trained" if making.model in known else "to train"),
            "training seconds": None,
            "evaluation passes at most": sum(p.gradient + p.forward for p in evaluation),
            "evaluation seconds at most": None,
        }
        if making.recipe is not None:
            recipe = making.recipe
            if first := [name for name in (recipe.start, recipe.teacher) if name in absent]:
                row["status"] += f" after {' and '.join(first)}"
                recipe = _standing_alone(recipe, absent[first[0]])
            row |= _timed(making, recipe, evaluation, trained=making.model in known, doing=doing)
        rows.append(row)
    return rows


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


def _timed(
    making: Making, recipe: Recipe, evaluation: Sequence[Passes], *, trained: bool, doing: Doing
) -> dict[str, Any]:
    """Time a pass of the network of `recipe`, and say what the model's training and evaluation take by that."""
    from robench.training import Run, forecast

    assert making.recipe is not None
    name = f"{making.model}.forecast" if trained else making.model
    run = Run(name=name, device=resolve_device(doing.device), precision=doing.precision, command="")
    try:
        found = forecast(recipe, run, workspace=doing.workspace)
    except RobenchError as error:
        return {"status": f"{'trained' if trained else 'to train'} ({error})"}
    a_pass = found.seconds / (found.passes * found.examples * recipe.total_epochs)
    passes = training_passes(making.recipe)
    other = passes.gradient * a_pass if passes else None
    training = found.seconds if recipe is making.recipe else other
    # The logits alone cost about a third of what they and a gradient cost.
    seconds = sum(p.gradient + p.forward / 3 for p in evaluation) * a_pass
    return {"training seconds": 0.0 if trained else training, "evaluation seconds at most": seconds}


def print_costs(table: str, scale: ScaleName, rows: Sequence[dict[str, Any]]) -> None:
    """Print a plan and its sum."""

    def time(seconds: float | None) -> str:
        return "-" if seconds is None else "0" if seconds == 0 else duration(seconds)

    cells = [
        [
            row["model"],
            row["status"],
            time(row["training seconds"]),
            f"{row['evaluation passes at most']:,}",
            time(row["evaluation seconds at most"]),
        ]
        for row in rows
    ]
    columns = ["model", "status", "training", "evaluation passes at most", "evaluation at most"]
    print_table(columns, cells, title=f"{table} at scale {scale} (nothing was computed)")
    unknown = sum(row["training seconds"] is None for row in rows)
    total = sum((row["training seconds"] or 0) + (row["evaluation seconds at most"] or 0) for row in rows)
    if unknown < len(rows):
        others = f", and {unknown} of the models, of which it is not known" if unknown else ""
        print(f"in all about {duration(total)} at most{others}, without what is answered already being left out")
    else:
        print("how long it takes is not known of any of the models")

"""`robench train --table` and `robench reproduce`: a paper's table from nothing, interrupted as often as need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, cast, get_args

import typer

from robench.cli import answering, certifying, ranking, transferring
from robench.cli.costing import costs, print_costs
from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    print_json,
    resolve_device,
)
from robench.cli.posing import Doing, pose, pose_transfers
from robench.datasets import open_split
from robench.errors import EvaluationFailed, MissingData, RobenchError, UserError
from robench.papers.definitions import PaperTable, ScaleName
from robench.papers.work import Asking, Making, Moving, askings, check_scale, datasets_of, makings, movings
from robench.registry import cards
from robench.store import Store
from robench.workspace import Workspace

SCALES = get_args(ScaleName)


def reproduce(
    table: Annotated[str, typer.Argument(help="A paper's table: atent-2, emr-1, ... (robench list tables).")],
    scale: Annotated[
        str, typer.Option(help="paper: the recipes as they are; reduced and smoke: what the table's file says.")
    ] = "paper",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is left to do and its cost; compute nothing.")
    ] = False,
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
        _say_costs(table, asked, doing)
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
        _say_costs(table, asked, doing)
        return
    if problems := train_table(table, asked, doing, replace_models=replace_models):
        raise EvaluationFailed(f"{len(problems)} of the table's models could not be trained: {problems[0]}")


def _say_costs(table: str, scale: ScaleName, doing: Doing) -> None:
    rows = costs(table, scale, doing)
    if doing.quiet:
        print_json(rows)
    else:
        print_costs(table, scale, rows)


def checked_scale(scale: str) -> ScaleName:
    """Return the scale, or raise UserError."""
    if scale not in SCALES:
        raise UserError(f"--scale {scale!r} is unknown; write {', '.join(SCALES)}")
    return cast(ScaleName, scale)


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


def _ask(asking: Asking, count: int | None, store: Store, doing: Doing) -> None:
    posed = pose(asking, count, doing)
    how = answering.Manner(quiet=doing.quiet)
    for record in answering.run(posed.job, posed.options, store, how):
        shown = f"{record.spec.attack.title} at {record.spec.threat}"
        doing.say(f"{asking.model}: {shown}: {100 * record.robust.value:.1f} % of {record.robust.n:,}")
    for certificate in certifying.run(posed.job, posed.certificates, posed.options, store, how):
        spec = certificate.spec
        doing.say(f"{asking.model}: {spec.certificate.name} of {spec.examples.count:,} {spec.examples.split} images")


def _move(moving: Moving, count: int | None, store: Store, doing: Doing) -> None:
    posed = pose_transfers(moving, (name for pair in moving.pairs for name in pair), count, doing)
    transferring.fill(posed.jobs, moving.pairs, options=posed.options, store=store, quiet=doing.quiet)
    doing.say(f"{len(moving.pairs)} transfers of {moving.attack} at {moving.threat}")

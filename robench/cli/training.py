"""`robench train`: a recipe becomes a registered model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from robench.cli import posing, reproducing
from robench.cli.browsing import model_summary
from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    command_line,
    print_json,
    print_table,
    resolve_device,
)
from robench.errors import UserError
from robench.recipe import apply_settings, load_recipe
from robench.reporting.formatting import duration, size
from robench.workspace import Workspace


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name, or a .toml file.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value: epochs=3, optimizer.lr=0.01, defense.steps=7. Repeatable."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="The model's name (default: the recipe's).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away and begin again.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a registered model of that name.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and check everything; train nothing.")
    ] = False,
    table: Annotated[
        str | None, typer.Option("--table", help="Instead of a recipe: all models of a paper's table, atent-2 say.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="Of a table: paper, or reduced or smoke as its file says.")
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "fp32",
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train a model and register it: the best epoch on the validation split, and the last one.

    Example: robench train mnist-pgd --set epochs=2 --out my-first-model
    """
    if table is not None or recipe is None:
        one_model = {"--set": settings, "--out": out, "--restart": restart, "a recipe": recipe}
        place = Workspace.locate(workspace, data_root)
        doing = posing.Doing(place, device, precision, quiet=json_output)
        reproducing.train_command(table, scale or "paper", doing, one_model, replace_models=replace, dry_run=dry_run)
        return
    if scale is not None:
        raise UserError(f"--scale {scale} is of a table; add --table NAME, or change the recipe with --set")
    posing.check_precision(precision)
    if resume and restart:
        raise UserError("--resume and --restart exclude each other; give one of them")
    resolved = apply_settings(load_recipe(recipe), settings or ())
    place = Workspace.locate(workspace, data_root)
    target = resolve_device(device)

    from robench.cli.progress import Bars, TrainingBar
    from robench.training import Run, forecast, nothing_to_resume
    from robench.training import train as carry_out

    run = Run(
        name=out or recipe.removesuffix(".toml").rpartition("/")[2],
        device=target,
        precision=precision,
        resume=resume,
        restart=restart,
        replace=replace,
        command=command_line(),
    )
    if resume and (note := nothing_to_resume(run, place)):
        print(f"robench: {note}", file=sys.stderr)
    if dry_run:
        found = forecast(resolved, run, workspace=place)
        rounds = f"{resolved.rounds} rounds of " if resolved.rounds > 1 else ""
        facts = {
            "recipe": recipe,
            "scale": resolved.scale or "full",
            "steps": f"{found.steps:,} ({rounds}{resolved.epochs} epochs of {found.steps_per_epoch:,})",
            "passes": f"{found.passes} per example and step ({found.passes * found.examples:,} an epoch)",
            "time": f"about {duration(found.seconds)} on {target}, validation not counted",
            "memory of a step": f"about {size(found.bytes)}: {size(found.bytes_besides)}, and "
            f"{size(found.bytes_per_image)} for each of {found.batch:,} images at a time",
        }
        if json_output:
            print_json({"recipe": resolved.model_dump(mode="json"), **asdict(found), "bytes": found.bytes})
        else:
            print_table(["", ""], [[k, v] for k, v in facts.items()], title="Would train")
        return
    with Bars(quiet=json_output) as bars:
        card = carry_out(resolved, run, workspace=place, progress=TrainingBar(bars))
    if json_output:
        print_json(card.model_dump(mode="json"))
        return
    print_table(["", ""], [[k, str(v)] for k, v in model_summary(card).items()], title="Registered")
    print(f"next: robench eval --model {card.id}")

"""`robench import`: somebody else's weights become a registered model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from robench.records import Normalization
from robench.workspace import Workspace


def import_model(
    weights: Annotated[Path, typer.Argument(help="A .pt, .pth or .safetensors file; it is read, never run.")],
    architecture: Annotated[str, typer.Option(help="The architecture's name: robench list architectures.")],
    dataset: Annotated[str, typer.Option(help="What it classifies: a data set's name, folder:PATH or npz:PATH.")],
    name: Annotated[str, typer.Option(help="The model's name in the registry.")],
    mean: Annotated[
        str | None, typer.Option(help="Per channel, on [0, 1], subtracted from images: 0.4914,0.4822,0.4465")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per channel, on [0, 1], images are divided by it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the architecture: depth=28. Repeatable.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a registered model of that name.")] = False,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring a checkpoint into the registry and show its clean accuracy.

    Example: robench import theirs.pth --architecture resnet18 --dataset cifar10 --name theirs
    """
    parameters = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write KEY=VALUE, such as depth=28")
        parameters[key] = value
    place = Workspace.locate(workspace, data_root)
    target = resolve_device(device)

    from robench.importing import ImportRequest, import_weights

    request = ImportRequest(
        path=weights,
        architecture=architecture,
        parameters=parameters,
        dataset=dataset,
        name=name,
        normalization=_normalization(mean, std),
        replace=replace,
    )
    card = import_weights(request, place, device=target, command=command_line())
    if json_output:
        print_json(card.model_dump(mode="json"))
        return
    print_table(["", ""], [[k, str(v)] for k, v in model_summary(card).items()], title="Imported")
    print(f"next: robench eval --model {card.id}")


def _normalization(mean: str | None, std: str | None) -> Normalization | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError("--mean and --std come together; for a model that takes [0, 1] images give neither")
    return Normalization(mean=_channels(mean, "--mean"), std=_channels(std, "--std"))


def _channels(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"{option} {text!r}: write numbers with commas, one per channel: 0.4914,0.4822,0.4465"
        ) from None

"""Options that several commands share, and how they print."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robench.errors import UserError
from robench.records import Proportion

if TYPE_CHECKING:
    import torch

WorkspaceOption = Annotated[
    Path | None,
    typer.Option("--workspace", help="Folder with model_zoo/ and reports/ (default: ROBENCH_WORKSPACE, else here)."),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder of the data sets (default: ROBENCH_DATA, else a per-user one)."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:0, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


def resolve_device(name: str) -> torch.device:
    """Return the device of that name, `auto` being the first CUDA device where there is one; raise UserError."""
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is unknown; write auto, cpu or cuda:0") from None
    if device.type not in {"cpu", "cuda"}:
        raise UserError(f"--device {name!r} is not supported; write auto, cpu or cuda:0")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        has = (
            f"this machine has {count} CUDA device{'s' if count > 1 else ''}"
            if count
            else "this machine has no CUDA device"
        )
        raise UserError(f"--device {name!r}: {has}; use --device {'cuda:0' if count else 'cpu'}")
    return device


#: Options that say where something lies, which is another place for whoever repeats the command.
_PLACES = frozenset({"--workspace", "--data-root"})

_ABSOLUTE_FOLDER = re.compile(r"(?:(?<=^)|(?<=[:=]))/(?:[^/:]+/)*")

#: What the running command was given.
ARGUMENTS: ContextVar[Sequence[str]] = ContextVar("ARGUMENTS", default=())


def command_line() -> str:
    """Return the command as it can be typed again, anywhere.

    Absolute paths of this machine are shortened to their names; where models, results and data lie is left out.
    """
    words, told = iter(ARGUMENTS.get()), ["robench"]
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in _PLACES:
            told.append(_ABSOLUTE_FOLDER.sub("", word))
        elif not equals:
            next(words, None)
    return shlex.join(told)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def percent(share: Proportion) -> str:
    """Return `89.3 % [88.7, 89.9]`: the value and its exact 95 % interval."""
    low, high = share.clopper_pearson
    return f"{100 * share.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; where the output is no terminal, as wide as it needs to be."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[escape(cell) for cell in row])
    Console(width=None if sys.stdout.isatty() else 200).print(table)

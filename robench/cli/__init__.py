"""The command line: `robench COMMAND`. Thin: each command reads its options, calls the library and prints.

Every error that robench raises on purpose is one line on standard error and an exit status (2: what was asked for is
wrong; 3: an evaluation failed; 1 is a `check` that does not pass); Ctrl-C is 130, and 141 a reader of the output that
left. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
from importlib.metadata import version as installed
from typing import Annotated

import typer
from typer.exceptions import TyperException

from robench import __version__
from robench.cli import (
    browsing,
    checking,
    demonstrating,
    drawing,
    evaluating,
    importing,
    ranking,
    reproducing,
    timing,
    training,
    transferring,
    verifying,
)
from robench.cli.options import ARGUMENTS
from robench.errors import RobenchError

_INTERRUPTED = 130
#: 128 + SIGPIPE, as a shell says it.
_NO_READER = 141
_STDOUT = 1
#: What writing to a full or broken device raises, without a file's name where it was the output.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO}

app = typer.Typer(
    name="robench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"robench {__version__}, torch {installed('torch')}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Robustness benchmarking of image classifiers: train, evaluate, rank."""


app.command("train")(training.train)
app.command("eval")(evaluating.evaluate)
app.command("transfer")(transferring.transfer)
app.command("time")(timing.time_subject)
app.command("verify")(verifying.verify)
app.command("reproduce")(reproducing.reproduce)
app.command("leaderboard")(ranking.leaderboard)
app.command("check")(checking.check)
app.add_typer(checking.baseline_app, name="baseline")
app.command("demo")(demonstrating.demo)
app.command("list")(browsing.list_catalog)
app.command("show")(browsing.show)
app.command("import")(importing.import_model)
app.command("data")(browsing.data)
app.command("covariance")(drawing.covariance)
app.command("regions")(drawing.regions)
app.command("lines")(drawing.lines)


def main() -> None:
    """Run the command line and exit with its status."""
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _output_failed(error)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command; return its exit status."""
    ARGUMENTS.set(arguments)
    try:
        status = int(app(args=arguments or ["--help"], standalone_mode=False) or 0)
    except SystemExit:
        # Commands return their statuses. Typer and rich leave of their own accord where nobody reads the output.
        return _output_failed(BrokenPipeError())
    except RobenchError as error:
        return _say(str(error), error.exit_code)
    except TyperException as error:
        return _say(_usage(error.format_message(), arguments), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (error.filename is None and error.errno in _NO_ROOM):
            return _output_failed(error)
        if error.filename is None:
            raise
        return _say(f"cannot use {error.filename}: {error.strerror}; choose another folder or file", 2)
    if status == _INTERRUPTED:
        one_model = arguments[:1] == ["train"] and "--table" not in arguments
        goes_on = "add --resume to go on" if one_model else "the same command goes on from there"
        return _say(f"interrupted; what was finished is kept, {goes_on}", status)
    return status


def _output_failed(error: OSError) -> int:
    """Close the output for good, so that nothing is tried on it again at the exit; return the status."""
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), _STDOUT)
    if isinstance(error, BrokenPipeError):
        return _NO_READER
    return _say(f"the output cannot be written: {error.strerror}; what was computed is kept", 2)


def _usage(problem: str, arguments: list[str]) -> str:
    """Return what is wrong with the options as one line, with the value that was given."""
    line = " ".join(problem.replace("Value error, ", "").split())
    option = re.search(r"'(--[\w-]+)'", line)
    if option and option[1] in arguments[:-1]:
        line += f" (given: {arguments[arguments.index(option[1]) + 1]})"
    known = {*(command.name for command in app.registered_commands), "baseline"}
    return f"{line} (see robench {f'{arguments[0]} ' if arguments and arguments[0] in known else ''}--help)"


def _say(problem: str, status: int) -> int:
    """Print a problem as one line (messages that list keys side by side keep their lines)."""
    print(f"robench: {problem}", file=sys.stderr)
    return status

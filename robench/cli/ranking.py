"""`robench leaderboard`: the stored records become tables."""

from __future__ import annotations

from typing import Annotated

import typer

from robench import catalog
from robench.cli.options import JsonOption, WorkspaceOption, print_json
from robench.errors import UserError
from robench.workspace import Workspace


def leaderboard(
    table: Annotated[list[str] | None, typer.Argument(help="Names of leaderboards (default: all).")] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write the leaderboards as HTML and CSV from the stored records.

    Example: robench leaderboard robustness
    """
    from robench.registry import cards
    from robench.reporting import write_leaderboards
    from robench.store import Store

    place = Workspace.locate(workspace)
    names = table or list(catalog.plugins("leaderboards"))
    for name in names:
        catalog.find("leaderboards", name)
    if not any(place.reports.glob("records/*/*.json")) and not any(place.reports.glob("certificates/*/*.json")):
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    written = write_leaderboards(names, Store(place.reports), cards(place), place.reports / "leaderboards")
    if json_output:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)

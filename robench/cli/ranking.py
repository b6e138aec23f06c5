"""`robench leaderboard`: the stored records become tables."""

from __future__ import annotations

from typing import Annotated

import typer

from robench import catalog
from robench.cli.options import JsonOption, WorkspaceOption, print_json
from robench.errors import UnknownName, UserError
from robench.workspace import Workspace


def leaderboard(
    table: Annotated[list[str] | None, typer.Argument(help="Names of leaderboards (default: all).")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html, csv, json or latex; may be given again (default: all)."),
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write the leaderboards as a site and as CSV, JSON and LaTeX from the stored records.

    Example: robench leaderboard robustness --format latex
    """
    from robench.datasets import ImageSet, open_split
    from robench.records import Examples
    from robench.registry import cards
    from robench.reporting import FORMATS, write_leaderboards
    from robench.store import Store

    place = Workspace.locate(workspace)
    names = table or list(catalog.plugins("leaderboards"))
    for name in names:
        catalog.find("leaderboards", name)
    for asked in formats or ():
        if asked not in FORMATS:
            raise UnknownName("format", asked, FORMATS)
    if not any(place.reports.glob("records/*/*.json")) and not any(place.reports.glob("certificates/*/*.json")):
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    out_dir = place.reports / "leaderboards"

    def images(examples: Examples) -> ImageSet:
        return open_split(examples.dataset, examples.split, place)

    written = write_leaderboards(
        names, Store(place.reports), cards(place), out_dir, formats=formats or FORMATS, open_images=images
    )
    if json_output:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)

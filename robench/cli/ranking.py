"""`robench leaderboard`: the stored records become tables."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from robench import catalog
from robench.cli.options import JsonOption, WorkspaceOption, print_json
from robench.datasets import ImageSet
from robench.errors import UnknownName, UserError
from robench.records import Examples
from robench.workspace import Workspace


def write_all(place: Workspace) -> list[Path]:
    """Write all leaderboards and all papers' pages; return the files."""
    from robench.registry import cards
    from robench.reporting import write_leaderboards
    from robench.store import Store

    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    folder = place.reports / "leaderboards"
    images = functools.partial(_images, place)
    return write_leaderboards(boards, Store(place.reports), cards(place), folder, open_images=images, of_papers=papers)


def _images(place: Workspace, examples: Examples) -> ImageSet:
    """Return the images that pages show pictures of."""
    from robench.datasets import open_split

    return open_split(examples.dataset, examples.split, place)


def leaderboard(
    table: Annotated[
        list[str] | None, typer.Argument(help="Names of leaderboards or of papers' tables, atent-2 say (default: all).")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html, csv, json or latex; may be given again (default: all)."),
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write the leaderboards and the papers' tables as HTML and CSV from the stored records.

    Example: robench leaderboard robustness
    """
    from robench.registry import cards
    from robench.reporting import FORMATS, write_latex, write_leaderboards
    from robench.store import Store

    for asked in formats or ():
        if asked not in FORMATS:
            raise UnknownName("format", asked, FORMATS)
    place = Workspace.locate(workspace)
    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    for name in table or ():
        if name not in {*boards, *papers}:
            raise UnknownName("leaderboard", name, {*boards, *papers})
    tables = [name for name in table or papers if name in papers]
    names = [name for name in table or boards if name in boards]
    own = any(place.reports.glob("records/*/*.json")) or any(place.reports.glob("certificates/*/*.json"))
    if names and (set(formats or FORMATS) != {"latex"} or not tables) and not own:
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    store, folder = Store(place.reports), place.reports / "leaderboards"
    written = write_leaderboards(
        names,
        store,
        cards(place),
        folder,
        formats=formats or FORMATS,
        open_images=functools.partial(_images, place),
        of_papers=tables,
    )
    if formats and "latex" in formats:
        written += write_latex(tables, store, cards(place), folder)
    if json_output:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)

"""`robench leaderboard`: the stored records become tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robench import catalog
from robench.cli.options import JsonOption, WorkspaceOption, print_json
from robench.errors import UnknownName, UserError
from robench.workspace import Workspace


def write_all(place: Workspace) -> list[Path]:
    """Write all leaderboards and all papers' pages; return the files."""
    from robench.registry import cards
    from robench.reporting import write_leaderboards
    from robench.store import Store

    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    folder = place.reports / "leaderboards"
    return write_leaderboards(boards, Store(place.reports), cards(place), folder, of_papers=papers)


def leaderboard(
    table: Annotated[
        list[str] | None, typer.Argument(help="Names of leaderboards or of papers' tables, atent-2 say (default: all).")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html (with CSV), or latex: papers' tables as .tex files for booktabs.")
    ] = "html",
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write the leaderboards and the papers' tables as HTML and CSV from the stored records.

    Example: robench leaderboard robustness
    """
    from robench.registry import cards
    from robench.reporting import write_latex, write_leaderboards
    from robench.store import Store

    if form not in {"html", "latex"}:
        raise UserError(f"--format {form!r} is unknown; write html or latex")
    place = Workspace.locate(workspace)
    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    for name in table or ():
        if name not in {*boards, *papers}:
            raise UnknownName("leaderboard", name, {*boards, *papers})
        if form == "latex" and name not in papers:
            raise UserError(f"leaderboard {name} has no LaTeX form; name a paper's table (robench list tables)")
    tables = [name for name in table or papers if name in papers]
    names = [name for name in table or boards if name in boards]
    own = any(place.reports.glob("records/*/*.json")) or any(place.reports.glob("certificates/*/*.json"))
    if names and form == "html" and not own:
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    store, folder = Store(place.reports), place.reports / "leaderboards"
    if form == "latex":
        written = write_latex(tables, store, cards(place), folder)
    else:
        written = write_leaderboards(names, store, cards(place), folder, of_papers=tables)
    if json_output:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)

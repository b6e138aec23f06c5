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
    """Write all papers' pages and all leaderboards; return the files."""
    from robench.registry import cards
    from robench.reporting import write_leaderboards, write_papers
    from robench.store import Store

    store, known, folder = Store(place.reports), cards(place), place.reports / "leaderboards"
    written = write_papers(catalog.plugins("tables"), store, known, folder, formats=("html", "csv"))
    # The index comes last: it lists what there is.
    return [*written, *write_leaderboards(catalog.plugins("leaderboards"), store, known, folder)]


def leaderboard(
    table: Annotated[
        list[str] | None, typer.Argument(help="Names of leaderboards or of papers' tables, atent-2 say (default: all).")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html, csv or latex (papers' tables); may be given again (default: html, csv)."),
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write the leaderboards and the papers' tables from the stored records.

    Example: robench leaderboard robustness
    """
    from robench.registry import cards
    from robench.reporting import PAPER_FORMATS, write_leaderboards, write_papers
    from robench.store import Store, file_name

    place = Workspace.locate(workspace)
    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    if unknown := [name for name in table or () if name not in {*boards, *papers}]:
        raise UnknownName("leaderboard", unknown[0], {*boards, *papers})
    if unknown := [form for form in formats or () if form not in PAPER_FORMATS]:
        raise UnknownName("format", unknown[0], PAPER_FORMATS)
    asked = formats or ["html", "csv"]
    tables = [name for name in table or papers if name in papers]
    names = [name for name in table or boards if name in boards] if {"html", "csv"} & set(asked) else []
    if table and not tables and not names:
        raise UserError(f"leaderboard {table[0]} has no LaTeX form; name a paper's table (robench list tables)")
    if (
        names
        and not any(place.reports.glob("records/*/*.json"))
        and not any(place.reports.glob("certificates/*/*.json"))
    ):
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    store, known, folder = Store(place.reports), cards(place), place.reports / "leaderboards"
    written = []
    if tables:
        shown = None if names else [m for m in known if (folder / "models" / f"{file_name(m)}.html").exists()]
        written += write_papers(tables, store, known, folder, formats=asked, linked=shown)
    if names:
        # Written after the papers' pages, which the index lists.
        written = [*write_leaderboards(names, store, known, folder), *written]
    if json_output:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)

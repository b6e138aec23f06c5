"""`robench leaderboard`: the stored records become tables."""

from __future__ import annotations

import functools
from collections.abc import Collection
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
    """Write all papers' pages and all leaderboards; return the files."""
    from robench.registry import cards
    from robench.reporting import write_leaderboards, write_papers
    from robench.store import Store

    store, known, folder = Store(place.reports), cards(place), place.reports / "leaderboards"
    images = functools.partial(_images, place)
    tables = catalog.plugins("tables")
    results = store.results(known)
    results.check()
    forms = ("html", "csv")
    written = write_papers(tables, store, known, folder, formats=forms, open_images=images, results=results)
    # The index comes last: it lists what there is.
    boards = catalog.plugins("leaderboards")
    return [*written, *write_leaderboards(boards, store, known, folder, open_images=images, results=results)]


def _images(place: Workspace, examples: Examples) -> ImageSet:
    """Return the images that pages show pictures of."""
    from robench.datasets import open_split

    return open_split(examples.dataset, examples.split, place)


def _papers_tables(place: Workspace) -> Collection[str]:
    """Return the papers' tables, if models of any of them were evaluated here: else all their cells would be empty."""
    from robench.papers.definitions import in_papers

    evaluated = [folder.name for kind in ("records", "certificates") for folder in (place.reports / kind).glob("*")]
    return catalog.plugins("tables") if in_papers(evaluated) else ()


def _check(what: str, asked: Collection[str], known: Collection[str]) -> None:
    """Raise UnknownName for the first that is not known."""
    for name in asked:
        if name not in known:
            raise UnknownName(what, name, known)


def leaderboard(
    table: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of leaderboards or of papers' tables, atent-2 say (default: all, papers' tables if models of "
            "them were evaluated)."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="html, csv, json (not of papers' tables) or latex; may be given again (default: all, of papers' "
            "tables html and csv).",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write the leaderboards and the papers' tables from the stored records.

    Example: robench leaderboard robustness
    """
    from robench.registry import cards
    from robench.reporting import FORMATS, PAPER_FORMATS, write_leaderboards, write_papers
    from robench.store import Store, file_name

    _check("format", formats or (), FORMATS)
    place = Workspace.locate(workspace)
    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    _check("leaderboard", table or (), {*boards, *papers})
    of_papers = [form for form in formats or ("html", "csv") if form in PAPER_FORMATS]
    tables = [name for name in table or _papers_tables(place) if name in papers] if of_papers else []
    names = [name for name in table or boards if name in boards]
    if not tables and not names and table:
        raise UserError(f"{table[0]} is a paper's table, which is written as {', '.join(PAPER_FORMATS)}; ask for these")
    own = any(any(place.reports.glob(f"{kind}/*/*.json")) for kind in ("records", "certificates", "timings"))
    if names and not own:
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    store, known, folder = Store(place.reports), cards(place), place.reports / "leaderboards"
    written, results = [], store.results(known)
    if tables and names:
        results.check()  # what one of the two would refuse is refused before either is written
    images = functools.partial(_images, place)
    if tables:
        shown = None if names else [m for m in known if (folder / "models" / f"{file_name(m)}.html").exists()]
        written += write_papers(
            tables, store, known, folder, formats=of_papers, linked=shown, open_images=images, results=results
        )
    if names:
        # Written after the papers' pages, which the index lists.
        made = write_leaderboards(
            names, store, known, folder, formats=formats or FORMATS, open_images=images, results=results
        )
        written = [*made, *written]
    if json_output:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)

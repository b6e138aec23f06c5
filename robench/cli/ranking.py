"""`robench leaderboard`: the stored records become tables."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from robench import catalog
from robench.cli.options import JsonOption, WorkspaceOption, print_json
from robench.datasets import ImageSet
from robench.errors import UnknownName, UserError
from robench.records import Examples
from robench.workspace import Workspace

#: What papers' tables are written as unless it is said.
_OF_PAPERS = ("html", "csv")


class Written(NamedTuple):
    """What was written, and the files of an earlier site that were removed."""

    files: list[Path]
    removed: list[Path]


def write_all(place: Workspace, tables: Collection[str] | None = None) -> Written:
    """Write the pages of these papers' tables (None: of all) and all leaderboards, and remove what is not written anew.

    Only what robench wrote is removed: pages of models and tables that are gone.
    """
    from robench.reporting.inventory import remove_others

    tables = catalog.plugins("tables") if tables is None else tables
    files = _write(place, tables, catalog.plugins("leaderboards"), anew=True)
    return Written(files, remove_others(place.reports / "leaderboards", files))


def _write(
    place: Workspace,
    tables: Collection[str],
    boards: Collection[str],
    *,
    of_papers: Collection[str] = _OF_PAPERS,
    of_boards: Collection[str] | None = None,
    anew: bool = False,
) -> list[Path]:
    """Write papers' tables and leaderboards in these formats; `anew`: the index does not link to earlier pages."""
    from robench.registry import cards
    from robench.reporting import FORMATS, write_leaderboards, write_papers
    from robench.reporting.inventory import listed_files
    from robench.store import Store, file_name

    store, known, folder = Store(place.reports), cards(place), place.reports / "leaderboards"
    listed_files(folder)  # a damaged inventory is refused before any work
    papers: list[Path] = []
    results = store.results(known)
    if tables and boards:
        results.check()  # what one of the two would refuse is refused before either is written
    images = functools.partial(_images, place)
    if tables:
        shown = None if boards else [m for m in known if (folder / "models" / f"{file_name(m)}.html").exists()]
        papers = write_papers(
            tables, store, known, folder, formats=of_papers, linked=shown, open_images=images, results=results
        )
    if not boards:
        return papers
    # Written after the papers' pages, which the index lists.
    made = write_leaderboards(
        boards,
        store,
        known,
        folder,
        formats=of_boards or FORMATS,
        open_images=images,
        results=results,
        paper_pages=papers if anew else None,
    )
    return [*made, *papers]


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
    from robench.reporting import FORMATS, PAPER_FORMATS

    _check("format", formats or (), FORMATS)
    place = Workspace.locate(workspace)
    boards, papers = catalog.plugins("leaderboards"), catalog.plugins("tables")
    _check("leaderboard", table or (), {*boards, *papers})
    of_papers = [form for form in formats or _OF_PAPERS if form in PAPER_FORMATS]
    tables = [name for name in table or _papers_tables(place) if name in papers] if of_papers else []
    names = [name for name in table or boards if name in boards]
    if not tables and not names and table:
        raise UserError(f"{table[0]} is a paper's table, which is written as {', '.join(PAPER_FORMATS)}; ask for these")
    own = any(any(place.reports.glob(f"{kind}/*/*.json")) for kind in ("records", "certificates", "timings"))
    if names and not own:
        raise UserError(f"there are no records in {place.reports}; robench eval makes them, --workspace names another")
    if table or formats:
        written = Written(_write(place, tables, names, of_papers=of_papers, of_boards=formats), [])
    else:
        written = write_all(place, tables)
    if json_output:
        print_json([str(path) for path in written.files])
    for path in written.files if not json_output else ():
        print(path)
    say_removed(written.removed)


def say_removed(removed: Iterable[Path]) -> None:
    """Say which files were removed; on standard error, because standard output lists what was written."""
    for path in removed:
        print(f"robench: removed {path} (of an earlier site)", file=sys.stderr)

"""The papers' tables as pages, CSV and LaTeX: the printed value of every cell, and ours beside it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from robench import catalog
from robench.datasets import ImageSet
from robench.papers.claims import Judged, judge_paper
from robench.papers.definitions import Paper, known_tables, load_paper, load_table, page_name, pages_in
from robench.papers.filling import FilledTable, Filler, PaperCell
from robench.records import Examples
from robench.reporting.figures import ShownFigure, show_figure
from robench.reporting.inventory import add_files
from robench.reporting.latex import latex_text
from robench.reporting.pictures import Pictures
from robench.reporting.regions import panels_of, regions_csv, regions_svg
from robench.reporting.rendering import environment
from robench.store import Results, Store, StoredCard, file_name, publish

#: What papers' tables are written as.
PAPER_FORMATS = ("html", "csv", "latex")

_CSV_COLUMNS = (
    "row_id",
    "row",
    "column",
    "printed",
    "inferred",
    "ours",
    "low",
    "high",
    "n",
    "difference",
    "differs",
    "scale",
    "model",
    "records",
    "notes",
    "flags",
    "missing",
    "remedy",
    "cost",
    "commands",
)

_CLAIMS_COLUMNS = (
    *("paper", "claim", "statement", "printed", "unit", "ours"),
    *("verdict", "as_printed", "why", "evidence", "note"),
)


@dataclass(frozen=True)
class PaperPage:
    """A paper with its tables, filled."""

    name: str
    paper: Paper
    tables: tuple[FilledTable, ...]
    figures: tuple[ShownFigure, ...] = ()


def paper_of(table: str) -> str:
    """Return the paper that a table is of."""
    return load_table(table).paper


def judged_claims(filler: Filler) -> dict[str, list[Judged]]:
    """Return the claims of all papers, by paper."""
    return {name: judge_paper(name, filler) for name in catalog.plugins("papers")}


def filled_pages(filler: Filler, papers: Iterable[str], pictures: Pictures) -> list[PaperPage]:
    """Return these papers with all their tables filled and their figures drawn."""
    loaded = {name: load_paper(name) for name in dict.fromkeys(papers)}
    return [
        PaperPage(
            name,
            paper,
            tuple(filler.fill(table) for table in paper.tables),
            tuple(show_figure(figure, filler.results, filler.archive, pictures) for figure in paper.figures),
        )
        for name, paper in loaded.items()
    ]


def models_of(filled: FilledTable) -> dict[str, list[PaperCell]]:
    """Return the models that a table's numbers are of, each with its cells."""
    found: dict[str, list[PaperCell]] = {}
    for row in filled.cells:
        for cell in row:
            if cell.model is not None:
                found.setdefault(cell.model, []).append(cell)
    return found


def figure_file(name: str) -> str:
    """Return where a figure's numbers stand, beside its paper's page."""
    return f"paper-figures/{name}.csv"


def paper_table_csv(filled: FilledTable) -> str:
    """Return a table as CSV, a row for each cell: what is printed, what we have, and where that is from.

    Numbers are in the unit of the printed value (percent, mostly). Records are identities; where several make a number
    they are joined by spaces, commands by semicolons.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row, cells in filled.lines():
        for column, cell in zip(filled.table.columns, cells, strict=True):
            writer.writerow(
                [
                    row.id,
                    row.title,
                    column.id,
                    cell.printed,
                    cell.inferred,
                    _exact(cell.value, cell.text),
                    *(_exact(value, None) for value in (cell.low, cell.high)),
                    cell.n,
                    _exact(cell.difference, None),
                    {True: "yes", False: "no"}[cell.differs] if cell.difference is not None else None,
                    cell.scale,
                    cell.model,
                    " ".join(path.name.split(".")[0] for path in cell.records),
                    "; ".join(cell.notes),
                    "; ".join(cell.flags),
                    cell.missing,
                    cell.remedy,
                    cell.cost,
                    "; ".join(cell.commands),
                ]
            )
    return text.getvalue()


def _exact(value: float | None, text: str | None) -> object:
    return text if value is None else f"{value:.10g}"


def paper_table_latex(filled: FilledTable) -> str:
    """Return a table in the paper's columns (booktabs): below each printed row ours, where there is one."""
    table = filled.table
    has_ours = any(cell.text is not None for row in filled.cells for cell in row)
    caption = "Printed values, and ours below." if has_ours else "Printed values."
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_text(table.source)}: {latex_text(table.summary)}. {caption}}}",
        rf"  \label{{tab:{filled.name}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"    \toprule",
        "    " + " & ".join([latex_text(table.corner), *(latex_text(c.title) for c in table.columns)]) + r" \\",
        r"    \midrule",
    ]
    group = table.rows[0].group if table.rows else ""
    for row, cells in filled.lines():
        if row.group != group:
            lines.append(r"    \midrule")
            group = row.group
        printed = [_marked("--" if c.printed == "-" else latex_text(c.printed), c.printed_place) for c in cells]
        lines.append("    " + " & ".join([latex_text(row.title), *printed]) + r" \\")
        if any(cell.text is not None for cell in cells):
            scales = list(dict.fromkeys(cell.scale for cell in cells if cell.scale and cell.scale != "paper"))
            label = rf"\quad ours ({', '.join(scales)})" if scales else r"\quad ours"
            ours = [_marked(latex_text(cell.text or ""), cell.place) for cell in cells]
            lines.append("    " + " & ".join([label, *ours]) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    small = [f"{name}: {scale.told_everywhere()}" for name, scale in table.scales.items() if _uses(filled, name)]
    if small:
        lines.append(rf"  \par\smallskip\footnotesize {latex_text('; '.join(small))}")
    return "\n".join([*lines, r"\end{table}", ""])


def _uses(filled: FilledTable, scale: str) -> bool:
    return any(cell.scale == scale for row in filled.cells for cell in row)


def _marked(text: str, place: int | None) -> str:
    if not text:
        return ""
    return {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(place or 0, text)


def write_papers(
    tables: Iterable[str],
    store: Store,
    cards: Mapping[str, StoredCard],
    folder: Path,
    *,
    formats: Collection[str] = PAPER_FORMATS,
    linked: Collection[str] | None = None,
    open_images: Callable[[Examples], ImageSet] | None = None,
    results: Results | None = None,
) -> list[Path]:
    """Write papers' tables and return the files: the page of each table's paper and the claims (`html`), the numbers of
    each table, of the figures of these papers and of the claims (`csv`), and each table for booktabs (`latex`); and
    where a table's models are classifiers of a plane, their decision regions.

    `linked` are the models whose pages are there to be linked to; None: all that have a card. `open_images` gives the
    images that figures show pictures of, and `results` are, as of
    :func:`robench.reporting.site.write_leaderboards`. The files are added to the folder's inventory
    (:mod:`robench.reporting.inventory`). Raises UserError for damaged records or a damaged inventory, StorageError
    where `folder` cannot be written. Everything is rendered before anything is written.
    """
    wanted, filler = all_tables(tables), Filler(store.results(cards) if results is None else results)
    pictures = Pictures(store.root, open_images)
    pages = filled_pages(filler, map(paper_of, wanted), pictures)
    claims = judged_claims(filler)
    files: dict[str, str] = {}
    regions = {t.name: panels for page in pages for t in page.tables if (panels := panels_of(t, store.root, cards))}
    if "html" in formats:
        show = _Renderer(folder, cards, linked=set(cards if linked is None else linked), csv="csv" in formats)
        drawn = {name: regions_svg(panels) for name, panels in regions.items()}
        files |= {f"{name}-regions.svg": drawing for name, drawing in drawn.items()}
        files |= {
            page_name(page.name): show.page("paper.html", entry=page, models_of=models_of, regions=drawn)
            for page in pages
        }
        papers = {name: (page_name(name), load_paper(name)) for name in claims}
        there = {*files, *(file for file, _ in pages_in(folder))}
        files["claims.html"] = show.page("claims.html", claims=claims, papers=papers, written=there)
    filled = [table for page in pages for table in page.tables if table.name in wanted]
    if "csv" in formats:
        files |= {f"{table.name}.csv": paper_table_csv(table) for table in filled} | {"claims.csv": claims_csv(claims)}
        files |= {figure_file(figure.name): figure.csv for page in pages for figure in page.figures if figure.csv}
        files |= {f"{name}-regions.csv": regions_csv(panels) for name, panels in regions.items()}
    if "latex" in formats:
        files |= {f"{table.name}.tex": paper_table_latex(table) for table in filled}
    add_files(folder, [folder / name for name in files])
    for path, text in pictures.files().items() if "html" in formats else ():
        publish(path, text.encode())
    for name, text in files.items():
        publish(folder / name, text.encode())
    return [folder / name for name in files]


class _Renderer:
    """Renders pages that lie in one folder."""

    def __init__(self, folder: Path, cards: Mapping[str, StoredCard], *, linked: Collection[str], csv: bool) -> None:
        self.folder = folder
        self.known = {"folder": folder, "cards": cards, "linked": linked, "csv": csv}

    def page(self, template: str, **values: Any) -> str:
        shared = {**self.known, "link": self.link, "model_page": self.model_page, "figure_file": figure_file}
        return environment().get_template(template).render(**shared, **values)

    def link(self, target: Path) -> str:
        return quote(Path(os.path.relpath(target, self.folder)).as_posix())

    def model_page(self, model: str) -> Path:
        return self.folder / "models" / f"{file_name(model)}.html"


def all_tables(names: Iterable[str]) -> list[str]:
    """Return the tables among these names in the papers' order."""
    wanted = set(names)
    return [name for name in known_tables() if name in wanted]


def claims_csv(judged: Mapping[str, Iterable[Judged]]) -> str:
    """Return the claims of all papers as CSV, with the cells that each verdict is from."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["paper", "claim", "statement", "printed", "unit", "ours", "verdict", "as_printed", "why", "evidence", "note"]
    )
    for paper, claims in judged.items():
        for j in claims:
            evidence = "; ".join(f"{name} = {cell.text if cell.text else '-'}" for name, cell in j.cells.items())
            claim = [paper, j.claim.id, j.claim.statement, j.claim.printed, j.claim.unit]
            writer.writerow([*claim, j.measured, j.verdict, j.printed_verdict, j.why, evidence, j.claim.note])
    return text.getvalue()

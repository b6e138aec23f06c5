"""The papers' tables as pages, CSV and LaTeX: the printed value of every cell, and ours beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robench import catalog
from robench.papers.claims import Judged, judge_paper
from robench.papers.definitions import Paper, known_tables, load_paper, load_table
from robench.papers.filling import FilledTable, Filler, PaperCell
from robench.store import Store, StoredCard, publish

_CSV_COLUMNS = (
    "row_id",
    "row",
    "column",
    "printed",
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


def page_name(paper: str) -> str:
    """Return the file of a paper's page."""
    return f"paper-{paper}.html"


def listed() -> list[tuple[str, Paper]]:
    """Return the file of every paper's page with the paper."""
    return [(page_name(name), load_paper(name)) for name in catalog.plugins("papers")]


def listed_by_name() -> list[tuple[str, tuple[str, Paper]]]:
    """Return every paper by its name, with the file of its page."""
    return [(name, (page_name(name), load_paper(name))) for name in catalog.plugins("papers")]


def paper_of(table: str) -> str:
    """Return the paper that a table is of."""
    return load_table(table).paper


def judged_claims(filler: Filler) -> dict[str, list[Judged]]:
    """Return the claims of all papers, by paper."""
    return {name: judge_paper(name, filler) for name in catalog.plugins("papers")}


def filled_pages(filler: Filler, papers: Iterable[str]) -> list[PaperPage]:
    """Return these papers with all their tables filled."""
    loaded = {name: load_paper(name) for name in dict.fromkeys(papers)}
    return [
        PaperPage(name, paper, tuple(filler.fill(table) for table in paper.tables)) for name, paper in loaded.items()
    ]


def models_of(filled: FilledTable) -> dict[str, list[PaperCell]]:
    """Return the models that a table's numbers are of, each with its cells."""
    found: dict[str, list[PaperCell]] = {}
    for row in filled.cells:
        for cell in row:
            if cell.model is not None:
                found.setdefault(cell.model, []).append(cell)
    return found


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
                    _exact(cell.value, cell.text),
                    *(_exact(value, None) for value in (cell.low, cell.high)),
                    cell.n,
                    _exact(cell.difference, None),
                    {True: "yes", False: "no"}[cell.differs] if cell.difference is not None else None,
                    cell.scale,
                    cell.model,
                    " ".join(path.name.split(".")[0] for path in cell.records),
                    "; ".join(cell.notes),
                    cell.missing,
                    cell.remedy,
                    cell.cost,
                    "; ".join(cell.commands),
                ]
            )
    return text.getvalue()


def _exact(value: float | None, text: str | None) -> object:
    return text if value is None else f"{value:.10g}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def latex_text(text: str) -> str:
    """Return a text as LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def paper_table_latex(filled: FilledTable) -> str:
    """Return a table in the paper's columns (booktabs): below each printed row ours, where there is one."""
    table = filled.table
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_text(table.source)}: {latex_text(table.summary)}. Printed values, and ours below.}}",
        rf"  \label{{tab:{filled.name}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"    \toprule",
        "    " + " & ".join([latex_text(table.corner), *(latex_text(c.title) for c in table.columns)]) + r" \\",
        r"    \midrule",
    ]
    for row, cells in filled.lines():
        printed = [_marked("--" if c.printed == "-" else latex_text(c.printed), c.printed_place) for c in cells]
        lines.append("    " + " & ".join([latex_text(row.title), *printed]) + r" \\")
        if any(cell.text is not None for cell in cells):
            scales = list(dict.fromkeys(cell.scale for cell in cells if cell.scale and cell.scale != "paper"))
            label = rf"\quad ours ({', '.join(scales)})" if scales else r"\quad ours"
            ours = [_marked(latex_text(cell.text or ""), cell.place) for cell in cells]
            lines.append("    " + " & ".join([label, *ours]) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    small = [f"{name}: {_scale_text(scale)}" for name, scale in table.scales.items() if _uses(filled, name)]
    if small:
        lines.append(rf"  \par\smallskip\footnotesize {latex_text('; '.join(small))}")
    return "\n".join([*lines, r"\end{table}", ""])


def _uses(filled: FilledTable, scale: str) -> bool:
    return any(cell.scale == scale for row in filled.cells for cell in row)


def _scale_text(scale: Any) -> str:
    return f"{', '.join(scale.changes)}; {scale.examples:,} test images"


def _marked(text: str, place: int | None) -> str:
    if not text:
        return ""
    return {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(place or 0, text)


def write_latex(tables: Iterable[str], store: Store, cards: Mapping[str, StoredCard], folder: Path) -> list[Path]:
    """Write papers' tables as LaTeX files; return them. Raises what :func:`write_leaderboards` raises."""
    filler = Filler(store.results(cards))
    files = {folder / f"{name}.tex": paper_table_latex(filler.fill(name)) for name in all_tables(tables)}
    for path, text in files.items():
        publish(path, text.encode())
    return list(files)


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


def csv_files(pages: Iterable[PaperPage], tables: Iterable[str]) -> Mapping[str, str]:
    """Return the CSV of these tables by the files' names."""
    wanted = set(tables)
    return {f"{t.name}.csv": paper_table_csv(t) for page in pages for t in page.tables if t.name in wanted}

"""Tables as LaTeX, to be put into a paper by `\\input`; the document needs booktabs and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection

from robench.reporting.formatting import interval, shown
from robench.tables import Cell, Column, Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "–": "--",
    "∞": r"$\infty$",
    "±": r"$\pm$",
    "\N{NO-BREAK SPACE}": "~",
    # Ligatures would turn these into other characters; brackets would be read as the option of a line's end.
    "-": "{-}",
    "[": "{[}",
    "]": "{]}",
}


def latex_text(text: str) -> str:
    """Return text that LaTeX prints as it stands, whatever it is; line breaks and control characters become spaces."""
    plain = "".join(character if character.isprintable() or character == "\xa0" else " " for character in text)
    return re.sub(r"(?<![-])\{-\}(?!\{-\})", "-", "".join(_SPECIAL.get(character, character) for character in plain))


def measured_latex(table: Table) -> str:
    """Return what of a table fits on a page of paper: ranks, models, shares and distances, without labels and costs."""
    return table_latex(table, roles={"rank", "model", "accuracy", "distance"})


def table_latex(table: Table, *, roles: Collection[str] | None = None) -> str:
    """Return a `table` environment: the numbers as pages show them, the best ranked ones bold, notes below it.

    The ranking column stands with its 95 % interval; shares are in percent. Columns of other `roles` are left out;
    None leaves out none.
    """
    columns = [column for column in table.columns if roles is None or column.role in roles]
    ranks = list(table.column(next(column.key for column in table.columns if column.role == "rank")))
    ranked = zip(ranks, table.column(table.ranked_by), strict=True)
    best = next((cell.value for rank, cell in ranked if rank.value == 1), None)
    lines = [
        f"% {_comment(table.name)}, by robench leaderboard; needs \\usepackage{{booktabs}}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}: {latex_text(table.caption)}.}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9.-]', '-', table.name)}}}",
        rf"\begin{{tabular}}{{@{{}}{''.join(map(_alignment, columns))}@{{}}}}",
        r"\toprule",
        " & ".join(map(_head, columns)) + r" \\",
        r"\midrule",
    ]
    for rank, row in zip(ranks, table.rows, strict=True):
        cells = []
        for column, cell in zip(table.columns, row, strict=True):
            if column not in columns:
                continue
            ranking = column.key == table.ranked_by
            text = _cell(cell, column, with_interval=ranking)
            bold = ranking and rank.value is not None and cell.value == best
            cells.append(rf"\textbf{{{text}}}" if bold else text)
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {note}" for note in _notes(table)]
    return "\n".join([*lines, r"\end{table}", ""])


def _comment(text: str) -> str:
    return " ".join(text.split())


def _alignment(column: Column) -> str:
    return "l" if column.role in {"model", "label"} else "r"


def _head(column: Column) -> str:
    return latex_text(column.title) + (r" (\%)" if column.role == "accuracy" else "")


def _cell(cell: Cell, column: Column, *, with_interval: bool) -> str:
    text = latex_text(shown(cell, column))
    if with_interval and cell.low is not None and cell.high is not None:
        text += rf" {{\scriptsize({latex_text(interval(cell, column))})}}"
    return text


def _notes(table: Table) -> list[str]:
    """Return why rows have no rank."""
    keys = {column.role: column.key for column in table.columns}
    pairs = zip(table.column(keys["model"]), table.column(keys["rank"]), strict=True)
    return [
        f"{latex_text(str(model.value))}: {latex_text(rank.note or '')}." for model, rank in pairs if rank.value is None
    ]

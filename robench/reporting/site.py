"""The leaderboards' site: a page and a CSV file per table, a page per model, and an index; all plain files.

The pages are self-contained (no network, no other file needed to show them), and depend on the records and
cards alone: the same ones give the same bytes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from robench import catalog
from robench.papers.definitions import pages_in
from robench.reporting import formatting
from robench.reporting.csv_files import curves_csv, grid_csv, table_csv
from robench.reporting.curves import step_chart, training_charts
from robench.store import Results, Store, StoredCard, StoredRecord, file_name, publish
from robench.tables import Cell, Column, Curves, Table, natural


def write_leaderboards(
    names: Iterable[str], store: Store, cards: Mapping[str, StoredCard], out_dir: Path
) -> list[Path]:
    """Write the leaderboards `names` as HTML and CSV, the model pages and `index.html`; return the files.

    Raises UnknownName for a leaderboard that there is not, UserError for damaged records, StorageError where
    `out_dir` cannot be written. Everything is rendered before anything is written.
    """
    results = store.results(cards)
    plugins = {name: catalog.find("leaderboards", name) for name in dict.fromkeys(names)}
    boards = {name: plugin.load().build(results) for name, plugin in plugins.items()}
    site = Site(out_dir, results)
    pages: dict[Path, str] = {out_dir / "index.html": site.index(boards)}
    for tables in boards.values():
        for table in tables:
            pages[out_dir / f"{table.name}.html"] = site.table(table)
            pages[out_dir / f"{table.name}.csv"] = table_csv(table)
            pages |= {out_dir / name: text for name, text in site.figures(table).items()}
    for model in cards:
        pages[site.model_page(model)] = site.model(model, [t for tables in boards.values() for t in tables])
    for path, text in pages.items():
        publish(path, text.encode())
    return list(pages)


class Site:
    """Renders pages that link to each other and to the records."""

    def __init__(self, folder: Path, results: Results) -> None:
        """Render for `folder`, which links are relative to."""
        self.folder, self.results = folder, results

    def model_page(self, model: str) -> Path:
        """Return the page of a model."""
        return self.folder / "models" / f"{file_name(model)}.html"

    def index(self, boards: Mapping[str, list[Table]]) -> str:
        """Return the page that lists all tables and models."""
        boards = {name: tables for name, tables in boards.items() if tables} or boards
        summaries = {name: catalog.find("leaderboards", name).facts["summary"] for name in boards}
        return self._render(
            "index.html",
            self.folder / "index.html",
            boards=boards,
            summaries=summaries,
            cards=[stored.card for stored in self.results.cards.values()],
            leaders={t.name: t.rows[0] for tables in boards.values() for t in tables if _is_ranked(t)},
            papers=pages_in(self.folder),
        )

    def table(self, table: Table) -> str:
        """Return a table's page."""
        page = self.folder / f"{table.name}.html"
        return self._render("table.html", page, table=table, strip=_strip, step_chart=step_chart)

    def figures(self, table: Table) -> dict[str, str]:
        """Return the files of a table's figures by name: the numbers of each, and curves as a drawing."""
        files = {}
        for figure in table.figures:
            stem = f"{table.name}-{figure.name}"
            if isinstance(figure, Curves):
                files[f"{stem}.csv"] = curves_csv(figure)
                files[f"{stem}.svg"] = self._render("curves.svg", self.folder, figure=figure, chart=step_chart(figure))
            else:
                files[f"{stem}.csv"] = grid_csv(figure)
        return files

    def model(self, model: str, tables: Iterable[Table]) -> str:
        """Return a model's page: how it was made, how it stands, how to use it."""
        stored = self.results.cards[model]
        log = stored.folder / "training.csv"
        return self._render(
            "model.html",
            self.model_page(model),
            card=stored.card,
            charts=training_charts(log) if log.exists() else [],
            recipe=json.dumps(stored.card.recipe, indent=2, ensure_ascii=False),
            answers=self._answers(stored),
            places=[
                (table, cell.value)
                for table in tables
                for cell, named in zip(_of_role(table, "rank"), _of_role(table, "model"), strict=True)
                if named.model == model
            ],
        )

    def _answers(self, stored: StoredCard) -> list[StoredRecord]:
        """Return the records of the weights that the card describes."""
        card = stored.card
        identity = card.id, card.weights.sha256
        own = [
            stored
            for stored in self.results.records
            if (stored.record.spec.model.id, stored.record.spec.model.weights_sha256) == identity
        ]
        return sorted(own, key=_question)

    def _render(self, template: str, page: Path, **values: Any) -> str:
        def link(target: Path) -> str:
            return quote(Path(os.path.relpath(target, page.parent)).as_posix())

        return (
            environment()
            .get_template(template)
            .render(link=link, folder=self.folder, model_page=self.model_page, **values)
        )


def _question(stored: StoredRecord) -> list[list[tuple[int, str]]]:
    """Return a key that puts what was asked of a model in a reader's order."""
    spec = stored.record.spec
    asked = (spec.examples.dataset, spec.threat, spec.attack.title, spec.seed, spec.identity)
    return [natural(str(part)) for part in asked]


def _of_role(table: Table, role: str) -> list[Cell]:
    key = next(column.key for column in table.columns if column.role == role)
    return list(table.column(key))


def _is_ranked(table: Table) -> bool:
    return any(cell.value == 1 for cell in _of_role(table, "rank"))


def _strip(table: Table, row: tuple[Cell, ...]) -> list[tuple[Column, Cell]]:
    """Return the shares of a row besides the one that ranks: marks on its scale from 0 to 100 %."""
    pairs = zip(table.columns, row, strict=True)
    return [
        (column, cell)
        for column, cell in pairs
        if column.role == "accuracy" and column.key != table.ranked_by and cell.value is not None
    ]


@functools.cache
def environment() -> jinja2.Environment:
    """Return where templates are found, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("percent", "count", "duration", "size", "shown", "interval", "sortable"):
        environment.filters[name] = getattr(formatting, name)
    return environment

"""The leaderboards' site: a page per table with its numbers as files beside it, a page per model, and an index.

The pages are self-contained (no network, no other file needed to show them), work from a disk as from a server, and
depend on the reports folder and the cards alone: the same ones give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from robench import catalog
from robench.covariances import Covariance, block_means
from robench.datasets import ImageSet
from robench.errors import UserError
from robench.papers.definitions import Paper, pages_in
from robench.records import Examples, ModelCard
from robench.reporting.comparison import page_data, pictured_examples
from robench.reporting.csv_files import curves_csv, grid_csv, table_csv
from robench.reporting.curves import Drawing, curves_chart, training_charts
from robench.reporting.gallery import Gallery, can_be_shown, gallery
from robench.reporting.inventory import add_files
from robench.reporting.json_files import table_json
from robench.reporting.latex import measured_latex
from robench.reporting.model_figures import model_drawings
from robench.reporting.pictures import Pictures
from robench.reporting.rendering import environment
from robench.store import (
    Results,
    Store,
    StoredCard,
    StoredCertificate,
    StoredRecord,
    StoredTransfer,
    file_name,
    publish,
)
from robench.tables import Cell, Column, Curves, Table, natural

#: What a table is written as besides its page: the ending of the file, how it is made, its name on the page.
DOWNLOADS: dict[str, tuple[str, Callable[[Table], str], str]] = {
    "csv": ("csv", table_csv, "CSV"),
    "json": ("json", table_json, "JSON"),
    "latex": ("tex", measured_latex, "LaTeX"),
}
FORMATS = ("html", *DOWNLOADS)

#: A column of labels can be filtered by if it has so many different ones at most.
_MOST_CHOICES = 16
#: Rows of a grid on a page.
_LONGEST_GRID = 240
#: Evaluations of one model whose adversarial examples are shown.
_GALLERIES = 4


def write_leaderboards(
    names: Iterable[str],
    store: Store,
    cards: Mapping[str, StoredCard],
    out_dir: Path,
    *,
    formats: Collection[str] = FORMATS,
    open_images: Callable[[Examples], ImageSet] | None = None,
    results: Results | None = None,
    paper_pages: Collection[Path] | None = None,
) -> list[Path]:
    """Write the leaderboards `names` and return the files.

    `html` is the site: pages of tables and models, `index.html`, and the figures' numbers and drawings; the others are
    one file for each table, which its page offers. Examples are shown as pictures where `open_images` has them, or had
    them before; pictures that are new are kept in the reports folder (:mod:`robench.reporting.pictures`). The index
    links to the papers' pages among `paper_pages`, None: to those that are in `out_dir`. The files are added to the
    folder's inventory (:mod:`robench.reporting.inventory`).

    Raises UnknownName for a leaderboard that there is not, UserError for damaged records or a damaged inventory,
    StorageError where `out_dir` cannot be written. Everything is rendered before anything is written.
    """
    results = store.results(cards) if results is None else results
    plugins = {name: catalog.find("leaderboards", name) for name in dict.fromkeys(names)}
    boards = {name: plugin.load().build(results) for name, plugin in plugins.items()}
    tables = [table for own in boards.values() for table in own]
    downloads = {end: (made, title) for name, (end, made, title) in DOWNLOADS.items() if name in formats}
    pages = {out_dir / f"{table.name}.{end}": made(table) for table in tables for end, (made, _) in downloads.items()}
    if "html" in formats:
        pictures = Pictures(store.root, open_images)
        site = Site(out_dir, results, pictures, {end: title for end, (_, title) in downloads.items()})
        papers = [p for p in pages_in(out_dir) if paper_pages is None or out_dir / p[0] in paper_pages]
        pages[out_dir / "index.html"] = site.index(boards, papers)
        for table in tables:
            pages |= {out_dir / name: text for name, text in site.table(table).items()}
        for model in site.models.values():
            pages |= site.model(model, tables)
    add_files(out_dir, pages)
    if "html" in formats:
        for path, text in pictures.files().items():
            publish(path, text.encode())
    for path, text in pages.items():
        publish(path, text.encode(), durable=False)
    return list(pages)


@dataclass
class Model:
    """All that is known of a model by one name."""

    name: str
    card: StoredCard | None
    records: list[StoredRecord] = field(default_factory=list)
    """Of the weights that the card describes; all where there is no card."""
    certificates: list[StoredCertificate] = field(default_factory=list)
    transfers: list[StoredTransfer] = field(default_factory=list)
    former: list[StoredRecord] = field(default_factory=list)
    """Of other weights than the card's."""


def models_of(results: Results) -> dict[str, Model]:
    """Return every model that has a card or an answer, by name, in the order of names."""
    found = {name: Model(name, card) for name, card in results.cards.items()}

    def of(name: str) -> Model:
        return found.setdefault(name, Model(name, None))

    for stored in results.records:
        identity = stored.record.spec.model
        model = of(identity.id)
        former = model.card is not None and identity.weights_sha256 != model.card.card.weights.sha256
        (model.former if former else model.records).append(stored)
    for certificate in results.certificates:
        identity = certificate.record.spec.model
        model = of(identity.id)
        if model.card is None or identity.weights_sha256 == model.card.card.weights.sha256:
            model.certificates.append(certificate)
    for transfer in results.transfers:
        identity = transfer.record.spec.target
        model = of(identity.id)
        if model.card is None or identity.weights_sha256 == model.card.card.weights.sha256:
            model.transfers.append(transfer)
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


class Site:
    """Renders pages that link to each other and to the records."""

    def __init__(self, folder: Path, results: Results, pictures: Pictures, downloads: Mapping[str, str]) -> None:
        """Render for `folder`, which links are relative to; `downloads` are what tables are written as, by ending."""
        self.folder, self.results, self.pictures, self.downloads = folder, results, pictures, downloads
        self.models = models_of(results)
        self._standings: dict[str, list[tuple[Table, Any]]] | None = None

    def model_page(self, model: str) -> Path:
        """Return the page of a model."""
        return self.folder / "models" / f"{file_name(model)}.html"

    def index(self, boards: Mapping[str, list[Table]], papers: Sequence[tuple[str, Paper]]) -> str:
        """Return the page that lists all tables, these papers' pages, and all models."""
        boards = {name: tables for name, tables in boards.items() if tables} or boards
        # What most readers come for stands first.
        boards = dict(sorted(boards.items(), key=lambda item: item[0] != "robustness"))
        summaries = {name: catalog.find("leaderboards", name).facts["summary"] for name in boards}
        return self._render(
            "index.html",
            self.folder / "index.html",
            boards=boards,
            summaries=summaries,
            leaders={t.name: t.rows[0] for tables in boards.values() for t in tables if _is_ranked(t)},
            papers=papers,
        )

    def table(self, table: Table) -> dict[str, str]:
        """Return a table's page, the page that compares two of its models, and its figures, by the files' names."""
        page = f"{table.name}.html"
        files = {
            page: self._render(
                "table.html",
                self.folder / page,
                table=table,
                strip=_strip,
                curves_chart=curves_chart,
                downloads=self.downloads,
                choices=_choices(table),
                longest=_LONGEST_GRID,
            ),
            **self._figures(table),
        }
        if table.comparison:
            album = self.pictures.album(table.comparison.examples, pictured_examples(table.comparison))
            page = f"{table.name}-compare.html"
            data = page_data(table, table.comparison, album)
            files[page] = self._render("compare.html", self.folder / page, table=table, data=data)
        return files

    def _figures(self, table: Table) -> dict[str, str]:
        """Return the files of a table's figures by name: the numbers of each, and curves as a drawing."""
        files = {}
        for figure in table.figures:
            stem = f"{table.name}-{figure.name}"
            if isinstance(figure, Curves):
                files[f"{stem}.csv"] = curves_csv(figure)
                chart = curves_chart(figure)
                files[f"{stem}.svg"] = self._render("curves.svg", self.folder, figure=figure, chart=chart)
            else:
                files[f"{stem}.csv"] = grid_csv(figure)
        return files

    def model(self, model: Model, tables: Iterable[Table]) -> dict[Path, str]:
        """Return a model's page (how it was made, how it stands, how to use it) and its figures' numbers."""
        page = self.model_page(model.name)
        card = model.card.card if model.card else None
        log = model.card.folder / "training.csv" if model.card else None
        answers = sorted(model.records, key=_question)
        drawings = model_drawings(answers, model.certificates, self.results.outcomes)
        if model.card and (covariance := _covariance(model.card)):
            drawings.append(covariance)
        if card and (regions := _regions(card, self.pictures.root)):
            drawings.append(regions)
        if card and (lines := _lines(card, self.pictures.root)):
            drawings.append(lines)
        stems = {drawing.name: f"{file_name(model.name)}-{drawing.name}.csv" for drawing in drawings}
        text = self._render(
            "model.html",
            page,
            name=model.name,
            card=card,
            loading=_loading(model),
            log=log if log and log.exists() else None,
            charts=training_charts(log) if log and log.exists() else [],
            recipe=json.dumps(card.recipe, indent=2, ensure_ascii=False) if card else "",
            answers=answers,
            former=sorted(model.former, key=_question),
            certificates=model.certificates,
            transfers=model.transfers,
            drawings=drawings,
            stems=stems,
            galleries=self._galleries(answers),
            places=self._places(tables).get(model.name, []),
        )
        return {page: text, **{page.parent / stems[drawing.name]: drawing.csv for drawing in drawings}}

    def _galleries(self, answers: Iterable[StoredRecord]) -> list[Gallery]:
        """Return the adversarial examples of the first evaluations whose images were kept."""
        found: list[Gallery] = []
        for stored in answers:
            if len(found) < _GALLERIES and can_be_shown(stored.record, self.pictures):
                shown = gallery(stored.record, self.results.outcomes(stored.record), self.pictures)
                found += [shown] if shown else []
        return found

    def _places(self, tables: Iterable[Table]) -> Mapping[str, list[tuple[Table, Any]]]:
        """Return where each model stands: tables with its rank, None where it has none."""
        if self._standings is None:
            self._standings = defaultdict(list)
            for table in tables:
                for rank, named in zip(_of_role(table, "rank"), _of_role(table, "model"), strict=True):
                    name = str(named.model or named.value)
                    # Where two weights share a name, only those that the card describes are the model's.
                    if named.model or name not in self.results.cards:
                        self._standings[name].append((table, rank.value))
        return self._standings

    def _render(self, template: str, page: Path, **values: Any) -> str:
        def link(target: Path) -> str:
            return quote(Path(os.path.relpath(target, page.parent)).as_posix())

        return (
            environment()
            .get_template(template)
            .render(link=link, folder=self.folder, model_page=self.model_page, models=self.models, **values)
        )


def _loading(model: Model) -> str | None:
    """Return how the model is loaded in three lines of Python; None where nobody knows its weights."""
    if model.card is None:
        return None
    shape = ", ".join(map(str, model.card.card.input_shape))
    return (
        "from robench import checkpoints, registry, workspace\n"
        f"folder, card = registry.find_card({model.name!r}, workspace.Workspace.locate())\n"
        "model = checkpoints.load_card_model(card, folder)"
        f"  # images (N, {shape}) in [0, 1] -> logits (N, {model.card.card.num_classes})"
    )


def _covariance(stored: StoredCard) -> Drawing | None:
    """Return what structured gradient regularisation has learned, if the model has it and it is at hand."""
    card: ModelCard = stored.card
    if card.defense_state is None or not (stored.folder / card.defense_state.file).is_file():
        return None
    from robench.reporting import covariance

    try:
        found = covariance.read_covariance(card, stored.folder)
    except UserError:
        if "covariance" in str(card.recipe):
            raise
        return None
    picture = covariance.covariance_picture(found, side=covariance.PAGE_MAP)
    return Drawing(
        name="covariance",
        title="Covariance of the attacks it saw",
        caption=f"Over pairs of pixels, orange where negative, green where positive{_blocks(found)}"
        if picture
        else "By how far apart two pixels are, for each pair of channels",
        charts=covariance.covariance_charts(found),
        picture=picture,
        csv=covariance.covariance_csv(found, side=covariance.PAGE_MAP),
    )


def _regions(card: ModelCard, reports: Path) -> Drawing | None:
    """Return what a classifier of a plane answers everywhere in it, if these weights were asked."""
    from robench.reporting import regions

    path = regions.regions_path(reports, card.id)
    if not path.is_file():
        return None
    found = regions.read_regions(path)
    if found.weights_sha256 != card.weights.sha256:
        return None
    panels = [regions.Panel(card.id, found, card.threat)]
    return Drawing(
        name="regions",
        title="Decision regions",
        caption="What it answers at each of the 65,536 points that the plane has in 8 bits, and where the test images "
        "lie" + ("; in the corner the ball that it was trained against" if card.threat else ""),
        svg=regions.regions_svg(panels),
        csv=regions.regions_csv(panels),
    )


def _lines(card: ModelCard, reports: Path) -> Drawing | None:
    """Return outputs along straight lines to adversarial images, if these weights were asked."""
    from robench.reporting.lines import lines_drawing
    from robench.softmax_lines import lines_path, read_lines

    path = lines_path(reports, card.id)
    if not path.is_file():
        return None
    found = read_lines(path)
    return lines_drawing(found) if found.spec.model.weights_sha256 == card.weights.sha256 else None


def _blocks(found: Covariance) -> str:
    """Say how many cells of a large matrix are drawn as one."""
    from robench.reporting.covariance import PAGE_MAP

    side = block_means(found.values, PAGE_MAP)[1]
    return f"; each cell is the mean of {side} x {side}" if side > 1 else ""


def _choices(table: Table) -> list[tuple[int, str, list[str]]]:
    """Return the columns of labels that rows can be filtered by: position, title, and the labels there are."""
    found = []
    for place, column in enumerate(table.columns):
        labels = sorted({str(row[place].value) for row in table.rows if row[place].value is not None}, key=natural)
        if column.role == "label" and column.key != "group" and 1 < len(labels) <= _MOST_CHOICES:
            found.append((place, column.title, labels))
    return found


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

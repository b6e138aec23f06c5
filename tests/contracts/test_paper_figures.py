"""What every figure of a paper keeps: it can be read, asked and drawn, and says what it lacks."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from robench import catalog, planning
from robench.cli.browsing import show
from robench.errors import UserError
from robench.papers.definitions import has_recipe, known_tables, load_paper, scaled_recipe, threats_of
from robench.papers.figures import PaperFigure, drawing_settings, known_figures, load_figure
from robench.records import Decision
from robench.reporting import write_papers
from robench.store import Store

FIGURES = list(catalog.plugins("figures"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers' pages without any record."""
    place = tmp_path_factory.mktemp("site")
    write_papers(known_tables(), Store(place / "reports"), {}, place / "out")
    return place / "out"


def section(site: Path, name: str) -> str:
    page = (site / f"paper-{load_figure(name).paper}.html").read_text()
    found = re.search(rf'<section class="paper-figure" id="{name}">.*?</section>', page, re.DOTALL)
    assert found, name
    return found[0]


def test_the_papers_list_their_figures() -> None:
    assert sorted(known_figures()) == sorted(FIGURES)
    for paper in catalog.plugins("papers"):
        assert all(load_figure(name).paper == paper for name in load_paper(paper).figures)
    sources = {(load_figure(name).paper, load_figure(name).source) for name in FIGURES}
    assert len(sources) == len(FIGURES)
    numbers = {
        paper: {int(re.findall(r"\d+", load_figure(name).source)[0]) for name in load_paper(paper).figures}
        for paper in catalog.plugins("papers")
    }
    assert {paper: max(found) for paper, found in numbers.items()} == {
        "atent": 3,
        "emr": 6,
        "heatsmoothing": 5,
        "sgr": 8,
    }
    assert all(found == set(range(1, max(found) + 1)) for found in numbers.values())


@pytest.mark.parametrize("name", FIGURES)
def test_every_line_can_be_asked_and_made(name: str) -> None:
    figure = load_figure(name)
    if figure.drawing:
        drawing_settings(figure)
    for panel in figure.panels:
        for line in panel.lines:
            for place in panel.places or figure.places or (None,):
                facts = figure.asked(panel, line, place)
                assert facts.needs or has_recipe(facts.recipe), f"{name}: {line.title} has no recipe {facts.recipe}"
                decision = Decision(top_k=facts.top_k, votes=facts.votes, sigma=facts.sigma)
                for threat in threats_of(facts) if facts.attack else ():
                    planning.identify_attack(facts.attack or "", threat, decision)
                if facts.certificate:
                    planning.identify_certificate(facts.certificate)
                table = line.table or figure.table
                for scale in figure.table_of(line).scales if table else ():  # type: ignore[union-attr]
                    scaled_recipe(facts.recipe or "", facts.changes, scale, str(table))


@pytest.mark.parametrize("name", FIGURES)
def test_without_records_a_figure_is_computed_or_says_what_it_takes(name: str, site: Path) -> None:
    figure, text = load_figure(name), section(site, name)
    computed = bool(figure.drawing) and not drawing_settings(figure)[0].facts.get("measures", True)
    assert figure.summary in html.unescape(text)
    if computed:
        assert '<svg class="chart' in text or "<img" in text
        assert "Not drawn yet" not in text
        return
    if figure.beside:
        assert f'href="#{figure.beside}"' in text
        return
    assert '<svg class="chart' not in text
    assert "<img" not in text
    assert "Not drawn yet" in text
    assert not (site / "paper-figures" / f"{name}.csv").exists()
    commands = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<code>(.*?)</code>", text)]
    assert figure.needs or any(c.startswith("robench ") for c in commands)


@pytest.mark.parametrize("name", FIGURES)
def test_every_drawing_has_a_text(name: str, site: Path) -> None:
    text = section(site, name)
    for drawing in re.findall(r'<svg class="chart[^>]*>', text):
        assert 'role="img"' in drawing
        described = re.search(r'aria-describedby="([^"]+)"', drawing)
        assert described
        assert re.search(rf'<desc id="{re.escape(described[1])}">[^<]{{10,}}</desc>', text)
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img[^>]*>", text))


@pytest.mark.parametrize("name", [*FIGURES, *catalog.plugins("drawings")])
def test_it_can_be_shown(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show(name, workspace=tmp_path)
    assert name in capsys.readouterr().out


def test_pages_stay_small(site: Path) -> None:
    assert all(path.stat().st_size < 1_500_000 for path in site.glob("paper-*.html"))


def test_a_figure_refuses_what_it_cannot_mean() -> None:
    given = {"paper": "emr", "source": "Figure 9", "summary": "s", "caption": "c"}
    with pytest.raises(ValueError, match="needs a drawing"):
        PaperFigure.model_validate(given)
    lines = [{"title": "a", "row": "st-0.01", "column": "nothing"}]
    panels = [{"title": "p", "lines": lines}]
    with pytest.raises(ValueError, match=r"no cell emr-1\[st-0.01\].nothing"):
        PaperFigure.model_validate({**given, "drawing": "effective-margins", "table": "emr-1", "panels": panels})
    with pytest.raises(ValueError, match="there is no table emr-77"):
        PaperFigure.model_validate({**given, "drawing": "effective-margins", "table": "emr-77"})
    with pytest.raises(UserError, match="did you mean"):
        drawing_settings(PaperFigure.model_validate({**given, "drawing": "effective-margin"}))
    with pytest.raises(UserError, match="no parameter stepz"):
        drawing_settings(
            PaperFigure.model_validate({**given, "drawing": "smoothing-iterates", "parameters": {"stepz": [1]}})
        )

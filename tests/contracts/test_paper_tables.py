"""What every paper's table keeps: it can be read, asked, computed, and shows all that is printed."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from robench import catalog, planning
from robench.papers.claims import judge_paper
from robench.papers.definitions import (
    changes_at,
    has_recipe,
    known_tables,
    load_paper,
    load_table,
    model_of,
    scaled_name,
    scaled_recipe,
    threats_of,
)
from robench.papers.filling import Filler
from robench.papers.work import askings, evaluation_passes, makings, movings
from robench.recipe import load_recipe
from robench.records import Decision
from robench.reporting import write_papers
from robench.smoothing_bounds import refutes_at_most, share_needed
from robench.store import Store

TABLES = list(catalog.plugins("tables"))
PAPERS = list(catalog.plugins("papers"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers' pages without any record."""
    place = tmp_path_factory.mktemp("site")
    write_papers(TABLES, Store(place / "reports"), {}, place / "out")
    return place / "out"


def test_the_four_papers_have_all_their_tables_and_claims() -> None:
    assert sorted(PAPERS) == ["atent", "emr", "heatsmoothing", "sgr"]
    assert sorted(known_tables()) == sorted(TABLES)
    assert len(TABLES) == 32
    claims = [claim.id for paper in PAPERS for claim in load_paper(paper).claims]
    assert len(claims) == len(set(claims)) == 43
    for paper in PAPERS:
        assert all(load_table(table).paper == paper for table in load_paper(paper).tables)


@pytest.mark.parametrize("name", TABLES)
def test_every_printed_value_appears(name: str, site: Path) -> None:
    table = load_table(name)
    page = (site / f"paper-{table.paper}.html").read_text()
    section = re.search(rf'<section class="paper-table" id="{name}">.*?</section>', page, re.DOTALL)
    assert section
    lines = (site / f"{name}.csv").read_text().splitlines()[1:]
    tex = (site / f"{name}.tex").read_text()
    shown = [html.unescape(value) for value in re.findall(r'class="was[^"]*" title="printed">([^<]*)<', section[0])]
    assert shown == ["–" if text == "-" else text for row in table.rows for text in row.printed]
    assert len(lines) == len(shown)
    for row in table.rows:
        assert html.escape(row.title) in section[0] or row.title in html.unescape(section[0])
        for text in row.printed:
            assert any(text in line for line in lines)
            assert "--" in tex if text == "-" else text.replace("_", r"\_") in tex


@pytest.mark.parametrize("name", TABLES)
def test_every_question_can_be_asked(name: str) -> None:
    for row, column, facts in load_table(name).entries():
        where = f"{name}[{row.id}].{column.id}"
        threats = threats_of(facts)
        if facts.attack and facts.needs is None and facts.measure not in {"clean", "setting"}:
            assert threats, where
            decision = Decision(top_k=facts.top_k, votes=facts.votes, sigma=facts.sigma)
            for threat in threats:
                planning.identify_attack(facts.attack, threat, decision)
        if facts.certificate and facts.needs is None:
            planning.identify_certificate(facts.certificate)
        assert [t.radius for t in threats] == sorted(t.radius for t in threats), where
        assert not facts.changes or facts.model, f"{where}: a changed recipe needs a name of its own"


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in TABLES for scale in ("paper", *load_table(name).scales)]
)
def test_recipes_resolve_and_costs_are_known(name: str, scale: str) -> None:
    for making in makings(name, scale):
        if making.recipe is None:
            assert (making.problem or "").startswith("no recipe"), making
            continue
        assert making.command.startswith("robench train ")
        if scale != "paper":
            assert making.model.endswith(f"-{scale}")
            assert making.recipe.scale
            assert f"--out {making.model}" in making.command
    for asking in askings(name, scale):
        assert asking.attacks or asking.certificates
    assert all(moving.pairs for moving in movings(name, scale))
    for passes in evaluation_passes(name, scale).values():
        assert all(p and p.gradient + p.forward > 0 for p in passes)


@pytest.mark.parametrize("scale", ["paper", "reduced", "smoke"])
def test_a_model_is_the_same_in_all_tables(scale: str) -> None:
    made: dict[str, tuple[str, str]] = {}
    for name in TABLES:
        table = load_table(name)
        if scale != "paper" and scale not in table.scales:
            continue
        for _, _, facts in table.entries():
            if facts.recipe is None or facts.needs or not has_recipe(facts.recipe):
                continue
            recipe = scaled_recipe(facts.recipe, facts.changes, scale, name)
            text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
            model = scaled_name(model_of(facts) or "", scale)
            earlier, where = made.setdefault(model, (text, name))
            assert earlier == text, f"{model} is another one in {name} than in {where}"


@pytest.mark.parametrize("name", TABLES)
def test_a_scale_is_the_same_for_all_rows_on_a_data_set(name: str) -> None:
    """Same epochs, same data, same choice of the epoch."""
    for scale, stated in load_table(name).scales.items():
        recipes = [m.recipe for m in makings(name, scale) if m.recipe]
        assert set(stated.datasets) <= {recipe.dataset for recipe in recipes}
        for key in ("dataset", "epochs", "train_examples", "batch_size", "selection.metric", "selection.attack"):
            group, _, field = key.partition(".")
            told = [(r.dataset, getattr(getattr(r, group), field) if field else getattr(r, group)) for r in recipes]
            assert len(set(told)) == len({dataset for dataset, _ in told}), (name, scale, key, told)


def test_a_scale_may_be_another_on_another_data_set(site: Path) -> None:
    """Table 8 has an MLP on MNIST and a CNN on CIFAR-10."""
    recipes = {m.recipe.dataset: m.recipe for m in makings("emr-8", "reduced") if m.recipe}
    table = load_table("emr-8")
    stated = table.scales["reduced"]
    for dataset in ("mnist", "cifar10"):
        changes = dict(change.split("=") for change in stated.of(dataset).changes)
        assert str(recipes[dataset].epochs) == changes["epochs"]
        assert str(recipes[dataset].train_examples) == changes["train_examples"]
        assert stated.of(dataset).says in (recipes[dataset].scale or "")
    assert (table.examples_at("reduced", "mnist"), table.examples_at("reduced", "cifar10")) == (10_000, 5_000)
    assert table.examples_at("paper", "cifar10") is None
    passes = evaluation_passes("emr-8", "reduced")
    margins = {model: max(p.forward for p in passes[f"emr-{model}-st-emr-reduced"] if p) for model in ("mlp", "cnn")}
    assert margins["mlp"] == 2 * margins["cnn"]
    said = html.unescape((site / "paper-emr.html").read_text())
    assert "on cifar10 epochs=5, train_examples=20000, batch_size=32" in said
    assert "emr_cnn_half instead of emr_cnn" in said


def test_milestones_keep_their_share_and_a_teacher_its_scale() -> None:
    full = load_recipe("heat-cifar10")
    small = scaled_recipe("heat-cifar10", (), "reduced", "heat-5")
    assert small.teacher == "heat-baseline-cifar10-reduced"
    assert [m / small.epochs for m in small.schedule.milestones] == pytest.approx(
        [m / full.epochs for m in full.schedule.milestones]
    )
    order = [m.model for m in makings("heat-5", "reduced")]
    assert order.index("heat-baseline-cifar10-reduced") < order.index("heat-cifar10-reduced")
    changes = changes_at("heat-cifar10", (), "reduced", "heat-5")
    assert any(change.startswith("scale=3 of 200 epochs") for change in changes)


def test_samples_reach_the_radius_that_is_asked_of_them() -> None:
    """A radius beyond sigma * Phi^-1(alpha^(1 / n)) is certified for nothing, whatever the model (Cohen, theorem 1)."""
    reaches: list[float | str] = []
    for name in TABLES:
        for row, column, facts in load_table(name).entries():
            if facts.measure != "certified":
                continue
            certificate = planning.identify_certificate(facts.certificate or "")
            asked = certificate.parameters
            if certificate.entry == "anytime":
                assert (asked["goal"], asked["at"]) == ("decision", facts.radius), (name, row.id, column.id)
                every, needed = np.array([asked["n"]]), float(share_needed(asked["at"], asked["sigma"]))
                assert refutes_at_most(every, every, needed, asked["alpha"]).all(), (name, row.id, column.id)
                reaches.append("anytime")
            else:
                reach = asked["sigma"] * NormalDist().inv_cdf(asked["alpha"] ** (1 / asked["n"]))
                assert reach > (facts.radius or 0.0), (name, row.id, column.id, reach)
                reaches.append(round(reach, 3))
    assert set(reaches) == {0.384, "anytime"}


def test_claims_are_decided_by_the_printed_values(tmp_path: Path) -> None:
    """Every expression names cells that there are; what the printed values say is known but for the lost ones."""
    filler = Filler(Store(tmp_path).results({}))
    said = {j.claim.id: j for paper in PAPERS for j in judge_paper(paper, filler)}
    for judged in said.values():
        expressed = bool(judged.claim.measure or judged.claim.holds)
        assert (judged.printed_verdict != "not measured") == expressed, judged.claim.id
        assert expressed or judged.claim.needs
    # The papers' own tables contradict these.
    assert {i for i, j in said.items() if j.printed_verdict == "does not"} == {"atent-c4", "atent-c11"}
    # Without a record only what needs none is known.
    assert {i for i, j in said.items() if j.verdict != "not measured"} == {
        *("atent-c4", "atent-c12", "atent-c13"),
        *("heat-c6", "heat-c7", "heat-c8"),
    }


def test_the_claims_page_counts_every_verdict(site: Path) -> None:
    page = (site / "claims.html").read_text()
    counts = re.findall(r"(\d+) hold, (\d+) do not, (\d+) undecided, (\d+) not measured\.", page)
    assert sum(int(count) for paper in counts for count in paper) == 43
    assert len(counts) == 4
    assert ".verdict-undecided" in page

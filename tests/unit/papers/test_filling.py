"""Our numbers in the papers' tables: from the right records, and from no other."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from synthetic import (
    CERTIFIED_RADIUS,
    certificate_spec,
    diagnostic,
    first_of,
    put_certificate,
    put_minimum_norm,
    put_transfer,
)

from robench.catalog import plugins
from robench.errors import UnsafeFile
from robench.papers.claims import judge
from robench.papers.definitions import load_paper, load_table, scaled_recipe
from robench.papers.filling import FilledTable
from robench.reporting import write_leaderboards, write_papers
from robench.statistics import proportion
from tests.unit.papers.worlds import CW, PGD, World, full_world, question, sha

GOLDEN = Path(__file__).parents[2] / "golden" / "papers"


def numbers(filled: FilledTable) -> dict[tuple[str, str], object]:
    """Everything that a cell shows but its marks, by row and column."""
    return {
        (row.id, column.id): (
            cell.value,
            cell.low,
            cell.high,
            cell.n,
            cell.records,
            cell.missing,
            cell.notes,
            cell.scale,
        )
        for row, cells in filled.lines()
        for column, cell in zip(filled.table.columns, cells, strict=True)
    }


def test_a_number_is_what_the_outcomes_say(tmp_path: Path) -> None:
    world = full_world(tmp_path)
    filled = world.fill()
    cell = filled.cell("trades", "linf_pgd20")
    (stored,) = [s for s in world.results.records if s.path == cell.records[0]]
    rows = world.results.outcomes(stored.record)
    assert stored.record.spec.model.id == "trades-mnist"
    assert cell.value == 100 * rows["robust"].mean() == 96.07
    exact = proportion(int(rows["robust"].sum()), len(rows["robust"]))
    assert cell.low == pytest.approx(100 * stored.record.robust.wilson[0])
    assert 100 * exact.clopper_pearson[0] == pytest.approx(cell.low, abs=0.02)
    assert filled.cell("trades", "benign").value == 99.0
    assert cell.n == 10_000
    assert cell.notes == ()
    assert cell.commands == (stored.record.provenance.command,)
    assert cell.text == "96.07"


def test_scales_and_fewer_images_are_said(tmp_path: Path) -> None:
    filled = full_world(tmp_path).fill()
    reduced = filled.cell("atent", "linf_pgd20")
    assert (reduced.scale, reduced.model, reduced.text) == ("reduced", "atent-linf-mnist-reduced", "70.0")
    made = scaled_recipe("atent-linf-mnist", (), "reduced", "atent-2")
    assert reduced.notes[0] == made.scale
    assert f"{made.epochs} of 30 epochs, {made.train_examples:,} training images" in reduced.notes[0]
    assert "1,000 of 10,000 images" in reduced.notes
    smoke = filled.cell("sgd", "linf_pgd20")
    assert smoke.scale == "smoke"
    assert smoke.difference is None
    assert not smoke.differs
    assert smoke.place is None


def test_the_larger_scale_is_shown_and_the_larger_number_of_images(tmp_path: Path) -> None:
    world = full_world(tmp_path)
    world.model("atent-linf-mnist", "atent-linf-mnist")
    assert world.fill().cell("atent", "linf_pgd20").scale == "reduced"
    world.answer("atent-linf-mnist", PGD, first_of(100, 90))
    assert world.fill().cell("atent", "linf_pgd20").value == 90.0
    world.answer("atent-linf-mnist", PGD, first_of(200, 150))
    found = world.fill().cell("atent", "linf_pgd20")
    assert (found.value, found.scale, found.n) == (75.0, "paper", 200)
    # The other cell of the row has no answer at this scale, and keeps the reduced one.
    assert world.fill().cell("atent", "linf_cw").scale == "reduced"


def test_what_failed_was_stopped_or_is_stale_never_shows_as_a_number(tmp_path: Path) -> None:
    world = full_world(tmp_path)
    failed = world.fill().cell("entropy-sgd", "linf_cw")
    assert failed.value is None
    assert failed.records == ()
    assert failed.missing == "failed: does not count"
    partial = world.answer("mart-mnist", "cw-linf:steps=3", first_of(50, 10))
    assert world.fill().cell("mart", "linf_cw").value is not None  # another question

    for model in ("pgd-at-mnist", "mma-mnist", "atent-sgd-mnist"):
        world.model(model, None)
    weights, version = "weights of before", 1
    world.answer("pgd-at-mnist", PGD, first_of(100, 90), weights=weights)
    world.answer("mma-mnist", PGD, first_of(100, 90), version=version)
    stopped = world.answer("atent-sgd-mnist", PGD, first_of(100, 90)).model_copy(update={"status": "partial"})
    for path in (tmp_path / "reports" / "records" / "atent-sgd-mnist").glob("*.json"):
        path.unlink()
    world.store.write(stopped, world.store.outcomes(stopped))
    filled = world.fill()
    found = {row: filled.cell(row, "linf_pgd20") for row in ("pgd-at", "mma", "sgd")}
    assert found["pgd-at"].missing == "stale: the record is of other weights"
    assert found["mma"].missing == "stale: by an earlier version of the attack"
    assert all(found[row].value is None for row in ("pgd-at", "mma"))
    # Of the paper's scale there is a beginning only; what is shown is the smoke run's own number.
    assert found["sgd"].scale == "smoke"
    assert found["sgd"].value == 6.0
    assert partial.status == "complete"


def test_changing_one_record_changes_exactly_its_cells(tmp_path: Path) -> None:
    before = numbers(full_world(tmp_path / "a").fill())
    for changed, cells in ((PGD, {"linf_pgd20"}), (CW, {"linf_cw"})):
        world = full_world(tmp_path / changed.partition(":")[0])
        spec = question("mart-mnist", changed, count=10_000)
        path = world.store.record_path(spec)
        path.unlink()
        world.answer("mart-mnist", changed, first_of(10_000, 5000), clean=first_of(10_000, 9900))
        after = numbers(world.fill())
        differing = {key for key in before if _shown(before[key]) != _shown(after[key])}
        assert differing == {("mart", column) for column in cells}


def _shown(facts: object) -> object:
    assert isinstance(facts, tuple)
    return (*facts[:4], tuple(path.name for path in facts[4]), *facts[5:])


def test_a_model_that_is_not_as_its_recipe_says_is_named(tmp_path: Path) -> None:
    world = full_world(tmp_path)
    recipe = dict(world.cards["mart-mnist"].card.recipe or {})
    world.model("mart-mnist", None, recipe={**recipe, "epochs": 7, "batch_size": 64})
    notes = world.fill().cell("mart", "linf_pgd20").notes
    assert notes == ("not as its recipe says: batch_size = 64 instead of 128, epochs = 7 instead of 100",)
    world.model("mart-mnist", None)
    assert world.fill().cell("mart", "linf_pgd20").notes == ("imported weights",)


@pytest.mark.parametrize(
    ("successes", "n", "differs"),
    [
        (9607, 10_000, False),  # the printed value
        (9550, 10_000, False),  # outside the interval, inside the tolerance of one point
        (9400, 10_000, True),
        (90, 100, True),  # 90 [82.4, 94.8] against 96.07
        (93, 100, False),  # 3 points away, but the interval is wider
    ],
)
def test_a_difference_counts_beyond_interval_and_tolerance(
    tmp_path: Path, successes: int, n: int, differs: bool
) -> None:
    world = World(tmp_path)
    world.model("trades-mnist", "trades-mnist")
    world.answer("trades-mnist", PGD, first_of(n, successes))
    cell = world.fill().cell("trades", "linf_pgd20")
    assert cell.difference == pytest.approx(100 * successes / n - 96.07)
    assert cell.differs == differs


def test_best_and_second_best_of_the_printed_and_of_ours(tmp_path: Path) -> None:
    filled = full_world(tmp_path).fill()
    rows = [row.id for row in filled.table.rows]
    for column, (first, second) in {"linf_pgd20": ("mart", "atent"), "linf_cw": ("atent", "mart")}.items():
        places = {row: filled.cell(row, column).printed_place for row in rows}
        assert {row for row, place in places.items() if place == 1} == {first}
        assert {row for row, place in places.items() if place == 2} == {second}
    # Three of ours are at the paper's scale; the reduced one is alone at its own.
    ours = {row: filled.cell(row, "linf_pgd20").place for row in rows}
    assert ours == {**dict.fromkeys(rows), "trades": 1, "mart": 2}


def test_what_is_missing_says_what_it_takes(tmp_path: Path) -> None:
    world = World(tmp_path)
    cell = world.fill("atent-6").cell("pgd20", "eps_8_255")
    assert cell.missing == "not trained"
    assert cell.remedy == "robench reproduce atent-6"
    # 76 epochs of 48,000 images; the attack: 20 steps on 10,000.
    passes = 76 * 48_000 * 20
    assert cell.cost == f"{passes / 1e6:.3g} million of training, 200,000 of attack at most: passes through wrn_34_10"


def test_settings_stand_beside_the_printed_ones(tmp_path: Path) -> None:
    filled = World(tmp_path).fill("emr-7")
    assert filled.cell("trades-emr", "lambda_emr").value == 0.3
    assert filled.cell("at-igr", "lambda_emr").text is None
    for row, cells in filled.lines():
        for column, cell in zip(filled.table.columns, cells, strict=True):
            assert cell.value == cell.printed_value, (row.id, column.id)


def test_distances_margins_transfers_and_averages(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.model("heat-cifar10", None, dataset="mnist")
    reach = [*np.linspace(0.1, 1.0, 30), *[np.inf] * 20]
    put_minimum_norm(
        world.store, question("heat-cifar10", "ddn-20", threat="L2@4", count=50), reach, clean=first_of(50, 40)
    )
    outcomes = world.results.outcomes(world.results.records[0].record)
    expected = np.where(outcomes["attacked"], outcomes["l2"], 0.0)
    cell = world.fill("heat-5").cell("heat", "ddn_median")
    assert cell.value == np.median(expected)
    assert world.fill("heat-5").cell("heat", "ddn_mean").value == pytest.approx(expected.mean())
    assert cell.low is not None
    assert cell.low <= cell.value <= (cell.high or 0)

    world.model("emr-mlp-st")
    put_certificate(world.store, certificate_spec("emr-mlp-st", "effective-margin"), CERTIFIED_RADIUS)
    right = [r for r, p in zip(CERTIFIED_RADIUS, (-1, -1, 2, 1, 1, 1, 1, 1, 1, 1), strict=True) if p == 1]
    margins = world.fill("emr-1")
    assert margins.cell("st-0.001", "margin_test_mean").value == pytest.approx(np.mean(right))
    assert margins.cell("st-0.001", "margin_test_std").value == pytest.approx(np.std(right))
    assert margins.cell("st-0.001", "margin_train_mean").missing == "not evaluated"

    world.model("emr-mlp-at")
    put_certificate(
        world.store, certificate_spec("emr-mlp-at", "effective-margin"), [*CERTIFIED_RADIUS[:-1], 1e20], [1] * 10
    )
    collapsed = world.fill("emr-1").cell("at-0.001", "margin_test_mean")
    assert collapsed.value is None
    assert collapsed.missing == "1.0e+19, where no two images are farther apart than 28"

    attack = "pgd-40:stop_when_broken=false"
    for name in ("sgr-gn-mnist", "sgr-sgr_grad-mnist"):
        world.model(name)
    asked = {e: question("sgr-gn-mnist", attack, threat=f"Linf@{e}/255", count=50) for e in (8, 16, 24, 32)}
    target = question("sgr-sgr_grad-mnist", attack).model
    for e, robust in zip(asked, (40, 30, 20, 10), strict=True):
        put_transfer(world.store, asked[e], target, first_of(50, robust), clean=first_of(50, 45))
    assert world.fill("sgr-mnist-a").cell("sgr_grad", "gn").value == 60.0
    assert world.fill("sgr-mnist-b").cell("sgr_grad", "gn").value == 20.0
    assert world.fill("sgr-mnist-b").cell("sgr_grad", "test").value == 90.0
    assert world.fill("sgr-mnist-b").cell("gn", "sgr_grad").missing == "not evaluated"
    # Of other weights of the source: stale.
    world.cards["sgr-gn-mnist"] = world.cards["sgr-gn-mnist"]._replace(
        card=world.cards["sgr-gn-mnist"].card.model_copy(
            update={"weights": world.cards["sgr-gn-mnist"].card.weights.model_copy(update={"sha256": sha("new")})}
        )
    )
    assert world.fill("sgr-mnist-a").cell("sgr_grad", "gn").value is None


def test_an_average_is_the_area_under_the_curve(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.model("sgr-gn-mnist")
    for e, robust in {8: 40, 16: 30, 24: 20, 32: 10}.items():
        world.answer(
            "sgr-gn-mnist",
            "pgd-40:stop_when_broken=false",
            first_of(50, robust),
            threat=f"Linf@{e}/255",
            clean=first_of(50, 45),
        )
    cell = world.fill("sgr-iclr-1-mnist").cell("gn", "pgd")
    shares = np.array([45, 40, 30, 20, 10]) / 50
    assert cell.value == pytest.approx(100 * ((shares[1:] + shares[:-1]) / 2).mean())
    assert len(cell.records) == 4


def test_pages_escape_what_others_wrote(tmp_path: Path) -> None:
    world = full_world(tmp_path)
    hostile = "<script>alert('x')</script>"
    made = world.cards["mart-mnist"].card
    changed = {"scale": hostile, "provenance": made.provenance.model_copy(update={"command": f"robench {hostile}"})}
    world.cards["mart-mnist"] = world.cards["mart-mnist"]._replace(card=made.model_copy(update=changed))
    out = tmp_path / "out"
    write_papers(["atent-2"], world.store, world.cards, out)
    for page in out.glob("*.html"):
        text = page.read_text()
        assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in (out / "paper-atent.html").read_text()
    assert hostile in (out / "atent-2.csv").read_text()


def test_latex_escapes_and_marks(tmp_path: Path) -> None:
    world = full_world(tmp_path)
    (path,) = write_papers(["atent-2"], world.store, world.cards, tmp_path, formats=["latex"])
    text = path.read_text()
    assert r"\toprule" in text
    assert r"TRADES & \textbf{99.48} & 96.07 & 94.03 \\" in text
    assert r"\quad ours (reduced) &" in text
    assert r"train\_examples=" in text


def golden_world(folder: Path) -> World:
    """Of emr-4: two models at the paper's scale, one reduced, one whose strongest attack failed."""
    world = World(folder)
    clean_emr = ("regularizers.emr.at=clean",)
    pgd10, pgd100 = (f"pgd-{steps}:step_size=0.0078,start=image" for steps in (10, 100))
    for name, like, settings, scale, n in (
        ("emr-r18-trades-emr", "emr-r18-trades-emr", (), "paper", 10_000),
        ("emr-r18-trades-emr-clean", "emr-r18-trades-emr", clean_emr, "paper", 10_000),
        ("emr-wrn-trades-emr-clean-reduced", "emr-wrn-trades-emr", clean_emr, "reduced", 200),
        ("emr-wrn-trades-emr", "emr-wrn-trades-emr", (), "paper", 10_000),
    ):
        world.model(name, like, settings=settings, scale=scale, table="emr-4", dataset="mnist")
        for place, attack in enumerate(("fgsm", pgd10, pgd100, "autoattack")):
            robust = first_of(n, n * (60 - 3 * place - len(name) % 3) // 100)
            failed = name == "emr-wrn-trades-emr" and attack == "autoattack"
            world.answer(name, attack, robust, threat="Linf@0.031", clean=first_of(n, n * 8 // 10), failed=failed)
    return world


def test_golden_table(tmp_path: Path) -> None:
    """The page's section, the CSV and the LaTeX of a table; delete the files and run the test to make them anew."""
    world = golden_world(tmp_path)
    out = tmp_path / "reports" / "leaderboards"
    write_papers(["emr-4"], world.store, world.cards, out)
    page = (out / "paper-emr.html").read_text()
    section = re.search(r'<section class="paper-table" id="emr-4">.*?</section>\n', page, re.DOTALL)
    assert section
    files = {"emr-4.html": section[0], **{name: (out / name).read_text() for name in ("emr-4.csv", "emr-4.tex")}}
    # Identities are hashes of questions, which a new version of an attack changes.
    made = {name: re.sub(r"\b[0-9a-f]{16}\b", "IDENTITY", text) for name, text in files.items()}
    missing = [name for name in made if not (GOLDEN / name).exists()]
    for name in missing:
        (GOLDEN / name).write_text(made[name])
    assert not missing, f"made anew, look at them: {missing}"
    for name, text in made.items():
        assert text == (GOLDEN / name).read_text(), name


def test_every_link_leads_to_a_file(tmp_path: Path) -> None:
    world = golden_world(tmp_path)
    out = tmp_path / "reports" / "leaderboards"
    written = write_papers(list(plugins("tables")), world.store, world.cards, out, formats=["html", "csv"])
    written += write_leaderboards(["robustness"], world.store, world.cards, out)
    index = (out / "index.html").read_text()
    assert index.count('href="paper-') == 4
    for path in (path for path in written if path.suffix == ".html"):
        for link in re.findall(r'href="([^"#]+)(?:#[^"]*)?"', path.read_text()):
            assert (path.parent / unquote(link)).is_file(), (path, link)


def test_lost_tables_are_shown_as_lost(tmp_path: Path) -> None:
    write_papers(["sgr-1", "heat-1"], World(tmp_path).store, {}, tmp_path / "out")
    assert "its cells are lost" in (tmp_path / "out" / "paper-sgr.html").read_text()
    assert "lost; the text says yes" in (tmp_path / "out" / "paper-heatsmoothing.html").read_text()
    assert load_table("heat-1").rows[0].inferred == ("yes", "yes", "yes")


def test_flags_stand_in_the_cell_on_the_page_in_the_file_and_beside_the_claim(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in ("atent-sgd-mnist", "atent-entropysgd-mnist"):
        world.model(name, name)
        raised = (diagnostic("not-converged", "flag"), diagnostic("zero-gradients")) if "entropy" in name else ()
        world.answer(name, PGD, first_of(10_000, 300), clean=first_of(10_000, 9900), diagnostics=raised)
    filled = world.fill()
    flagged = filled.cell("entropy-sgd", "linf_pgd20")
    assert flagged.flags == ("not-converged: what was seen of not-converged (10 of these 40 stand then)",)
    assert flagged.flag_names == ("not-converged",)
    assert filled.cell("entropy-sgd", "benign").flags == (), "of unchanged images it says nothing"
    assert filled.cell("sgd", "linf_pgd20").flags == ()
    out = tmp_path / "out"
    write_papers(["atent-2"], world.store, world.cards, out)
    assert (out / "paper-atent.html").read_text().count(">flags: not-converged<") == 1
    rows = {(r["row_id"], r["column"]): r for r in csv.DictReader((out / "atent-2.csv").read_text().splitlines())}
    assert rows["entropy-sgd", "linf_pgd20"]["flags"] == flagged.flags[0]
    assert rows["sgd", "linf_pgd20"]["flags"] == ""
    claim = (
        load_paper("atent")
        .claims[0]
        .model_copy(update={"holds": "atent-2[entropy-sgd].linf_pgd20 <= atent-2[sgd].linf_pgd20", "measure": None})
    )
    weak = "flagged as too weak"
    assert weak in judge(claim, lambda _: flagged).why
    assert weak not in judge(claim, lambda _: filled.cell("sgd", "linf_pgd20")).why


def test_a_row_s_clean_accuracy_is_of_the_images_that_its_attacks_are_of(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.model("trades-mnist", "trades-mnist")
    world.answer("trades-mnist", PGD, first_of(1000, 900), clean=first_of(1000, 980))
    world.answer("trades-mnist", "pgd-20", first_of(10_000, 300), clean=first_of(10_000, 9900), threat="L2@2")
    assert world.fill().cell("trades", "benign").n == 1000
    assert world.fill().cell("trades", "benign").value == 98.0
    other = World(tmp_path / "other")
    other.model("trades-mnist", "trades-mnist")
    other.answer("trades-mnist", "pgd-20", first_of(10_000, 300), clean=first_of(10_000, 9900), threat="L2@2")
    assert other.fill().cell("trades", "benign").n == 10_000, "where there is no other"


def test_a_record_that_its_rows_contradict_stops_the_page(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.model("trades-mnist", "trades-mnist")
    world.answer("trades-mnist", PGD, first_of(10_000, 9000))
    (stored,) = world.store.records()
    said = json.loads(stored.path.read_text()) | {"robust": json.loads(proportion(9999, 10_000).model_dump_json())}
    stored.path.write_text(json.dumps(said))
    with pytest.raises(UnsafeFile, match="robust 9999 of 10000, by the rows 9000 of 10000"):
        write_papers(["atent-2"], world.store, world.cards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_infinite_margins_are_left_out_if_few_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    world.model("emr-mlp-st", "emr-mlp-st", table="emr-1")
    put_certificate(
        world.store, certificate_spec("emr-mlp-st", "effective-margin"), [*CERTIFIED_RADIUS[:-1], np.inf], [1] * 10
    )
    many = world.fill("emr-1").cell("st-0.001", "margin_test_mean")
    assert many.missing == "infinite for 1 of 10 images, around which the network is constant"
    monkeypatch.setattr("robench.papers.archive.FEW_INFINITE", 0.1)
    few = world.fill("emr-1").cell("st-0.001", "margin_test_mean")
    assert few.value == pytest.approx(np.mean(CERTIFIED_RADIUS[:-1]))
    assert "without 1 of 10 images, around which the network is constant: infinitely far" in few.notes

"""Figures of records: their numbers are those of the outcomes, and what is no evidence is not drawn."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from synthetic import certificate_spec, first_of, put_certificate, put_minimum_norm, sha

from robench.covariances import Covariance, as_function, as_matrix, inner_pixels
from robench.errors import UserError
from robench.panels import HeatMap, Plot
from robench.papers.archive import Archive
from robench.papers.figures import Evidence, PaperFigure, drawing_settings
from robench.records import WeightsFile
from robench.reporting import write_papers
from robench.reporting.figures import figure_csv, show_figure
from robench.reporting.pictures import Pictures
from robench.store import StoredCard
from tests.unit.papers.worlds import World, question

PGD20 = "pgd-20:step_size=0.01,start=image"


def figure(drawing: str, lines: list[dict[str, Any]], **others: Any) -> PaperFigure:
    panels = [{"title": "P", "lines": lines}]
    facts = {"paper": "emr", "source": "Figure 0", "summary": "s", "caption": "c", "panels": panels, **others}
    return PaperFigure.model_validate({**facts, "drawing": drawing})


def drawn(world: World, asked: PaperFigure) -> tuple[list[Any], Evidence]:
    plugin, parameters = drawing_settings(asked)
    evidence = Evidence(asked, world.results, Archive(world.results))
    return plugin.load().draw(evidence, **parameters), evidence


def outcomes(world: World, kind: str) -> Any:
    (stored,) = getattr(world.results, kind)
    return world.results.outcomes(stored.record)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


CERTIFIED = {"title": "Smoothed", "recipe": "heat-rs-cifar10", "certificate": "cohen:sigma=0.25"}


def test_certified_accuracy_is_that_of_the_outcomes(world: World) -> None:
    world.model("heat-rs-cifar10", "heat-rs-cifar10", table="heat-5")
    put_certificate(world.store, certificate_spec("heat-rs-cifar10"))
    rows = outcomes(world, "certificates")
    panels, evidence = drawn(world, figure("certified-accuracy", [CERTIFIED]))
    assert evidence.missing == []
    answered, everything = panels
    for panel, n in ((answered, (rows["prediction"] >= 0).sum()), (everything, len(rows["radius"]))):
        (series,) = panel.series
        assert series.n == n
        for radius in (0.0, 0.05, 0.1, 0.25, 0.3, 0.79, 0.8, 0.95):
            expected = 100 * (rows["correct"] & (rows["radius"] > radius)).sum() / n
            place = np.searchsorted(series.x, radius, side="right") - 1
            assert series.y[place] == pytest.approx(expected), (panel.title, radius)
    assert len(drawn(world, figure("certified-accuracy-of-all", [CERTIFIED]))[0]) == 1


def test_attack_curves_are_those_of_the_outcomes(world: World) -> None:
    world.model("heat-baseline-cifar10", "heat-baseline-cifar10", table="heat-5")
    lengths = np.array([0.04, 0.03, 0.05, 0.05, 0.11, np.inf, 0.2, 0.3])
    # The first image is wrong without an attack: its distance is 0, whatever the attack returned.
    clean = np.arange(8) != 0
    asked = question("heat-baseline-cifar10", "ddn-20", threat="L2@4", count=8)
    put_minimum_norm(world.store, asked, lengths, clean=clean)
    line = {"title": "B", "recipe": "heat-baseline-cifar10", "attack": "ddn-20", "threat": "L2@4"}
    (panel,), _ = drawn(world, figure("attack-curve", [line]))
    rows = outcomes(world, "records")
    positive = rows["l2"][rows["attacked"] & (rows["l2"] > 0)]
    (series,) = panel.series
    assert series.n == len(positive) == 6
    for distance in (0.0, 0.2, 0.3, 0.5, 0.51, 1.1, 2.5, 3.0, 4.0):
        place = np.searchsorted(series.x, distance, side="right") - 1
        assert series.y[place] == pytest.approx(100 * (positive <= distance).mean()), distance
    assert (panel.x.low, panel.x.high) == (0.0, 4.0)


def test_margins_are_those_of_correct_images(world: World) -> None:
    world.model("emr-mlp-st", "emr-mlp-st", table="emr-1")
    put_certificate(world.store, certificate_spec("emr-mlp-st", "effective-margin"))
    lines = [
        {"title": "test", "row": "st-0.001", "column": "margin_test_mean"},
        {"title": "training", "row": "st-0.001", "column": "margin_train_mean"},
    ]
    (panel,), evidence = drawn(world, figure("effective-margins", lines, table="emr-1"))
    rows = outcomes(world, "certificates")
    right = rows["radius"][rows["correct"]]
    (group,) = panel.groups
    assert (group.mean, group.std, group.n) == (pytest.approx(right.mean()), pytest.approx(right.std()), len(right))
    assert group.quantiles == pytest.approx(np.quantile(right, (0.05, 0.25, 0.5, 0.75, 0.95)))
    (lacking,) = evidence.missing
    assert (lacking.line, lacking.reason) == ("training", "emr-mlp-st: not evaluated")
    assert lacking.commands == ("robench reproduce emr-1",)


def test_training_histories_are_the_logs(world: World) -> None:
    world.model("emr-mlp-st-reduced", "emr-mlp-st", scale="reduced", table="emr-1")
    log = "epoch,learning_rate,validation_clean_accuracy,validation_robust_accuracy\n"
    log += "1,0.1,0.5,\n2,0.09,0.75,\n3,0.01,0.7,\n"
    (world.cards["emr-mlp-st-reduced"].folder / "training.csv").write_text(log)
    lines = [{"title": name, "row": "st-0.001", "log": f"validation_{name}_accuracy"} for name in ("clean", "robust")]
    (panel,), evidence = drawn(world, figure("training-history", lines, table="emr-1", parameters={"drops": True}))
    assert [rule.x for rule in panel.rules] == [3]
    (series,) = panel.series
    assert (series.title, list(series.x), list(series.y)) == ("clean (reduced)", [1, 2, 3], [50, 75, 70])
    assert series.look == 0
    swapped, _ = drawn(world, figure("training-history", lines[::-1], table="emr-1"))
    assert swapped[0].series[0].look == 1
    (lacking,) = evidence.missing
    assert lacking.reason == "the training of emr-mlp-st-reduced did not measure validation_robust_accuracy"
    assert lacking.commands == ("robench train emr-mlp-st",)


def test_a_lost_training_log_is_written_again_and_a_damaged_one_is_named(world: World) -> None:
    world.model("emr-mlp-st", "emr-mlp-st", table="emr-1")
    log = world.cards["emr-mlp-st"].folder / "training.csv"
    log.unlink(missing_ok=True)
    clean = figure(
        "training-history",
        [{"title": "clean", "row": "st-0.001", "log": "validation_clean_accuracy"}],
        table="emr-1",
    )
    _, evidence = drawn(world, clean)
    (lacking,) = evidence.missing
    assert lacking.reason == (
        "the log of emr-mlp-st's training is gone; restore training.csv beside its card, or train it again"
    )
    assert lacking.commands == ("robench train emr-mlp-st --replace",)
    log.write_text("epoch,train_loss\n1,0.5\n")
    _, evidence = drawn(world, clean)
    (lacking,) = evidence.missing
    assert lacking.reason == "the training of emr-mlp-st did not measure validation_clean_accuracy"
    assert lacking.commands == ()
    log.write_text("epoch,validation_clean_accuracy\n1,0.5\n2\n")
    with pytest.raises(
        UserError, match=r"training\.csv is no training log \(line 3 has 1 values, line 1 names 2\); res"
    ):
        drawn(world, clean)


OVER = [{"title": name, "row": row, "attack": PGD20} for name, row in (("plain", "at-0.001"), ("EMR", "at-emr"))]
PLACES = [{"x": x, "threat": f"Linf@{x}"} for x in (0.1, 0.2)]


def over(**parameters: Any) -> PaperFigure:
    return figure("accuracy-over", OVER, places=PLACES, table="emr-1", parameters=parameters)


def test_accuracy_over_epsilon_is_that_of_the_records(world: World) -> None:
    counts = {"emr-mlp-at": (80, 40), "emr-mlp-at-emr": (90, 60)}
    for name, robust in counts.items():
        world.model(name, name, table="emr-1")
        for epsilon, standing in zip(("0.1", "0.2"), robust, strict=True):
            world.answer(name, PGD20, first_of(100, standing), threat=f"Linf@{epsilon}", clean=first_of(100, 95))
    (plot, ratio), evidence = drawn(world, over(relative=True, with_clean=True))
    assert evidence.missing == []
    assert [list(s.y) for s in plot.series] == [[95, 80, 40], [95, 90, 60]]
    assert list(plot.series[0].x) == [0, 0.1, 0.2]
    assert all(a < b < c for a, b, c in zip(plot.series[0].low, plot.series[0].y, plot.series[0].high, strict=True))
    assert list(ratio.series[0].y) == pytest.approx([100, 112.5, 150])


def test_what_a_reduced_model_lacks_is_asked_of_that_model(world: World) -> None:
    world.model("emr-mlp-at-reduced", "emr-mlp-at", scale="reduced", table="emr-1")
    _, evidence = drawn(world, figure("attack-curve", ATTACKED, table="emr-1"))
    (lacking,) = evidence.missing
    assert lacking.reason == "emr-mlp-at-reduced: not evaluated"
    assert lacking.commands[0].startswith("robench eval --model emr-mlp-at-reduced --attack")
    assert lacking.commands[0].endswith("--examples 10000")
    assert evidence.training == {}
    line = {"title": "test", "row": "at-0.001", "column": "margin_test_mean"}
    _, evidence = drawn(world, figure("effective-margins", [line], table="emr-1"))
    assert evidence.missing[0].commands == ("robench reproduce emr-1 --scale reduced",)


def test_a_line_with_a_hole_is_not_drawn(world: World) -> None:
    world.model("emr-mlp-at", "emr-mlp-at", table="emr-1")
    world.answer("emr-mlp-at", PGD20, first_of(100, 80), threat="Linf@0.1")
    panels, evidence = drawn(world, over())
    assert panels == []
    plain, emr = evidence.missing
    assert plain.reason == "emr-mlp-at: not evaluated"
    assert plain.commands == (
        "robench eval --model emr-mlp-at --attack pgd-20:step_size=0.01,start=image --threat Linf@0.1 "
        "--threat Linf@0.2 --all",
    )
    assert emr.reason == "not trained"
    assert emr.commands[0] == "robench train emr-mlp-at-emr"
    assert emr.smaller == "robench reproduce emr-1 --scale reduced"
    assert emr.model_only
    assert "passes of training" in (evidence.cost or "")


def test_places_on_other_images_make_no_line(world: World) -> None:
    world.model("emr-mlp-at", "emr-mlp-at", table="emr-1")
    world.answer("emr-mlp-at", PGD20, first_of(100, 80), threat="Linf@0.1")
    world.answer("emr-mlp-at", PGD20, first_of(50, 20), threat="Linf@0.2")
    panels, evidence = drawn(world, over())
    assert panels == []
    assert evidence.missing[0].reason == "its places are of different models or images"


ATTACKED = [{"title": "AT", "row": "at-0.001", "attack": PGD20, "threat": "L2@4"}]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"failed": True}, "emr-mlp-at: failed: does not count"),
        ({"weights": sha("others")}, "emr-mlp-at: stale: the record is of other weights"),
        ({"version": 99}, "emr-mlp-at: stale: by an earlier version of the attack"),
        ({"seed": 3}, "emr-mlp-at: not evaluated"),
    ],
)
def test_what_is_no_evidence_is_not_drawn(world: World, options: dict[str, Any], reason: str) -> None:
    world.model("emr-mlp-at", "emr-mlp-at", table="emr-1")
    world.answer("emr-mlp-at", PGD20, first_of(100, 80), threat="L2@4", **options)
    panels, evidence = drawn(world, figure("attack-curve", ATTACKED, table="emr-1"))
    assert panels == []
    assert [m.reason for m in evidence.missing] == [reason]


def test_what_was_stopped_is_not_drawn(world: World) -> None:
    world.model("emr-mlp-at", "emr-mlp-at", table="emr-1")
    stopped = world.answer("emr-mlp-at", PGD20, first_of(100, 80), threat="L2@4").model_copy(
        update={"status": "partial"}
    )
    for path in (world.folder / "reports" / "records" / "emr-mlp-at").glob("*.json"):
        path.unlink()
    world.store.write(stopped, world.store.outcomes(stopped))
    panels, evidence = drawn(world, figure("attack-curve", ATTACKED, table="emr-1"))
    assert panels == []
    assert [m.reason for m in evidence.missing] == ["emr-mlp-at: stopped before it was complete: does not count"]


def test_the_largest_scale_is_drawn_and_a_smoke_run_never(world: World) -> None:
    asked = figure("attack-curve", ATTACKED, table="emr-1")
    for scale in ("smoke", "reduced", "paper"):
        name = "emr-mlp-at" if scale == "paper" else f"emr-mlp-at-{scale}"
        world.model(name, "emr-mlp-at", scale=scale, table="emr-1")  # type: ignore[arg-type]
        world.answer(name, PGD20, first_of(100, 80), threat="L2@4")
        panels, evidence = drawn(world, asked)
        titles = [series.title for panel in panels for series in panel.series]
        assert titles == {"smoke": [], "reduced": ["AT (reduced)"], "paper": ["AT"]}[scale]
        assert len(evidence.missing) == (scale == "smoke")


def learned(shape: tuple[int, int, int]) -> Covariance:
    """A covariance that depends on the displacement alone, as a function."""
    channels, height, width = shape
    steps = int(np.hypot(height - 1, width - 1).round()) + 1
    values = np.random.default_rng(0).normal(size=(channels, channels, steps))
    return Covariance("m", shape, values + values.swapaxes(0, 1))


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 6)])
def test_a_covariance_is_the_same_in_both_forms(shape: tuple[int, int, int]) -> None:
    function = learned(shape)
    matrix = as_matrix(function)
    _, height, width = shape
    for i in range(0, len(matrix), 7):
        for j in range(0, len(matrix), 5):
            (a, p), (b, q) = divmod(i, height * width), divmod(j, height * width)
            apart = np.hypot(p // width - q // width, p % width - q % width)
            assert matrix[i, j] == function.values[a, b, round(apart)]
    again = as_function(Covariance("m", shape, matrix))
    assert again == pytest.approx(function.values[..., : again.shape[-1]])


def test_a_matrix_is_cut_and_scaled() -> None:
    inner = inner_pixels((2, 4, 4), 0.25)
    assert inner.tolist() == [5, 6, 9, 10, 21, 22, 25, 26]


@pytest.mark.parametrize("drawing", ["covariance-matrices", "covariance-functions"])
def test_covariances_are_read_beside_the_card(world: World, drawing: str) -> None:
    world.model("sgr-pgd_sgr-mnist", "sgr-pgd_sgr-mnist", table="sgr-mnist-a", input_shape=(1, 8, 8))
    folder, described = world.cards["sgr-pgd_sgr-mnist"]
    matrix = np.cov(np.random.default_rng(1).normal(size=(64, 200))).astype(np.float32)
    data = safetensors.numpy.save({"sgr/covariance": matrix})
    (folder / "defense.safetensors").write_bytes(data)
    state = WeightsFile(file="defense.safetensors", sha256=sha_of(data), bytes=len(data))
    world.cards["sgr-pgd_sgr-mnist"] = StoredCard(folder, described.model_copy(update={"defense_state": state}))
    lines = [{"title": "PGD", "row": "pgd_sgr"}, {"title": "clean", "row": "clean"}]
    world.model("sgr-clean-mnist", "sgr-clean-mnist", table="sgr-mnist-a")
    (panel,), evidence = drawn(world, figure(drawing, lines, table="sgr-mnist-a"))
    if isinstance(panel, HeatMap):
        inner = inner_pixels((1, 8, 8), 0.25)
        block = matrix[np.ix_(inner, inner)]
        assert panel.values == pytest.approx(block / np.abs(block).max())
        assert len(figure_csv([panel]).splitlines()) == 1 + len(inner)
    else:
        assert isinstance(panel, Plot)
        assert panel.series[0].y[0] == pytest.approx(np.diag(matrix).mean())
    assert "was trained without a covariance" in evidence.missing[0].reason
    (folder / "defense.safetensors").write_bytes(data[:-4] + b"\0\0\0\0")
    panels, evidence = drawn(world, figure(drawing, lines[:1], table="sgr-mnist-a"))
    assert panels == []
    assert "is not the file that its card names" in evidence.missing[0].reason


def sha_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_perturbed_images_are_those_that_were_kept(world: World) -> None:
    attack, threat = "pgd-40:stop_when_broken=false", "Linf@16/255"
    world.model("sgr-clean-mnist", "sgr-clean-mnist", table="sgr-mnist-a")
    record = world.answer("sgr-clean-mnist", attack, first_of(20, 17), threat=threat)
    pictures = Pictures(world.store.root)
    without = show_figure("sgr-figure-7", world.results, Archive(world.results), pictures)
    assert without.sketches == ()
    clean = next(missing for missing in without.missing if missing.line.startswith("clean"))
    assert clean.reason == "its adversarial images were not kept"
    assert clean.commands[0].endswith("--threat Linf@16/255 --save-adversarials")
    others = next(missing for missing in without.missing if missing.line == "GN")
    assert others.commands[-1].endswith("--all --save-adversarials")
    kept = {"example_ids": np.arange(17, 20), "adversarial_images": np.zeros((3, 1, 28, 28), np.float32)}
    facts = {"identity": record.spec.identity, "weights_sha256": record.spec.model.weights_sha256}
    (world.store.root / "adversarials").mkdir()
    path = world.store.root / "adversarials" / f"{record.spec.identity}.safetensors"
    safetensors.numpy.save_file(kept, path, metadata=facts)
    shown = show_figure("sgr-figure-7", world.results, Archive(world.results), pictures)
    (sketch,) = shown.sketches
    assert sketch.gallery is not None
    assert [image.example for image in sketch.gallery.images] == [17, 18, 19]
    assert (shown.csv, shown.state) == (None, "in part")
    for file, text in pictures.files().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    path.unlink()
    again = show_figure("sgr-figure-7", world.results, Archive(world.results), Pictures(world.store.root))
    assert again.sketches == shown.sketches


def test_the_file_has_what_is_drawn(world: World) -> None:
    world.model("emr-mlp-st", "emr-mlp-st", table="emr-1")
    put_certificate(world.store, certificate_spec("emr-mlp-st", "effective-margin"))
    shown = show_figure("emr-figure-1bcd", world.results, Archive(world.results), Pictures(world.store.root))
    assert shown.state == "in part"
    assert [sketch.title for sketch in shown.sketches] == ["(b) MNIST, MLP", "(d) MNIST, MLP, by weight decay"]
    rows = list(csv.DictReader(io.StringIO(shown.csv or "")))
    assert {row["model"] for row in rows} == {"emr-mlp-st"}
    assert {row["record"] for row in rows} == {path.name.split(".")[0] for path in shown.records}
    radius = outcomes(world, "certificates")
    right = radius["radius"][radius["correct"]]
    mean = next(float(row["y"]) for row in rows if row["x"] == "mean")
    assert mean == pytest.approx(right.mean())


def test_what_others_wrote_is_escaped(world: World, tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>"
    world.model("emr-mlp-st-reduced", "emr-mlp-st", scale="reduced", table="emr-1")
    folder, described = world.cards["emr-mlp-st-reduced"]
    world.cards["emr-mlp-st-reduced"] = StoredCard(folder, described.model_copy(update={"scale": hostile}))
    (folder / "training.csv").write_text("epoch,validation_clean_accuracy\n1,0.5\n2,0.75\n")
    write_papers(["emr-1"], world.store, world.cards, tmp_path / "out")
    page = (tmp_path / "out" / "paper-emr.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 2
    assert 'href="paper-figures/emr-figure-4.csv"' in page
    assert (tmp_path / "out" / "paper-figures" / "emr-figure-4.csv").is_file()
    write_papers(["emr-1"], world.store, world.cards, tmp_path / "bare", formats=["html"])
    assert not (tmp_path / "bare" / "paper-figures").exists()
    assert "paper-figures/" not in (tmp_path / "bare" / "paper-emr.html").read_text()

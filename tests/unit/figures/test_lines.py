"""Outputs along lines, kept and drawn: a damaged file is named, and no figure is drawn of anything but its question."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic import PROVENANCE

from robench.errors import UserError
from robench.papers.archive import Archive
from robench.reporting import write_leaderboards, write_papers
from robench.reporting.figures import ShownFigure, show_figure
from robench.reporting.lines import lines_csv, lines_svg
from robench.reporting.pictures import Pictures
from robench.softmax_lines import Lines, StraightLine, lines_path, plots, read_lines
from tests.unit.papers.worlds import World, question

ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"
PGD, BALL = "pgd-40:stop_when_broken=false", "Linf@4/255"


def softmax(label: int, adversarial: int, *, points: int = 5, classes: int = 10) -> np.ndarray:
    """From the label to the adversarial class, past class 9 by a hump of 0.2, and 0.04 of class 8 at all points."""
    share = np.linspace(0, 1, points)
    found = np.zeros((classes, points))
    found[9], found[8] = 0.8 * share * (1 - share), 0.04
    found[label], found[adversarial] = (1 - share) * (0.96 - found[9]), share * (0.96 - found[9])
    return found


def kept(model: str = "m", *, examples: tuple[int, ...] = (3, 7), **changes: Any) -> Lines:
    asked = {"attack": PGD, "threat": BALL, "count": 100, "dataset": "cifar10"}
    asked |= {k: changes.pop(k) for k in list(changes) if k not in Lines.model_fields}
    lines = [
        StraightLine.of(softmax(k % 7, 7), example=example, label=k % 7, adversarial=7, distance=4 / 255)
        for k, example in enumerate(examples, start=1)
    ]
    facts = {"spec": question(model, **asked), "attacked": 80, "fallen": 6, "classes": tuple("abcdefghij")}
    return Lines.model_validate({**facts, "lines": lines, "provenance": PROVENANCE, **changes})


def test_lines_are_kept_to_six_decimals_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(kept().to_json())
    again = read_lines(path)
    assert again == kept()
    assert again.way() == [0, 0.25, 0.5, 0.75, 1]
    for line in again.lines:
        assert line.softmax() == pytest.approx(softmax(line.label, 7), abs=5e-7)
        assert line.softmax()[line.label, 0] == 0.96


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"surplus": 1}, "surplus"),
        ({"lines": []}, "0 lines of 6 fallen"),
        ({"fallen": 1}, "2 lines of 1 fallen"),
        ({"attacked": 5}, "6 fallen of 5 attacked"),
        ({"attacked": 101}, "101 attacked of 100"),
        ({"classes": list("abc")}, "not all of 3 classes"),
        ({"outputs": ["1 0"] * 10}, "no softmax"),
        ({"outputs": ["1 0", *["0 0"] * 9]}, "no softmax"),
        ({"outputs": ["nan nan", *["0 0"] * 9]}, "no softmax"),
        ({"outputs": ["2 1", "-1 0", *["0 0"] * 8]}, "no softmax"),
        ({"outputs": ["1", *["0"] * 9]}, "1 points, no line"),
        ({"outputs": ["1 1", *["0"] * 9]}, "not as many points"),
        ({"outputs": ["a lot"] * 10}, "could not convert"),
        ({"outputs": []}, "not as many points"),
        ({"outputs": ["0 0", "1 0", *["0 0"] * 5, "0 1", "0 0", "0 0"]}, "not all of 10 classes at 2 points"),
        ({"label": 2}, "does not begin at its label 2"),
        ({"adversarial": 9}, "does not end at its adversarial class 9"),
        ({"label": 7, "adversarial": 1}, "does not begin at its label 7"),
        ({"label": 7}, "leads from class 7 to 7 of 10"),
        ({"adversarial": 10}, "leads from class 1 to 10 of 10"),
        ({"label": -1}, "leads from class -1 to 7"),
        ({"example": 7}, "not in the order"),
        ({"distance": -1.0}, "greater than or equal to 0"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path, content = tmp_path / "m.json", json.loads(kept().to_json())
    for name, value in change.items():
        place = content["lines"][0] if name in StraightLine.model_fields else content
        place[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=problem) as told:
        read_lines(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)
    assert "robench lines" in str(told.value) or "upgrade" in str(told.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe"])
def test_what_is_no_file_of_lines_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"m\.json.*robench lines"):
        read_lines(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_lines(tmp_path)


def test_outputs_that_are_equal_to_rounding_are_a_fallen_image() -> None:
    tie = np.array([[0.9, 0.500001], [0.1, 0.499999]])
    assert StraightLine.of(tie, example=0, label=0, adversarial=1, distance=0.1).adversarial == 1


def test_a_plot_names_label_and_adversarial_class_and_what_comes_up_between() -> None:
    first, second = plots(kept(), title="clean")
    assert (first.title, second.title) == ("clean: test image 3", "clean: test image 7")
    assert [s.title for s in first.series] == ["b (label)", "h (adversarial)", "j"], "i stays at 0.04"
    assert [s.look for s in first.series] == [0, 1, 3]
    assert list(first.series[0].x) == [0, 0.25, 0.5, 0.75, 1]
    for series, k in zip(first.series, (1, 7, 9), strict=True):
        assert list(series.y) == pytest.approx(softmax(1, 7)[k], abs=1e-6)
    assert (first.y.low, first.y.high) == (0, 1)
    assert len(plots(kept(), shown=1)) == 1


def test_the_drawing_has_a_panel_for_each_image_and_the_file_every_output() -> None:
    found = kept(examples=(3, 7, 8))
    drawing = ElementTree.fromstring(lines_svg(found))
    assert drawing.attrib["viewBox"].startswith("0 0 720 ")
    texts = [t.text for t in drawing.iter(f"{SVG}text")]
    assert [t for t in texts if t and t.startswith("test image")] == ["test image 3", "test image 7", "test image 8"]
    assert {"6 of 80 images fell, the first 3 are drawn", "h (adversarial)", "b (label)", "c (label)"} <= set(texts)
    assert any(t and t.endswith(f"{BALL}") for t in texts)
    curves = [line.attrib for line in drawing.iter(f"{SVG}polyline")]
    assert len(curves) == 9
    ends = [re.findall(r"[\d.]+", curves[0]["points"])[i] for i in (0, 1, -2, -1)]
    assert ends == ["40.0", "16.6", "352.0", "176.0"], "0.96 on the left, 0 on the right"
    rows = list(csv.DictReader(io.StringIO(lines_csv(found))))
    assert len(rows) == 3 * 10 * 5
    assert rows[5] == {
        "model": "m",
        "example": "3",
        "label": "b",
        "adversarial": "h",
        "class": "b",
        "way": "0",
        "softmax": "0.96",
    }
    assert float(rows[5 * 7 + 4]["softmax"]) == 0.96


def test_what_others_wrote_is_escaped() -> None:
    hostile = kept(classes=("<script>", *"bcdefghi", '"&'))
    assert "<script>" not in lines_svg(hostile)
    ElementTree.fromstring(lines_svg(hostile))


def put_lines(world: World, found: Lines) -> Path:
    path = lines_path(world.store.root, found.spec.model.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.to_json())
    return path


def shown(world: World) -> ShownFigure:
    return show_figure("sgr-figure-6", world.results, Archive(world.results), Pictures(world.store.root))


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    for name in ("sgr-clean-cifar10", "sgr-pgd_sgr-cifar10"):
        made.model(f"{name}-reduced", name, scale="reduced", table="sgr-cifar10-a", dataset="cifar10")
    return made


def test_the_paper_shows_the_lines_of_its_models(world: World) -> None:
    put_lines(world, kept("sgr-clean-cifar10-reduced", examples=(1, 2, 5, 6, 9)))
    found = shown(world)
    assert [s.title for s in found.sketches] == [f"clean (reduced): test image {k}" for k in (1, 2, 5, 6)]
    assert (found.state, list(found.used)) == ("in part", ["sgr-clean-cifar10-reduced"])
    (lacking,) = found.missing
    assert lacking.line == "SGR, PGD"
    assert lacking.reason == "sgr-pgd_sgr-cifar10-reduced: its outputs along lines are not kept"
    command = "robench lines sgr-pgd_sgr-cifar10-reduced --attack pgd-40:stop_when_broken=false --threat Linf@4/255"
    assert lacking.commands == (f"{command} --examples 100",)
    put_lines(world, kept("sgr-pgd_sgr-cifar10-reduced"))
    found = shown(world)
    assert (found.state, len(found.sketches), found.missing) == ("drawn", 6, ())
    rows = list(csv.DictReader(io.StringIO(found.csv or "")))
    assert {row["model"] for row in rows} == {"sgr-clean-cifar10-reduced", "sgr-pgd_sgr-cifar10-reduced"}
    assert {row["record"] for row in rows} == {row["model"] for row in rows}
    world.model("sgr-clean-cifar10", "sgr-clean-cifar10", table="sgr-cifar10-a", dataset="cifar10")
    assert next(s.title for s in shown(world).sketches) == "clean (reduced): test image 1", "the paper's scale has none"
    put_lines(world, kept("sgr-clean-cifar10", examples=(4,)))
    assert next(s.title for s in shown(world).sketches) == "clean: test image 4"


def test_without_models_it_says_what_makes_them(tmp_path: Path) -> None:
    found = shown(World(tmp_path))
    assert found.sketches == ()
    assert [m.reason for m in found.missing] == ["not trained"] * 2
    assert [c.split()[:3] for c in found.missing[0].commands] == [
        ["robench", "train", "sgr-clean-cifar10"],
        ["robench", "lines", "sgr-clean-cifar10"],
    ]
    assert found.missing[0].smaller == "robench reproduce sgr-cifar10-a --scale reduced"
    assert found.asks_more
    # Two models, 100 images each, 40 gradients and as many forward passes.
    assert "passes of evaluation" in (found.cost or "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "of another training"}, "stale: the lines are of other weights"),
        ({"version": 99}, "stale: by an earlier version of the attack"),
        ({"attack": "pgd-40"}, "its lines are to the images of pgd-40 under Linf@4/255"),
        ({"threat": "Linf@8/255"}, "its lines are to the images of pgd:stop_when_broken=False under Linf@8/255"),
        (
            {"seed": 3},
            "its lines are to the images of pgd:stop_when_broken=False under Linf@4/255, seed 3",
        ),
        ({"dataset": "mnist"}, "its lines are of test images of mnist"),
    ],
)
def test_what_answers_another_question_is_not_drawn(world: World, changes: dict[str, Any], reason: str) -> None:
    put_lines(world, kept("sgr-clean-cifar10-reduced", **changes))
    found = shown(world)
    assert found.sketches == ()
    clean = next(missing for missing in found.missing if missing.line == "clean")
    assert clean.reason == f"sgr-clean-cifar10-reduced: {reason}"
    assert clean.commands[0].startswith("robench lines sgr-clean-cifar10-reduced ")


def test_a_damaged_file_stops_the_page(world: World, tmp_path: Path) -> None:
    path = put_lines(world, kept("sgr-clean-cifar10-reduced"))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"sgr-clean-cifar10-reduced\.json.*robench lines"):
        write_papers(["sgr-cifar10-a"], world.store, world.cards, tmp_path / "out")


def test_the_page_draws_them_and_links_to_the_file(world: World, tmp_path: Path) -> None:
    put_lines(world, kept("sgr-clean-cifar10-reduced"))
    out = tmp_path / "reports" / "leaderboards"
    write_papers(["sgr-cifar10-a"], world.store, world.cards, out)
    page = (out / "paper-sgr.html").read_text()
    section = re.search(r'<section class="paper-figure" id="sgr-figure-6">.*?</section>', page, re.DOTALL)
    assert section
    assert section[0].count('<svg class="chart"') == 2
    assert "h (adversarial)" in section[0]
    (link,) = re.findall(r'href="([^"]*/lines/[^"]*)"', section[0])
    assert (out / link).resolve() == lines_path(world.store.root, "sgr-clean-cifar10-reduced").resolve()
    assert (out / "paper-figures" / "sgr-figure-6.csv").is_file()


def test_the_page_of_the_model_draws_current_lines_only(world: World, tmp_path: Path) -> None:
    out, name = tmp_path / "reports" / "leaderboards", "sgr-clean-cifar10-reduced"

    def page() -> str:
        write_leaderboards(["robustness"], world.store, world.cards, out)
        return (out / "models" / f"{name}.html").read_text()

    put_lines(world, kept(name, examples=(1, 2, 5, 6, 9)))
    assert page().count("h (adversarial)") == 4
    assert "6 of 80 images fell, the first 4 are drawn" in page()
    assert "0.96 to 0.00" in page()
    rows = list(csv.DictReader(io.StringIO((out / "models" / f"{name}-lines.csv").read_text())))
    assert len(rows) == 4 * 3 * 5
    path = put_lines(world, kept(name, weights="of another training"))
    assert "(adversarial)" not in page()
    path.write_text("{}")
    with pytest.raises(UserError, match=r"cifar10-reduced\.json.*robench lines"):
        page()


def test_drawing_needs_no_torch() -> None:
    program = "import sys; import robench.reporting.lines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_committed_lines_are_of_the_committed_weights() -> None:
    for path in sorted((ROOT / "reports" / "lines").glob("*.json")):
        model = read_lines(path).spec.model
        card = json.loads((ROOT / "model_zoo" / path.stem / "card.json").read_text())
        assert (model.id, model.weights_sha256) == (path.stem, card["weights"]["sha256"])

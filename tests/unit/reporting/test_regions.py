"""Decision regions: what is drawn is what the model answers, and nothing stale is drawn."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from synthetic import first_of
from torch import nn

from robench import cli
from robench.checkpoints import load_card_model
from robench.datasets import open_split
from robench.errors import UserError
from robench.evaluation.regions import answers_everywhere
from robench.records import Provenance
from robench.registry import read_cards
from robench.reporting import write_leaderboards, write_papers
from robench.reporting.regions import (
    Panel,
    Regions,
    read_regions,
    regions_csv,
    regions_path,
    regions_svg,
)
from robench.store import Store
from robench.threat_model import ThreatModel
from robench.workspace import Workspace
from tests.unit.papers.worlds import World

ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = sorted((ROOT / "reports" / "regions").glob("*.json"))
PGD = "pgd-40:step_size=0.005,start=image"
MADE = Provenance(
    robench="0", code="c", torch="t", python="p", device="cpu", threads=1, command="robench", finished="f"
)
FACTS = {
    "model": "m",
    "weights_sha256": "w",
    "dataset": "d",
    "split_sha256": "s",
    "classes": ("5", "8"),
    "axes": ("t-SNE 1", "t-SNE 2"),
    "low": -10.0,
    "high": 10.0,
    "provenance": MADE,
}


def corner(**changes: object) -> Regions:
    """The second class where the first pixel is at least 100 and the second at least 200."""
    answers = np.zeros((256, 256), np.int64)
    answers[200:, 100:] = 1
    pixels = np.array([[0, 0], [255, 204], [51, 255]], np.uint8)
    return Regions.of(answers, pixels, np.array([0, 1, 1]), **{**FACTS, **changes})


class Above(nn.Module):
    """Answers 1 where the pixel `which` is above a half."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixel = images.flatten(1)[:, self.which]
        return torch.stack([torch.zeros_like(pixel), pixel - 0.5], 1)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_every_image_of_two_pixels_is_asked(shape: tuple[int, int, int]) -> None:
    for which in (0, 1):
        answers = answers_everywhere(Above(which), image_shape=shape, device=torch.device("cpu"))
        expected = np.arange(256) > 127.5
        assert np.array_equal(answers, np.broadcast_to(expected if which == 0 else expected[:, None], (256, 256)))


def test_regions_are_kept_by_runs_and_come_back(tmp_path: Path) -> None:
    found = corner()
    assert (found.rows[199], found.rows[200]) == ("0x256", "0x100 1x156")
    assert found.points == ("0 0 0", "255 204 1", "51 255 1")
    path = tmp_path / "m.json"
    path.write_text(found.to_json())
    again = read_regions(path)
    assert again == found
    assert again.answers()[200].sum() == 156
    assert again.coordinates(np.array([0, 51, 255])).tolist() == [-10, -6, 10]


def test_the_drawing_has_the_areas_the_points_and_the_ball_to_scale() -> None:
    panels = [Panel("A: 9 & 7 %", corner(), ThreatModel.parse("Linf@0.05")), Panel("B", corner())]
    drawing = ElementTree.fromstring(regions_svg([*panels, panels[0]]))
    assert drawing.attrib["viewBox"] == f"0 0 720 {2 * 376 + 24}"
    texts = [t.text for t in drawing.iter(f"{SVG}text")]
    assert texts.count("A: 9 & 7 %") == 2
    assert texts.count("Linf 1") == 2, "0.05 is 1 in the plane"
    assert {"-10", "-5", "0", "5", "10", "t-SNE 1", "t-SNE 2"} <= set(texts)
    areas = [p.attrib["d"] for p in drawing.iter(f"{SVG}path") if p.attrib["class"].startswith("area")]
    assert areas == ["M0 0h256v200h-256zM0 200h100v56h-100z", "M100 200h156v56h-156z"] * 3
    dots = [p.attrib["d"] for p in drawing.iter(f"{SVG}path") if p.attrib["class"].startswith("dots")]
    assert dots == ["M0.5 0.5h0", "M255.5 204.5h0M51.5 255.5h0"] * 3
    balls = [r for r in drawing.iter(f"{SVG}rect") if r.attrib["class"] == "ball"]
    assert [(b.attrib["width"], b.attrib["height"], b.attrib["rx"]) for b in balls] == [("25.50", "25.50", "0.00")] * 2
    rows = list(csv.reader(io.StringIO(regions_csv(panels[:1]))))
    assert rows == [
        ["model", "t-SNE 1", "t-SNE 2", "label", "answer"],
        ["m", "-10", "-10", "5", "5"],
        ["m", "10", "6", "8", "8"],
        ["m", "-6", "10", "8", "5"],
    ]


def test_a_class_keeps_its_colour_in_all_panels() -> None:
    other = corner(classes=("8", "5"))
    drawing = ElementTree.fromstring(regions_svg([Panel("A", corner()), Panel("B", other)]))
    classes = [p.attrib["class"] for p in drawing.iter(f"{SVG}path")]
    assert classes == ["area c0", "area c1", "dots c0", "dots c1", "area c1", "area c0", "dots c1", "dots c0"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rows": ["0x256"] * 255}, "256 of 256"),
        ({"rows": ["0x255"] * 256}, "256 of 256"),
        ({"rows": ["0x256"] * 255 + ["2x256"]}, "class 2 of 2"),
        ({"rows": ["a lot"] * 256}, "rows|invalid literal"),
        ({"points": ["0 0"]}, "two pixels and a label"),
        ({"points": ["0 256 0"]}, "not in 0..255"),
        ({"points": ["0 0 2"]}, "label 2 of 2"),
        ({"low": 10.0}, "not below"),
        ({"schema_version": 2}, "schema version 2"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, object], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**json.loads(corner().to_json()), **change}))
    with pytest.raises(UserError, match=problem) as told:
        read_regions(path)
    assert str(path) in str(told.value)


def test_the_page_of_the_paper_draws_current_regions_only(tmp_path: Path) -> None:
    world, out = World(tmp_path), tmp_path / "reports" / "leaderboards"
    for name in ("atent-toy2d", "atent-toy2d-naive"):
        world.model(name, name, table="atent-fig1")
        world.answer(name, PGD, first_of(559, 400), threat="Linf@0.05", clean=first_of(559, 500), split_size=559)
        path = regions_path(world.store.root, name)
        path.parent.mkdir(exist_ok=True)
        weights = world.cards[name].card.weights.sha256 if name == "atent-toy2d" else "of another training"
        path.write_text(corner(model=name, weights_sha256=weights).to_json())
    written = {path.name for path in write_papers(["atent-fig1"], world.store, world.cards, out)}
    assert {"atent-fig1-regions.svg", "atent-fig1-regions.csv"} <= written
    section = re.search(r'<section class="paper-table" id="atent-fig1">.*?</section>', page_of(out), re.DOTALL)
    assert section
    drawing = (out / "atent-fig1-regions.svg").read_text()
    assert drawing.strip() in section[0], "drawn into the page"
    titles = re.findall(r'<text class="title"[^>]*>([^<]*)<', drawing)
    assert titles == ["ATENT: 89.4 / 71.6 %"], "500 and 400 of 559; the other's are of weights that are gone"
    assert page_of(out).count('<svg class="regions"') == 1
    shutil.rmtree(world.store.root / "regions")
    (out / "atent-fig1-regions.svg").unlink()
    write_papers(["atent-fig1"], world.store, world.cards, out)
    assert 'class="plane"' not in page_of(out)
    assert not (out / "atent-fig1-regions.svg").exists()


def page_of(out: Path) -> str:
    return (out / "paper-atent.html").read_text()


def test_drawing_needs_no_torch() -> None:
    program = "import sys; import robench.reporting.regions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a naive model of the plane, trained for two epochs, and one of larger images."""
    root = tmp_path_factory.mktemp("plane")
    command = ["train", "--workspace", str(root), "--device", "cpu"]
    assert cli.run([*command, "atent-toy2d-naive", "--set", "epochs=2"]) == 0
    few = ["--set", "epochs=1", "--set", "train_examples=64", "--set", "selection.metric=last"]
    assert cli.run([*command, "digits-standard", *few]) == 0
    return root


def test_the_command_draws_what_the_model_answers(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.run(["regions", "atent-toy2d-naive", "--workspace", str(trained), "--device", "cpu"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in files] == [f"atent-toy2d-naive.{end}" for end in ("svg", "csv", "json")]
    found = read_regions(files[2])
    stored = read_cards([trained / "model_zoo"])["atent-toy2d-naive"]
    assert_same(found, stored)
    test = open_split("mnist-5v8-tsne", "test", Workspace(root=trained, data_root=trained, user_zoo=trained))
    assert (found.split_sha256, found.axes, found.low, found.high) == (test.sha256, ("t-SNE 1", "t-SNE 2"), -10, 10)
    rows = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert len(rows) == 559
    right = np.mean([row["label"] == row["answer"] for row in rows])
    model = load_card_model(stored.card, stored.folder)
    with torch.no_grad():
        logits = model(torch.from_numpy(test.read(np.arange(559))).float() / 255)
    assert right == pytest.approx(float((logits.argmax(1).numpy() == test.labels).mean()))
    assert right > 0.85


def test_the_page_of_the_model_draws_current_regions_only(trained: Path) -> None:
    assert cli.run(["regions", "atent-toy2d-naive", "--workspace", str(trained), "--device", "cpu"]) == 0
    store, cards = Store(trained / "reports"), read_cards([trained / "model_zoo"])
    models = store.root / "leaderboards" / "models"
    path = regions_path(store.root, "atent-toy2d-naive")

    def page(name: str) -> str:
        write_leaderboards(["robustness"], store, cards, models.parent)
        return (models / f"{name}.html").read_text()

    assert regions_svg([Panel("atent-toy2d-naive", read_regions(path))]).strip() in page("atent-toy2d-naive")
    assert len((models / "atent-toy2d-naive-regions.csv").read_text().splitlines()) == 1 + 559
    assert '<svg class="regions"' not in page("digits-standard")
    assert "epoch 1, the last one." in page("digits-standard")
    path.write_text(path.read_text().replace(read_regions(path).weights_sha256, "of another training"))
    assert '<svg class="regions"' not in page("atent-toy2d-naive")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["digits-standard"], "digits-standard classifies images of 1 x 8 x 8; regions are drawn of images of two"),
        (["atent-toy2d-naive", "--out", "x.png"], "--out x.png: the drawing is SVG; write x.svg"),
        (["atent-toy2d-nave"], "atent-toy2d-naive"),
        (["atent-toy2d-naive", "--dataset", "digits"], "digits|1, 8, 8|images"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments: list[str], problem: str, trained: Path, capsys) -> None:
    capsys.readouterr()
    assert cli.run(["regions", *arguments, "--workspace", str(trained)]) == 2
    told = capsys.readouterr().err
    assert re.search(problem, told)
    assert told.count("\n") == 1


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_regions_are_those_of_the_committed_models(path: Path) -> None:
    assert_same(read_regions(path), read_cards([ROOT / "model_zoo"])[path.stem])


def assert_same(found: Regions, stored) -> None:
    """The regions are what the model of the card answers; where two logits are equal to rounding, either is right."""
    assert found.weights_sha256 == stored.card.weights.sha256
    model = load_card_model(stored.card, stored.folder)
    answers = answers_everywhere(model, image_shape=stored.card.input_shape, device=torch.device("cpu"))
    assert (answers != found.answers()).mean() < 1e-4

"""The covariance beside a model: what is drawn is what was learned."""

from __future__ import annotations

import base64
import csv
import io
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from robench import cli
from robench.errors import UnsafeFile, UserError
from robench.registry import find_card
from robench.reporting.covariance import (
    Covariance,
    covariance_csv,
    covariance_picture,
    covariance_svg,
    read_covariance,
)
from robench.reporting.curves import BOTTOM, HEIGHT, TOP
from robench.training import loop
from tests.unit.training.problems import Watcher, make_workspace, run_training, small_recipe

SVG = "{http://www.w3.org/2000/svg}"
SGR = {
    "defense": {"name": "standard"},
    "threat": None,
    "selection": {"metric": "clean_accuracy"},
    "epochs": 2,
}


def sgr_recipe(workspace, **parameters):
    parameters = {"refresh": 3, **parameters}
    return small_recipe(workspace, **SGR, regularizers=[{"name": "sgr", "parameters": parameters}])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = make_workspace(tmp_path_factory.mktemp("covariance"))
    run_training(workspace, sgr_recipe(workspace), "function")
    run_training(workspace, sgr_recipe(workspace, form="full"), "full")
    run_training(workspace, small_recipe(workspace, **SGR), "plain")
    return workspace


def test_the_state_of_the_defense_is_part_of_the_checkpoint(workspace):
    for name, shape in (("function", (1, 1, 22)), ("full", (256, 256))):
        folder, card = find_card(name, workspace)
        state = load_file(folder / "defense.safetensors")
        assert set(state) == {"sgr/covariance", "sgr/estimates", "sgr/step"}
        assert state["sgr/covariance"].shape == shape
        assert (int(state["sgr/step"]), int(state["sgr/estimates"])) == (14, 5)
        assert card.defense_state.epoch == 2
        found = read_covariance(card, folder)
        assert np.array_equal(found.values, state["sgr/covariance"].numpy())
    assert find_card("plain", workspace)[1].defense_state is None


@pytest.mark.parametrize("form", ["full", "function"])
def test_resumed_trainings_end_with_the_same_covariance(workspace, monkeypatch, form):
    recipe = sgr_recipe(workspace, form=form)
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    for stop in (2, 8):
        with pytest.raises(KeyboardInterrupt):
            run_training(workspace, recipe, f"stopped-{form}", Watcher(stop_after=stop), resume=True)
    run_training(workspace, recipe, f"stopped-{form}", resume=True)
    for file in ("defense.safetensors", "model.safetensors"):
        straight = (workspace.model_zoo / form / file).read_bytes()
        assert (workspace.model_zoo / f"stopped-{form}" / file).read_bytes() == straight


def test_a_covariance_function_is_drawn_and_tabulated():
    values = np.zeros((3, 3, 4))
    values[0, 0] = [4, 2, 1, -1]
    values[1, 2] = values[2, 1] = [1, 0.5, 0, 0]
    covariance = Covariance("m", (3, 3, 2), values)
    rows = list(csv.DictReader(io.StringIO(covariance_csv(covariance))))
    assert list(rows[0]) == ["displacement", "R-R", "G-G", "B-B", "R-G", "R-B", "G-B"]
    assert [float(row["R-R"]) for row in rows] == [4, 2, 1, -1]
    assert [float(row["G-B"]) for row in rows] == [1, 0.5, 0, 0]
    assert [int(row["displacement"]) for row in rows] == [0, 1, 2, 3]
    drawing = ElementTree.fromstring(covariance_svg(covariance))
    lines = drawing.findall(f".//{SVG}polyline")
    assert len(lines) == 6
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    ticks = {t.text: float(t.attrib["y"]) - 4 for t in drawing.findall(f".//{SVG}text") if t.attrib.get("x") == "34"}
    assert min(map(float, ticks)) <= -1
    assert max(map(float, ticks)) >= 4
    at_zero, unit = ticks["0"], (HEIGHT - TOP - BOTTOM) / (max(map(float, ticks)) - min(map(float, ticks)))
    assert heights == pytest.approx([at_zero - v * unit for v in values[0, 0]], abs=0.2)


def test_a_matrix_is_drawn_as_a_picture_and_tabulated():
    matrix = np.diag([1.0, 2.0, 4.0])
    matrix[0, 2] = matrix[2, 0] = -4.0
    covariance = Covariance("m", (1, 1, 3), matrix)
    table = np.array([row[1:] for row in csv.reader(io.StringIO(covariance_csv(covariance)))][1:], dtype=float)
    assert np.array_equal(table, matrix)
    link = ElementTree.fromstring(covariance_svg(covariance)).find(f".//{SVG}image").attrib["href"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))))
    assert pixels.shape == (3, 3, 3)
    assert pixels[2, 2].tolist() == [10, 108, 102]
    assert pixels[0, 2].tolist() == [194, 87, 26]
    assert pixels[0, 1].tolist() == [255, 255, 255]


def test_large_matrices_are_drawn_by_blocks():
    factor = np.arange(2500.0)
    covariance = Covariance("m", (1, 50, 50), np.outer(factor, factor))
    table = np.array([row[1:] for row in csv.reader(io.StringIO(covariance_csv(covariance)))][1:], dtype=float)
    assert table.shape == (834, 834)
    assert table[1, 2] == pytest.approx(4 * 7)
    assert table[-1, -1] == 2499.0**2
    assert "mean of 3 x 3 entries" in covariance_svg(covariance)


def test_the_command_writes_both_files_and_needs_no_torch(workspace, tmp_path, capsys):
    program = (
        "import sys; from robench.cli import run; "
        f"status = run(['covariance', 'full', '--workspace', {str(workspace.root)!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    files = [Path(line) for line in done.stdout.splitlines()]
    assert [f.name for f in files] == ["full.svg", "full.csv"]
    assert all(f.stat().st_size > 100 for f in files)
    root = ["--workspace", str(workspace.root)]
    assert cli.run(["covariance", "function", "--out", str(tmp_path / "x.svg"), *root]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"x.svg", "x.csv"}
    assert cli.run(["covariance", "function", "--out", str(tmp_path / "x.png"), *root]) == 2
    assert "write" in capsys.readouterr().err


def test_models_without_a_covariance_and_damaged_files_are_named(workspace, tmp_path):
    folder, card = find_card("plain", workspace)
    with pytest.raises(UserError, match="plain was trained without a covariance"):
        read_covariance(card, folder)
    _, card = find_card("function", workspace)
    (tmp_path / "defense.safetensors").write_bytes(b"something else")
    with pytest.raises(UnsafeFile, match="not the file that its card names"):
        read_covariance(card, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_covariance(card, tmp_path / "nowhere")


def test_cards_without_the_field_still_load(workspace):
    folder, card = find_card("plain", workspace)
    text = (folder / "card.json").read_text(encoding="utf-8")
    assert '"defense_state": null' in text
    older = text.replace(' "defense_state": null,\n', "")
    assert "defense_state" not in older
    assert type(card).from_json(older, origin="test") == card


def test_a_page_has_a_light_form_of_a_large_matrix():
    values = np.random.RandomState(0).standard_normal((784, 784))
    covariance = Covariance("large", (1, 28, 28), values)
    rows = list(csv.reader(io.StringIO(covariance_csv(covariance, side=200))))
    assert rows[0][:3] == ["pixel", "0", "4"]
    assert len(rows) == len(rows[0]) == 1 + 196
    assert float(rows[3][2]) == pytest.approx(values[8:12, 4:8].mean(), rel=1e-6)
    picture = covariance_picture(covariance, side=200)
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (196, 196)
    assert len(picture) < 0.2 * len(covariance_picture(covariance))

"""Outputs along straight lines as a user asks for them."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch

from robench.checkpoints import load_card_model
from robench.datasets import open_split
from robench.registry import read_cards
from robench.reporting.lines import lines_svg
from robench.softmax_lines import read_lines
from robench.store import Store
from robench.workspace import Workspace

LINES = ("lines", "tiny", "--device", "cpu")


@pytest.mark.parametrize(("attack", "threat"), [("pgd-10", "Linf@0.1"), ("ddn-20", "L2@0.5")])
def test_the_lines_lead_to_what_an_evaluation_calls_fallen(workspace, robench, attack, threat):
    status, out, err = robench(*LINES, "--attack", attack, "--threat", threat, "--examples", "60", "--points", "7")
    assert status == 0, err
    files = [workspace / "reports" / "lines" / f"tiny.{end}" for end in ("svg", "csv", "json")]
    assert out.splitlines() == list(map(str, files))
    found = read_lines(files[2])
    question = ("--attack", attack, "--threat", threat, "--examples", "60")
    assert robench("eval", "--model", "tiny", *question, "--device", "cpu")[0] == 0
    store = Store(workspace / "reports")
    (stored,) = store.records()
    assert found.spec == stored.record.spec
    rows = store.outcomes(stored.record)
    fell = rows["attacked"] & ~rows["robust"]
    assert (found.attacked, found.fallen) == (rows["attacked"].sum(), fell.sum())
    assert 8 < found.fallen < found.attacked < 60, "some are wrong before, and some stand"
    assert [line.example for line in found.lines] == rows["example_id"][fell][:8].tolist()
    assert [line.adversarial for line in found.lines] == rows["adversarial_prediction"][fell][:8].tolist()
    assert [line.distance for line in found.lines] == pytest.approx(rows[threat[:-4].lower()][fell][:8], rel=1e-6)
    card = read_cards([workspace / "model_zoo"])["tiny"]
    test = open_split("digits", "test", Workspace(root=workspace, data_root=workspace, user_zoo=workspace))
    model = load_card_model(card.card, card.folder)
    clean = torch.from_numpy(test.read(rows["example_id"][fell][:8])).float() / 255
    with torch.no_grad():
        expected = model(clean).softmax(1).numpy()
    assert np.stack([line.softmax()[:, 0] for line in found.lines]) == pytest.approx(expected, abs=1e-5)
    assert files[0].read_text() == lines_svg(found)
    with files[1].open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8 * 10 * 7
    assert found.provenance.command.startswith("robench lines tiny --device cpu --attack")
    assert not list((workspace / "reports").glob("records/*/*.failed.json"))


def test_the_drawing_goes_where_it_is_told_and_the_numbers_stay(workspace, robench, tmp_path):
    drawing = tmp_path / "here" / "my.svg"
    status, out, err = robench(*LINES, "--threat", "Linf@0.2", "--out", drawing, "--json", "--examples", "20")
    assert status == 0, err
    assert json.loads(out) == [
        str(drawing),
        str(drawing.with_suffix(".csv")),
        str(workspace / "reports" / "lines" / "tiny.json"),
    ]
    found = read_lines(workspace / "reports" / "lines" / "tiny.json")
    assert found.spec.attack.parameters["stop_when_broken"] is False, "unless told otherwise it walks all steps"
    assert drawing.is_file()
    again = drawing.read_text()
    assert robench(*LINES, "--threat", "Linf@0.2", "--out", drawing, "--examples", "20")[0] == 0
    assert drawing.read_text() == again


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--threat", "Linf@0.0001"), r"under Linf@0.0001 broke none of the \d+ images of 100 .* --examples"),
        (("--attack", "pdg-40"), "unknown attack 'pdg-40'; did you mean 'pgd-40'"),
        (("--attack", "ddn-20", "--threat", "Linf@0.1"), "ddn-20 has no form for Linf, only for L2"),
        (("--threat", "0.1"), "threat model '0.1' is not NORM@EPSILON"),
        (("--out", "x.png"), "--out x.png: the drawing is SVG; write x.svg"),
        (("--points", "1"), r"'--points'.*given: 1"),
        (("--examples", "450"), "450 examples of digits test cannot be chosen; it has 449"),
        (("--examples", "0"), "0 examples of digits"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(workspace, robench, arguments, problem):
    status, out, err = robench(*LINES, *arguments)
    assert (status, out) == (2, "")
    assert re.search(problem, err)
    assert err.count("\n") == 1
    assert not (workspace / "reports" / "lines").exists()


def test_weights_that_are_not_their_cards_are_not_asked(workspace, robench):
    folder = workspace / "model_zoo" / "tiny"
    source = folder.resolve()
    folder.unlink()
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    status, _, err = robench(*LINES, "--threat", "Linf@0.2")
    assert status == 2
    assert "model.safetensors" in err
    assert err.count("\n") == 1
    assert not (workspace / "reports" / "lines").exists()
    assert robench("lines", "tyni")[2] == "robench: unknown model 'tyni'; did you mean 'tiny'?\n"

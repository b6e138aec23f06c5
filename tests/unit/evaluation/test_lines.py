"""Outputs along lines: those that are known of linear models, of images that fell and of no others."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robench import catalog
from robench.errors import EvaluationFailed
from robench.evaluation.lines import lines_of, softmax_along
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from tests.models import Linear, pictures

CPU = torch.device("cpu")


def found(model, images, spec, ids, *, most=250, points=5):
    return lines_of(
        model, images, ids, spec, device=CPU, training=lambda: pytest.fail("not asked"), points=points, most=most
    )


@pytest.mark.parametrize("points", [2, 7, 130])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 4)])
def test_of_a_linear_model_the_outputs_are_known_at_every_point(points, shape):
    model = Linear(5, 16 if shape[0] == 1 else 24)
    image, other = pictures(2, shape)
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    expected = np.empty((5, points))
    for place in range(points):
        share = place / (points - 1)
        logits = weight @ ((1 - share) * image + share * other).numpy().ravel() + bias
        expected[:, place] = np.exp(logits) / np.exp(logits).sum()
    outputs = softmax_along(model, image, other, points=points)
    assert outputs.shape == (5, points)
    assert outputs == pytest.approx(expected, abs=1e-12)
    assert np.abs(outputs[:, 0] - outputs[:, -1]).max() > 0.01, "the two ends differ"


def test_both_images_are_asked_as_they_are():
    seen = []

    def model(batch):
        seen.append(batch)
        return batch.flatten(1)

    image, other = (5 * pictures(2, (3, 16, 16)) - 2).clamp(0, 1).pow(3).float()
    softmax_along(model, image, other, points=200)
    line = torch.cat(seen)
    assert torch.equal(line[0], image)
    assert torch.equal(line[-1], other)
    assert (line >= torch.minimum(image, other) - 1e-7).all()
    assert (line <= torch.maximum(image, other) + 1e-7).all()
    steps = (line[1:] - line[:-1]).double()
    assert torch.allclose(steps, (other - image).double() / 199, atol=1e-6), "equally spaced"


def test_the_lines_are_those_of_the_first_images_that_fell(model, images, spec_of):
    spec, ids = spec_of()
    rows = Worker(model, images, device=CPU, precision="fp64")(Shard(spec, ids)).rows
    fell = rows["example_id"][rows["attacked"] & ~rows["robust"]]
    assert 20 < len(fell) < rows["attacked"].sum() < len(ids)
    whole = found(model, images, spec, ids)
    assert (whole.attacked, whole.fallen) == (rows["attacked"].sum(), len(fell))
    assert [line.example for line in whole.lines] == fell.tolist()
    assert found(model, images, spec, ids, most=3).lines == whole.lines[:3]
    clean = torch.from_numpy(images.read(fell)).double() / 255
    softmax = copy.deepcopy(model).double()(clean).softmax(1).detach().numpy()
    for line, expected in zip(whole.lines, softmax, strict=True):
        row = int(np.searchsorted(rows["example_id"], line.example))
        assert (line.label, line.adversarial) == (rows["label"][row], rows["adversarial_prediction"][row])
        assert line.distance == rows["linf"][row] <= 0.05 * (1 + 1e-6)
        outputs = line.softmax()
        assert outputs.shape == (5, 5)
        assert outputs[:, 0] == pytest.approx(expected, abs=1e-6)
        assert outputs[:, 0].argmax() == line.label
        assert outputs[:, -1].argmax() == line.adversarial != line.label


def test_what_fell_outside_the_ball_has_no_line(model, images, spec_of, nearest):
    spec, ids = spec_of("nearest", threat="Linf@0.03")
    rows = Worker(model, images, device=CPU, precision="fp64")(Shard(spec, ids)).rows
    inside = rows["attacked"] & rows["broken"] & (rows["linf"] <= 0.03 + 1e-6)
    assert 0 < inside.sum() < (rows["attacked"] & rows["broken"]).sum()
    answer = found(model, images, spec, ids)
    assert [line.example for line in answer.lines] == rows["example_id"][inside].tolist()
    assert max(line.distance for line in answer.lines) <= 0.03 + 1e-6


def test_where_nothing_falls_there_is_no_line(model, images, spec_of):
    spec, ids = spec_of(threat="Linf@0.000001")
    answer = found(model, images, spec, ids)
    assert (answer.fallen, answer.lines) == (0, ())
    assert answer.attacked > 0


@pytest.mark.parametrize(
    ("attack", "problem"),
    [
        (lambda model, images, labels, *, threat, random: images + 2, "outside-box"),
        (lambda model, images, labels, *, threat, random: 1 / 0, "crash: ZeroDivisionError"),
    ],
)
def test_an_attack_that_fails_makes_no_lines(model, images, spec_of, monkeypatch, attack, problem):
    class Fake(catalog.Plugin):
        def load(self):
            return SimpleNamespace(attack=attack)

    fake = Fake("attacks", "fake", "fake", Path("fake.py"), {"norms": ("Linf",), "version": 1}, {}, {}, frozenset())
    find = catalog.find
    monkeypatch.setattr(
        catalog, "find", lambda kind, name: fake if (kind, name) == ("attacks", "fake") else find(kind, name)
    )
    spec, ids = spec_of("fake")
    with pytest.raises(EvaluationFailed, match=rf"fake under Linf@0.05 failed on m: {problem}"):
        found(model, images, spec, ids)

"""Data sets with fewer classes than the usual attacks count on: everything runs, and the record says what changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robench.store import Store

NETWORK = """
import torch


class Corners(torch.nn.Module):
    # The class is the brightest of the image's corners.
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        corners = torch.nn.functional.avg_pool2d(images, 3).flatten(1)
        return 5 * corners[:, : self.classes] + 0.1 * corners.square().sum(1, keepdim=True)


def two():
    return Corners(2).eval()


def three():
    return Corners(3).eval()


def four():
    return Corners(4).eval()
"""

TARGETED = "the targeted DLR loss was replaced by the margin: it has no form below 4 classes or top-k"
UNTARGETED = "the DLR loss was replaced by the margin: it has no form below 3 classes or beyond top-1"


@pytest.fixture
def few(workspace, tmp_path):
    """Return the arguments that name a model and a data set of so many classes."""
    (tmp_path / "nets.py").write_text(NETWORK)

    def arguments(classes):
        rng = np.random.default_rng(classes)
        labels = np.arange(80) % classes
        images = rng.integers(60, 120, (80, 6, 6, 1), dtype=np.uint8)
        for row, label in enumerate(labels):
            top, left = 3 * (label // 2), 3 * (label % 2)
            images[row, top : top + 3, left : left + 3] += 80
        path = tmp_path / f"of{classes}.npz"
        np.savez(path, x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
        build = {2: "two", 3: "three", 4: "four"}[classes]
        return "eval", "--model", f"{tmp_path / 'nets.py'}:{build}", "--dataset", f"npz:{path}", "--examples", "12"

    return arguments


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_autoattack_runs_and_its_records_say_what_was_replaced(workspace, robench, few, classes):
    # So small that nothing falls, and every member goes all the way.
    whole = ("--attack", "autoattack:steps=5,queries=20")
    status, _, err = robench(*few(classes), "--suite", "autoattack", *whole, "--threat", "Linf@0.02")
    assert status == 0, err
    notes = {
        r.record.spec.attack.name.partition(":")[0]: set(r.record.notes) for r in Store(workspace / "reports").records()
    }
    fewer = f"{classes - 1} targets instead of 9: there are no more classes to aim at"
    assert notes["apgd-ce"] == notes["square"] == set()
    assert notes["apgd-t"] == notes["autoattack"] == ({fewer, TARGETED} if classes < 4 else {fewer})
    assert notes["fab"] == {fewer}


@pytest.mark.parametrize("classes", [2, 3])
def test_the_untargeted_dlr_is_the_margin_of_two_classes(robench, few, classes):
    attacks = ("--attack", "apgd-dlr:steps=5", "--attack", "pgd-10:loss=dlr")
    status, out, err = robench(*few(classes), *attacks, "--threat", "L2@0.3", "--json")
    assert status == 0, err
    for record in json.loads(out):
        assert record["notes"] == ([UNTARGETED] if classes == 2 else [])

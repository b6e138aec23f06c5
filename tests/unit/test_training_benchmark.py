"""The benchmark of training steps at a tiny size: what it counts and what it says. Nothing is timed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count

import pytest
import torch
from torch import nn

from benchmarks import training
from robench import catalog
from robench.classifier import random_images
from robench.defenses import last_layer
from robench.errors import UserError
from robench.random_streams import RandomStream
from tests.models import SmallNet


class Counting(nn.Module):
    """Counts forward passes, and the backward passes through each, by whether the weights were frozen."""

    def __init__(self):
        super().__init__()
        self.network = SmallNet(classes=10).float()
        self.counts = Counter()
        self.input_shape, self.num_classes = (1, 4, 4), 10

    def forward(self, images):
        logits = self.network(images)
        weights = next(self.network.parameters()).requires_grad
        kind = "weights" if weights else "images"
        self.counts["forward", kind if logits.requires_grad else "none"] += 1
        if logits.requires_grad:
            logits.register_hook(lambda _: self.counts.update([("backward", kind)]))
        return logits


def counts_of(name):
    model = Counting().train()
    images, labels = random_images((1, 4, 4), count=4), torch.arange(4)
    step = training.Step(model, images, labels, torch.optim.SGD(model.parameters()), lambda: 0.0)
    teacher = SmallNet(classes=10).float().eval()
    contestant = training.enter(name, "mnist", "Linf@0.1", "mlp_4x1024", step, teacher)
    loss = contestant.objective(model, images, labels, random=RandomStream(0, torch.arange(4)), progress=0.5)
    loss.total.backward()
    return model.counts


# A double pass is one forward pass and goes back through its logits once: ReLUs in their linear form lead the second
# way back past them.
EXPECTED = {
    "standard": {("forward", "weights"): 1, ("backward", "weights"): 1},
    "pgd_training": {
        ("forward", "images"): 10,
        ("backward", "images"): 10,
        ("forward", "weights"): 1,
        ("backward", "weights"): 1,
    },
    "trades": {
        ("forward", "none"): 1,
        ("forward", "images"): 10,
        ("backward", "images"): 10,
        ("forward", "weights"): 2,
        ("backward", "weights"): 2,
    },
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_step_takes_the_passes_that_the_ideal_has(name):
    assert counts_of(name) == EXPECTED[name]
    ideal = training.ideal_of(name)
    passes = {kind: ideal.get(kind, 0) for kind in ("forward", "input", "parameter")}
    found = EXPECTED[name]
    assert passes == {
        "forward": found.get(("forward", "none"), 0),
        "input": found.get(("forward", "images"), 0),
        "parameter": found["forward", "weights"],
    }


@pytest.mark.parametrize("base", ["standard", "pgd_training", "trades"])
def test_emr_adds_one_double_pass(base):
    added = counts_of(f"{base}+emr")
    added.subtract(EXPECTED[base])
    # Through the linear ReLUs nothing comes back to the logits a second time but the first backward pass itself.
    assert {key: value for key, value in added.items() if value} == {
        ("forward", "weights"): 1,
        ("backward", "weights"): 1,
    }
    ideal = dict(training.ideal_of(f"{base}+emr"))
    assert ideal.pop("double") == 1
    assert ideal == training.ideal_of(base)
    assert training.ideal_of(f"{base}+emr_exact")["double"] == 10


def test_ideals_of_the_papers_defenses():
    assert training.IDEALS["atent"]({"steps": 10, "truncate_average": 3}, 10) == {"input": 10, "parameter": 3}
    assert training.IDEALS["atent"]({"steps": 10, "truncate_average": 0}, 10) == {"input": 10, "parameter": 10}
    assert training.IDEALS["heat_smoothing"]({"kappa": 10}, 10) == {
        "forward": 1,
        "input_backward": 10,
        "parameter": 11,
    }
    assert training.IDEALS["sgr"]({}, 10) == training.IDEALS["gn"]({}, 10) == {"double": 1, "parameter": -1}


@pytest.mark.parametrize(
    "name",
    ["mart", "mail", "awp", "gaussian_noise", "lrc_noise_augmentation", "fgsm_adv", "pgd_adv", "trades_smoothing"],
)
def test_the_baselines_take_the_passes_that_their_ideals_have(name):
    found = counts_of(name)
    ideal = training.ideal_of(name)
    assert found["forward", "none"] == ideal.get("forward", 0)
    assert found["forward", "images"] == found["backward", "images"] == ideal.get("input", 0)
    assert found["forward", "weights"] == found["backward", "weights"] == ideal["parameter"]


def test_a_companion_is_one_more_network_to_pass():
    found = counts_of("lbgat")
    ideal = training.ideal_of("lbgat")
    assert (found["forward", "none"], found["forward", "images"]) == (ideal["forward"], ideal["input"])
    assert found["forward", "weights"] == found["backward", "weights"] == ideal["parameter"] - 1


def test_margins_belong_to_another_last_layer():
    model = training._built(training.Configured(name="digits_cnn"), Counting())
    step = training.Step(model, torch.zeros(0), torch.zeros(0), torch.optim.SGD(model.parameters()), lambda: 0.0)
    for name, head in (("standard+he", "CosineHead"), ("standard+l_softmax", "Linear")):
        entered = training.enter(name, "mnist", "Linf@0.1", "digits_cnn", step)
        assert type(last_layer(entered.step.model)).__name__ == head
        assert entered.step.model is not model
        assert training.ideal_of(name) == training.ideal_of("standard")
    assert training.enter("standard", "mnist", "Linf@0.1", "digits_cnn", step).step.model is model


def test_takes_part_whatever_the_catalog_has():
    names = training.default_names()
    entries = {p.entry for p in catalog.plugins("defenses").values()}
    assert {catalog.find("defenses", part).entry for name in names for part in name.split("+")} == entries
    assert "fast_training" in names, "a preset that has a goal"
    assert "trades+emr" in names
    assert "pgd_training+emr" in names
    assert len(set(names)) == len(names)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second each time it is looked at: everything takes one second."""
    ticks = count()
    monkeypatch.setitem(training.CLOCKS, "cpu", lambda: float(next(ticks)))


def test_report_has_ratios_and_says_where_no_ideal_is_known(ticking, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "IDEALS", {k: v for k, v in training.IDEALS.items() if k != "pgd_training"})
    monkeypatch.setitem(training.GOALS, "standard", training.Goal(0.4))
    file = tmp_path / "report.json"
    names = ["standard", "pgd_training", "trades+emr"]
    options = ["--model", "lenet5", "--batch-size", "2", "--repeats", "2", "--clock", "cpu", "--json", str(file)]
    training.main(["--defense", *names, *options])
    text = capsys.readouterr().out
    (report,) = json.loads(file.read_text())
    assert report["passes"] == dict.fromkeys(training.PASSES, 1.0)
    rows = report["rows"]
    assert list(rows) == ["standard", "pgd_training", "trades", "trades+emr"], "a regularizer's base takes part"
    assert rows["standard"]["ideal_seconds"] == 2
    assert rows["standard"]["of_ideal"] == 0.5
    assert rows["standard"]["met"] is False
    assert rows["pgd_training"]["ideal_seconds"] is rows["pgd_training"]["met"] is None
    assert rows["trades"]["ideal_seconds"] == 1 + 1 + 10 + 2
    assert rows["trades+emr"]["ideal_seconds"] == 1 + 1 + 10 + 2 + 1
    assert rows["trades+emr"]["of_base"] == 1
    assert rows["trades+emr"]["met"] is True
    lines = text.splitlines()
    assert (
        lines[lines.index(next(line for line in lines if line.startswith("pgd_training"))) + 1]
        .strip()
        .startswith("no ideal is known")
    )
    assert "at most 1.31 of base: yes" in text
    assert "at most 0.4 of ideal: NO" in text


def test_an_unknown_defense_is_refused():
    with pytest.raises(UserError, match="trades"):
        training.measure("lenet5", ["tradess"], batch_size=2, repeats=1, clock="cpu")

"""The ledger counts what is held at once, and a forecast from two small steps is what a large one holds."""

from __future__ import annotations

import pytest
import torch

from robench import training
from robench.training.data import Pixels
from robench.training.loop import Steps
from robench.training.memory import Ledger, growth
from tests.unit.training.problems import make_workspace, small_recipe

CPU = torch.device("cpu")
MEBIBYTE = 2**18  # float32 numbers


def test_storages_count_from_birth_to_death():
    before = torch.zeros(MEBIBYTE)
    with Ledger(CPU) as ledger:
        one = before + 1
        assert ledger.live == one.nbytes == 2**20
        view, same = one.view(512, 512)[3:], one.add_(1)
        assert ledger.live == 2**20, "views and operations in place make nothing"
        two = torch.cat([one, one])
        assert (ledger.live, ledger.peak) == (3 * 2**20, 3 * 2**20)
        del two
        assert (ledger.live, ledger.peak) == (2**20, 3 * 2**20)
        del one, view, same
        assert ledger.live == 0
    after = before + 1
    assert ledger.peak == 3 * 2**20
    del after


def test_what_a_backward_pass_keeps_is_counted():
    """A chain of sines keeps one tensor a link until it is differentiated."""
    start = torch.zeros(MEBIBYTE, requires_grad=True)
    with Ledger(CPU) as ledger:
        end = start
        for _ in range(5):
            end = end.sin()
        assert ledger.live == 5 * 2**20
        with torch.no_grad():
            for _ in range(5):
                start.sin()
        assert ledger.peak == 6 * 2**20
        del end


def test_other_devices_do_not_count():
    with Ledger(torch.device("cuda")) as ledger:
        torch.zeros(MEBIBYTE)
    assert ledger.peak == 0


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "momentum": 0.9}, {"name": "adam"}])
def test_the_forecast_is_what_a_whole_batch_holds(workspace, optimizer):
    """Two steps of 54 images, the second with the optimiser's state: its peak was told from two and three images."""
    recipe = small_recipe(workspace, batch_size=54, optimizer={"lr": 0.1, **optimizer})
    run = training.Run(name="x", device=CPU, command="robench train")
    forecast = training.forecast(recipe, run, workspace=workspace)
    with Ledger(CPU) as ledger:
        state = training._initial_state(recipe, run, workspace)
        state.model.train()
        pixels = Pixels(training.open_split(recipe.dataset, "train", workspace), CPU)
        steps = Steps(recipe=recipe, precision="fp32", pixels=pixels)
        begun = len(ledger.history)
        for step in range(2):
            ((ids, raw),) = steps.pixels.batches([torch.arange(54)])
            steps.take_step(state, ids, raw, total_step=step)
    assert forecast.bytes == pytest.approx(max(ledger.history[begun:]), rel=0.03)


def test_growth_is_told_where_a_batch_holds_the_most():
    """Weights of 100 that double when the optimiser steps; 10 for an image while they are evaluated."""
    assert growth([120, 200], [130, 200], batch=5) == (0, 200)
    assert growth([120, 200], [130, 200], batch=50) == (10, 100)
    assert growth([120, 200, 7], [130, 200], batch=50) == (0, 200), "not the same operations: the peaks' growth"

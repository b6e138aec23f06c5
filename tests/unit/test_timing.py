"""How long an image takes: what is timed, what is kept, and where it is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import timing_record
from torch import nn

from robench.classifier import Classifier
from robench.errors import UserError
from robench.leaderboards.inference_time import inference_time
from robench.papers.filling import Filler
from robench.papers.work import askings, check_scale, makings
from robench.records import Configured, TimingRecord
from robench.store import Store
from robench.timing import median_interval, time_queries


class Counting(nn.Module):
    """Remembers the batches that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        return images.flatten(1)[:, :3]


def timing(subject: str = "lenet5", *, copies: int = 1, median: float = 0.01, **changes: object) -> TimingRecord:
    return timing_record(subject, copies=copies, median=median, **changes)


def test_every_query_is_one_image_or_its_noisy_copies_in_turns():
    network = Counting()
    model = Classifier(network, input_shape=(1, 4, 4), num_classes=3)
    taken = time_queries(model, copies=50, sigma=0.5, queries=40, device=torch.device("cpu"))
    assert {count: len(seconds) for count, seconds in taken.items()} == {1: 40, 50: 40}
    assert [len(batch) for batch in network.seen] == [1, 50] * 43
    noise = torch.stack([many - one for one, many in zip(network.seen[::2], network.seen[1::2], strict=True)])
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(noise.mean().item()) < 0.01
    assert min(seconds.min() for seconds in taken.values()) > 0


def test_the_vote_is_the_class_of_most_copies():
    from robench.timing import _classify

    class Noisy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            many = torch.zeros(len(images), 3)
            many[:, 2] = 1.0
            many[0] = torch.tensor([9.0, 0.0, 0.0])
            return many

    model = Classifier(Noisy(), input_shape=(1, 4, 4), num_classes=3)
    assert _classify(model, torch.zeros(1, 4, 4), copies=5, sigma=0.1) == 2
    assert _classify(model, torch.zeros(1, 4, 4), copies=1, sigma=0.1) == 0


def test_the_interval_of_a_median_lies_between_its_values():
    seconds = np.arange(1.0, 101.0)
    # Between the 40th and the 61st of 100: P(40 <= binomial(100, 1/2) <= 60) = 0.965.
    assert median_interval(seconds) == (50.5, 40.0, 61.0)
    with pytest.raises(ValueError, match="takes 6"):
        median_interval(seconds[:5])


def test_the_table_has_every_machine_and_the_ratio(tmp_path: Path):
    store = Store(tmp_path)
    store.write_timing(timing(median=0.01))
    store.write_timing(timing(copies=100, median=0.2))
    store.write_timing(timing(device="cuda (A)", median=0.001))
    again = timing(copies=100, median=0.25)
    assert store.write_timing(again).is_file()
    tables = inference_time(store.results({}))
    assert [table.name for table in tables] == ["inference-time-cpu-x86_64-2", "inference-time-cuda-A-2"]
    assert [cell.value for cell in tables[0].column("median")] == [0.01, 0.25], "the later one replaced the earlier"
    assert [cell.value for cell in tables[0].column("ratio")] == [1.0, 25.0]
    assert [cell.value for cell in tables[0].column("rate")] == [100.0, 4.0]
    rate = next(iter(tables[0].column("rate")))
    assert rate.low == pytest.approx(1 / 0.011)
    assert rate.high == pytest.approx(1 / 0.009)


def test_the_papers_table_has_the_networks_own_time_and_no_other(tmp_path: Path):
    from robench import catalog

    parameters = catalog.find("architectures", "resnet34_555").settings()
    own = Configured(name="resnet34_555", parameters=parameters)
    store = Store(tmp_path)
    cell = Filler(store.results({})).fill("heat-2").cell("stochastic", "cifar10_cpu")
    assert cell.value is None
    assert cell.remedy == "robench time resnet34_555 --copies 100 --device cpu"
    store.write_timing(timing("resnet34", median=0.5, architecture=Configured(name="resnet34", parameters={})))
    store.write_timing(timing("resnet34_555", median=0.6, architecture=own, input_shape=(3, 64, 64)))
    store.write_timing(timing("resnet34_555", median=0.7, architecture=own, device="cuda (A)"))
    store.write_timing(timing("resnet34_555", median=0.02, architecture=own))
    before = Configured(name="resnet34_555", parameters={})  # recorded when the network had no parameter yet
    store.write_timing(timing("resnet34_555", copies=100, median=1.5, architecture=before))
    filled = Filler(store.results({})).fill("heat-2")
    found = {c: filled.cell("heat", c).value for c in ("cifar10_cpu", "cifar10_gpu", "imagenet_cpu", "imagenet_gpu")}
    assert found == {"cifar10_cpu": 0.02, "cifar10_gpu": 0.7, "imagenet_cpu": None, "imagenet_gpu": None}
    vote = filled.cell("stochastic", "cifar10_cpu")
    assert (vote.value, vote.text, vote.n) == (1.5, "1.5", 100)
    assert "cpu (x86_64), 2 threads" in vote.notes[0]
    assert filled.cell("stochastic", "imagenet_gpu").remedy == "robench time resnet50 --copies 25 --device cuda:0"


def test_nothing_is_trained_or_attacked_for_a_time():
    assert makings("heat-2", "paper") == []
    assert askings("heat-2", "paper") == []
    with pytest.raises(UserError, match="holds times"):
        check_scale("heat-2", "paper")

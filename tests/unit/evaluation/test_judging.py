"""How predictions are made changes what counts as broken, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robench.classifier import Classifier
from robench.evaluation.judging import Answer, Judge
from robench.evaluation.merging import merge, sort_rows
from robench.evaluation.shards import InvalidAnswer, split
from robench.evaluation.worker import Worker
from robench.random_streams import RandomStream
from robench.records import PLAIN, Decision
from tests.models import Linear, SmallNet, numbers, pictures
from tests.unit.evaluation.conftest import COUNT
from tests.unit.evaluation.test_merging import COST, MADE


class Doubtful(torch.nn.Module):
    """Adds noise of its own to the logits at every call."""

    def __init__(self, spread):
        super().__init__()
        self.inner, self.spread, self.calls = SmallNet().eval(), spread, 0

    def forward(self, images):
        self.calls += 1
        stream = RandomStream(self.calls, torch.arange(len(images)))
        logits = self.inner(images)
        return logits + self.spread * stream.normal(logits)


def judged(model, images, spec, ids, **options):
    worker = Worker(model, images, device=torch.device("cpu"), precision="fp32", batch_size=64, **options)
    return sort_rows([worker(shard).rows for shard in split(spec, ids, COUNT)])


def asked(spec_of, **decision):
    spec, ids = spec_of(attack="fgsm", precision="fp32")
    return spec.model_copy(update={"decision": Decision(**decision)}), ids


def test_a_decision_is_part_of_the_question(spec_of):
    identities = {asked(spec_of, **d)[0].identity for d in ({}, {"top_k": 2}, {"votes": 9}, {"sigma": 0.1})}
    assert len(identities) == 4


def test_top_2_forgives_the_second_place(model, images, spec_of):
    first, second = (judged(model, images, *asked(spec_of, top_k=k)) for k in (1, 2))
    assert second["attacked"].sum() > first["attacked"].sum()
    assert second["robust"].sum() > first["robust"].sum()
    assert (second["robust"] == (second["attacked"] & (second["adversarial_rank"] < 2))).all()


def test_votes_on_smoothed_images_belong_to_the_example(model, images, spec_of):
    spec, ids = asked(spec_of, votes=15, sigma=0.2)
    worker = Worker(model, images, device=torch.device("cpu"), precision="fp32", batch_size=64)
    whole = sort_rows([worker(shard).rows for shard in split(spec, ids, COUNT)])
    parts = sort_rows([worker(shard).rows for shard in split(spec, ids, 17)])
    assert (whole["clean_prediction"] == parts["clean_prediction"]).all()
    assert (whole["robust"] == parts["robust"]).all()
    plain = judged(model, images, *asked(spec_of))
    assert (plain["clean_prediction"] != whole["clean_prediction"]).any(), "the noise matters"


def test_repeated_decisions_show_the_models_randomness(images, spec_of):
    spec, ids = asked(spec_of, repeats=10)
    random = judged(Classifier(Doubtful(2.0).eval(), input_shape=(1, 4, 4), num_classes=5), images, spec, ids)
    record = merge(spec, random, cost=COST, errors=(), num_classes=5, provenance=MADE, outcomes_sha256="0" * 64)
    assert record.randomness is not None
    low, high = record.randomness.interval
    assert 0 < low < record.randomness.mean < high < 1
    assert record.randomness.undecided > COUNT / 10
    bits = (random["wrong_decisions"][:, None] >> np.arange(10)) & 1
    assert record.randomness.mean == pytest.approx(((bits == 0) & random["attacked"][:, None]).mean())
    steady = judged(Classifier(Doubtful(0.0).eval(), input_shape=(1, 4, 4), num_classes=5), images, spec, ids)
    wrong = np.where(steady["robust"] | ~steady["attacked"], 0, 2**10 - 1)
    assert (steady["wrong_decisions"] == wrong).all()


def test_more_votes_leave_less_to_luck():
    images, disagreement = numbers(64, 1, 4, 4).sigmoid(), {}
    for votes in (1, 101):
        judge = Judge(Doubtful(0.3).double(), num_classes=5)
        decision, stream = Decision(votes=votes, repeats=2), RandomStream(0, torch.arange(64))
        first, second = (judge.scores(decision, images, stream).argmax(1) for _ in range(2))
        disagreement[votes] = int((first != second).sum())
    assert disagreement[101] < disagreement[1] / 2


def test_nan_is_an_error_however_it_is_decided():
    model = Linear(3, 16)
    model.bias.data[1] = torch.nan
    for decision in (PLAIN, Decision(votes=3, sigma=0.1)):
        with pytest.raises(InvalidAnswer, match="NaN"):
            Judge(model, num_classes=3).scores(decision, pictures(2), RandomStream(0, torch.arange(2)))


def test_rounding_to_8_bits_can_undo_an_adversarial_image(spec_of):
    class Threshold(torch.nn.Module):
        def forward(self, images):
            pixel = images.flatten(1)[:, 0]
            return torch.stack([0.5 - pixel, pixel - 0.5], dim=1)

    spec, _ = asked(spec_of)
    images = torch.tensor([127.51, 127.6, 200.0]).view(3, 1, 1, 1) / 255
    judge, stream = Judge(Threshold(), num_classes=2), RandomStream(0, torch.arange(3))
    labels, broken = torch.zeros(3, dtype=torch.int64), torch.tensor([True, True, False])
    assert judge.broken_in_8_bit(spec, Answer(images, labels, broken), stream).tolist() == [True, True, False]
    nearly = torch.tensor([0.45, 0.45, 0.45]).view(3, 1, 1, 1) / 255  # black, once it is rounded

    class Dark(torch.nn.Module):
        def forward(self, images):
            pixel = images.flatten(1)[:, 0]
            return torch.stack([0.4 / 255 - pixel, pixel - 0.4 / 255], dim=1)

    dark = Judge(Dark(), num_classes=2)
    assert dark.broken_in_8_bit(spec, Answer(nearly, labels, broken), stream).tolist() == [False, False, False]

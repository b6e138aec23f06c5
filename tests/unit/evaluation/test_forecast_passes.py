"""What a table's plan says a question takes at most, against what an evaluation does."""

from __future__ import annotations

import pytest
import torch

from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.papers.work import attack_passes
from robench.records import Decision

COUNT = 60


@pytest.mark.parametrize("votes", [9, 40])
@pytest.mark.parametrize("attack", ["smoothed-pgd:steps=3,copies=5,sigma=0.2,stop=never", "pgd:steps=4"])
def test_votes_are_the_judges_alone(model, images, spec_of, attack, votes):
    """The search takes the same passes however many vote; what the judge takes more is bounded, and not from afar."""
    seen = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    spec, ids = spec_of(attack, "L2@0.3")
    asked, gradients = [], []
    for decision in (Decision(), Decision(votes=votes, sigma=0.01)):
        worker = Worker(model, images, device=torch.device("cpu"), precision=spec.precision, batch_size=64)
        seen.clear()
        rows = worker(Shard(spec.model_copy(update={"decision": decision}), ids[:COUNT])).rows
        asked.append(sum(seen))
        gradients.append(int(rows["backward_passes"].sum()))
    plain, voted = attack_passes(attack, "mnist", COUNT), attack_passes(attack, "mnist", COUNT, votes=votes)
    assert plain is not None
    assert voted is not None
    assert plain.gradient == voted.gradient >= max(gradients)
    # A single pass decides the first time; its passes are not in the forecast.
    more = voted.forward - plain.forward
    assert more / 3 < asked[1] - asked[0] <= more

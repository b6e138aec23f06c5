"""Every pass is charged to the example that it was made for."""

from __future__ import annotations

import torch

from robench.classifier import Classifier, search_copy
from robench.target import Ledger, Target, credit, narrowed, remark
from tests.models import Linear, pictures


def target(count: int) -> Target:
    return Target(Linear(3, 16).requires_grad_(False), Ledger.of(count))


def test_passes_are_counted_when_they_happen():
    model, images = target(3), pictures(3)
    with torch.no_grad():
        model(images)
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    assert model.ledger.forward_passes.tolist() == [2, 2, 2]
    assert model.ledger.backward_passes.tolist() == [0, 0, 0]
    torch.autograd.grad(logits.sum(), leaf, retain_graph=True)
    torch.autograd.grad(logits[:, 0].sum(), leaf)
    assert model.ledger.backward_passes.tolist() == [2, 2, 2]
    model(images[:0])
    assert model.ledger.forward_passes.tolist() == [2, 2, 2]


def test_examples_that_left_cost_nothing():
    model, images = target(4), pictures(4)
    some = narrowed(model, torch.tensor([3, 1]))
    some(images[[3, 1]])
    narrowed(some, torch.tensor([False, True]))(images[[1]])
    assert model.ledger.forward_passes.tolist() == [0, 2, 0, 1]


def test_candidates_side_by_side_count_each():
    model, images = target(2), pictures(2)
    model(images.repeat(5, 1, 1, 1))
    assert model.ledger.forward_passes.tolist() == [5, 5]


def test_passes_of_untold_examples_are_counted_apart():
    model, images = target(4), pictures(4)
    model(images[:3])
    assert model.ledger.unattributed == (3, 0)
    assert model.ledger.forward_passes.tolist() == [0, 0, 0, 0]


def test_members_and_remarks_reach_the_ledger_and_no_plain_module():
    model = target(3)
    credit(narrowed(model, torch.tensor([2, 0])), "square")
    remark(model, "so it is")
    assert model.ledger.broken_by == ["square", "", "square"]
    assert model.ledger.notes == {"so it is"}
    plain = model.model
    assert narrowed(plain, torch.tensor([0])) is plain
    credit(plain, "nobody")
    remark(plain, "nothing")


def test_search_copies_are_counted_like_any_model():
    classifier = Classifier(Linear(3, 16), input_shape=(1, 4, 4), num_classes=3)
    model = Target(search_copy(classifier, precision="fp32", device="cpu"), Ledger.of(2))
    leaf = pictures(2).float().requires_grad_()
    torch.autograd.grad(model(leaf).sum(), leaf)
    assert (model.ledger.forward_passes.tolist(), model.ledger.backward_passes.tolist()) == ([1, 1], [1, 1])

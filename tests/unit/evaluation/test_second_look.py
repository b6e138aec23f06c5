"""Saved images are believed only if they do what their record says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from robench.errors import UnsafeFile, UserError
from robench.evaluation.adversarials import AdversarialFiles
from robench.evaluation.campaign import Campaign, Execution
from robench.evaluation.second_look import Agreement, Bench, verify
from robench.records import Decision
from robench.store import Store
from tests.unit.evaluation.test_campaign import Watcher
from tests.unit.evaluation.test_merging import MADE

CPU = torch.device("cpu")
INTERRUPTED = 2


def laboratory(model, images, root, patience=1000, **options):
    execution = Execution(
        device=CPU, provenance=lambda: MADE, batch_size=50, shard_size=50, save_adversarials=True, **options
    )
    return Campaign(model, images, store=Store(root), execution=execution, progress=Watcher(patience))


@pytest.fixture
def campaign(model, images, tmp_path):
    return functools.partial(laboratory, model, images, tmp_path)


@pytest.fixture(scope="module")
def original(model, images, spec_of, tmp_path_factory):
    """A folder with a record in float64 whose images are saved."""
    root = tmp_path_factory.mktemp("original")
    laboratory(model, images, root).answer([spec_of()[0]], spec_of()[1])
    return root


@pytest.fixture
def made(original, tmp_path):
    """A copy of that record, its rows, and where its images are."""
    shutil.copytree(original, tmp_path / "made")
    store = Store(tmp_path / "made")
    (stored,) = store.records()
    return stored.record, store.outcomes(stored.record), AdversarialFiles(store.root)


@pytest.fixture
def look(made, images, model):
    def again(rows=None, **options):
        record, own, files = made
        bench = Bench(lambda identity: options.get("model", model), CPU)
        record = options.get("record", record)
        return verify(files.open(record), record, rows or own, images=options.get("images", images), bench=bench)

    return again


def change(made, alter, **metadata):
    """Rewrite the file of a record: `alter` gets its tensors."""
    record, _, files = made
    path = files.path(record.spec)
    tensors = load_file(path)
    alter(tensors)
    facts = {"identity": record.spec.identity, "weights_sha256": "0" * 64, "misclassified": "left"}
    save_file(tensors, path, metadata={k: v for k, v in {**facts, **metadata}.items() if v is not None})


def broken(made, count):
    _, rows, _ = made
    return np.flatnonzero(rows["attacked"] & rows["broken"])[:count]


def test_what_was_saved_agrees(look, made):
    assert look() == Agreement(examples=250, agreeing=250)
    record, _, files = made
    assert load_file(files.path(record.spec))["adversarial_images"].dtype == np.float64, "as it was judged"


@pytest.mark.parametrize("count", [1, 3])
def test_images_that_fool_nobody_are_counted(look, made, images, count):
    chosen = broken(made, count)

    def restore(tensors):
        tensors["adversarial_images"][chosen] = images.images[chosen] / 255

    change(made, restore)
    with pytest.raises(UnsafeFile, match=rf"{count} of 250 images do not do .* first is example {chosen[0]}\)"):
        look()


def test_a_record_that_hides_a_broken_example_is_contradicted(look, made):
    _, rows, _ = made
    (row,) = broken(made, 1)
    robust, fallen = rows["robust"].copy(), rows["broken"].copy()
    robust[row], fallen[row] = True, False
    with pytest.raises(UnsafeFile, match="1 of 250"):
        look({**rows, "robust": robust, "broken": fallen})
    with pytest.raises(UnsafeFile, match="1 of 250"):
        look({**rows, "robust": robust})


@pytest.mark.parametrize(
    ("value", "problem"),
    [(np.nan, "NaN or infinity"), (1.5, r"left \[0, 1\] by 0.5"), ("far", "distance .* exceeds Linf@0.05")],
)
def test_rules_hold_for_every_image(look, made, images, value, problem):
    def spoil(tensors):
        pixel = tensors["adversarial_images"][7, 0, 0]
        pixel[0] = (0.9 if images.images[7, 0, 0, 0] < 128 else 0.1) if value == "far" else value

    change(made, spoil)
    with pytest.raises(UnsafeFile, match=problem):
        look()


def test_the_boundary_is_nobody_s(look, made, images, model):
    """A point between image and adversarial image, so near to the boundary that rounding decides."""
    record, _, files = made
    (row,) = broken(made, 1)
    judge = copy.deepcopy(model).double()
    clean = torch.from_numpy(images.images[row : row + 1] / 255)
    end = torch.from_numpy(load_file(files.path(record.spec))["adversarial_images"][row : row + 1])
    label = images.labels[row]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        right = judge(clean + middle * (end - clean)).argmax(1).item() == label
        low, high = (middle, high) if right else (low, middle)
    for place, expected in ((low, 249), (high, 250), (0.5 * low, None)):

        def move(tensors, place=place):
            tensors["adversarial_images"][row] = (clean + place * (end - clean))[0].numpy()

        change(made, move)
        if expected is None:
            with pytest.raises(UnsafeFile, match="1 of 250"):
                look()
        else:
            agreement = look()
            assert (agreement.agreeing, agreement.borderline) == (expected, 250 - expected)


def test_files_of_something_else_are_refused(look, made, images, model):
    record, _, files = made
    change(made, lambda tensors: None, identity="f" * 16)
    with pytest.raises(UnsafeFile, match="holds images of question ffffffffffffffff"):
        look()
    change(made, lambda tensors: None, weights_sha256="f" * 64)
    with pytest.raises(UnsafeFile, match="holds images of question"):
        look()
    change(made, lambda tensors: None, misclassified=None)
    with pytest.raises(UnsafeFile, match="does not say its misclassified"):
        look()
    change(made, lambda tensors: None, misclassified="both")
    with pytest.raises(UnsafeFile, match="not what robench writes"):
        look()
    change(made, lambda tensors: tensors.update({name: values[1:].copy() for name, values in tensors.items()}))
    with pytest.raises(UnsafeFile, match="other examples than the record"):
        look()
    files.path(record.spec).write_bytes(b"{}")
    with pytest.raises(UnsafeFile, match=r"cannot be read .* evaluate again with --save-adversarials"):
        look()
    files.path(record.spec).unlink()
    with pytest.raises(UnsafeFile, match="there are no saved images"):
        look()


def test_other_data_and_other_weights_are_noticed(look, made, images, model):
    with pytest.raises(UnsafeFile, match="other examples"):
        look(images=dataclasses.replace(images, labels=(images.labels + 1) % 5))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.network.classify.weight.neg_()
    with pytest.raises(UnsafeFile, match="images do not do what record"):
        look(model=other)


def test_decisions_of_a_model_that_is_random_itself_cannot_be_repeated(look, made):
    record, _, files = made
    spec = record.spec.model_copy(update={"decision": Decision(votes=3)})
    change(made, lambda tensors: None, identity=spec.identity)
    files.path(record.spec).rename(files.path(spec))
    with pytest.raises(UserError, match="random itself"):
        look(record=record.model_copy(update={"spec": spec}))


def test_minimum_norms_need_no_ball_and_count_by_their_distance(nearest, campaign, spec_of, images, model):
    spec, ids = spec_of("nearest", "Linf@0.05")
    runs = campaign()
    (record,) = runs.answer([spec], ids)
    rows, bench = runs.store.outcomes(record), Bench(lambda identity: model, CPU)
    assert (rows["linf"][rows["broken"]] > 0.06).any()
    assert verify(runs.files.open(record), record, rows, images=images, bench=bench) == Agreement(250, 250)
    beyond = np.flatnonzero(rows["attacked"] & rows["broken"] & rows["robust"])[0]
    path, tensors = runs.files.path(spec), load_file(runs.files.path(spec))
    kept = tensors["adversarial_images"][beyond].copy()
    facts = {"identity": spec.identity, "weights_sha256": "0" * 64, "misclassified": "left"}
    tensors["adversarial_images"][beyond] = images.images[beyond] / 255
    save_file(tensors, path, metadata=facts)
    with pytest.raises(UnsafeFile, match=f"the first is example {beyond}"):
        verify(runs.files.open(record), record, rows, images=images, bench=bench)
    tensors["adversarial_images"][beyond] = kept
    save_file(tensors, path, metadata=facts)
    robust = rows["robust"].copy()
    robust[beyond] = False
    with pytest.raises(UnsafeFile, match=f"the first is example {beyond}"):
        verify(runs.files.open(record), record, {**rows, "robust": robust}, images=images, bench=bench)


def test_misclassified_examples_are_attacked_for_their_images_alone(campaign, spec_of, images, model):
    spec, ids = spec_of("pgd-10:stop_when_broken=false")
    plain = campaign()
    (record,) = plain.answer([spec], ids)
    path = plain.files.path(spec)
    left, rows = load_file(path)["adversarial_images"], plain.store.outcomes(record)
    assert plain.files.has(spec, "left")
    assert not plain.files.has(spec, "attacked")
    more = campaign(attack_misclassified=True)
    (again,) = more.answer([spec], ids)
    assert again == record
    assert more.progress.computed == 250, "the images were not there"
    attacked = load_file(path)["adversarial_images"]
    moved = np.abs(attacked - left).max(axis=(1, 2, 3)) > 0
    assert (moved == ~rows["attacked"]).all()
    assert (np.abs(left - images.images / 255)[~rows["attacked"]] == 0).all()
    bench = Bench(lambda identity: model, CPU)
    assert verify(more.files.open(record), record, rows, images=images, bench=bench) == Agreement(250, 250)
    assert more.files.has(spec, "left"), "more images than asked for will do"
    assert campaign().answer([spec], ids) == [record]
    assert (load_file(path)["adversarial_images"] == attacked).all()


def test_attacking_them_costs_the_record_nothing(campaign, spec_of, original):
    spec, ids = spec_of()
    (record,) = campaign(attack_misclassified=True).answer([spec], ids)
    (stored,) = Store(original).records()
    for passes in ("forward_passes", "backward_passes"):
        assert getattr(record.cost, passes) == getattr(stored.record.cost, passes)
    assert record.outcomes_sha256 == stored.record.outcomes_sha256


def test_shards_of_either_kind_are_not_mixed(campaign, spec_of):
    spec, ids = spec_of()
    with pytest.raises(KeyboardInterrupt):
        campaign(INTERRUPTED).answer([spec], ids)
    more = campaign(attack_misclassified=True)
    (record,) = more.answer([spec], ids)
    assert more.progress.computed == 250
    assert more.files.open(record).misclassified == "attacked"
    assert not list((more.store.root / ".work").glob("*.safetensors"))

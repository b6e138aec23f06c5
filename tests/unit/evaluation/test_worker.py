"""The engine: same answers however the work is cut, nothing invalid believed, every pass counted."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from robench import catalog
from robench.classifier import Classifier
from robench.errors import PreflightFailed
from robench.evaluation import worker as worker_module
from robench.evaluation.merging import sort_rows
from robench.evaluation.shards import split
from robench.evaluation.worker import Worker
from robench.losses import TOP_1, rank_of
from robench.lp_geometry import distance
from robench.target import Ledger
from tests.models import SmallNet
from tests.unit.evaluation.conftest import COUNT, same

CPU = torch.device("cpu")


def answer(model, images, spec, ids, *, batch_size=64, shard_size=COUNT, **options):
    worker = Worker(model, images, device=CPU, precision=spec.precision, batch_size=batch_size, **options)
    return [worker(shard) for shard in split(spec, ids, shard_size)]


def rows_of(results):
    return sort_rows([r.rows for r in results])


@pytest.mark.parametrize("threat", ["Linf@0.05", "L2@0.15"])
def test_batch_size_and_shards_change_no_outcome_in_float64(model, images, spec_of, threat):
    spec, ids = spec_of(threat=threat)
    expected = rows_of(answer(model, images, spec, ids, batch_size=64))
    assert 0.1 < expected["robust"].mean() < 0.8, "the problem is neither trivial nor hopeless"
    for options in ({"batch_size": 16}, {"batch_size": 250}, {"batch_size": 64, "shard_size": 63}):
        found = rows_of(answer(model, images, spec, ids, **options))
        for name, values in expected.items():
            assert same(found[name], values, name), (options, name)


def test_rows_say_what_happened(model, images, spec_of):
    spec, ids = spec_of()
    (result,) = answer(model, images, spec, ids, keep_adversarials="left")
    rows = result.rows
    assert (rows["attacked"] == (rows["clean_prediction"] == rows["label"])).all()
    assert not rows["attacked"][::10].any()
    assert (rows["robust"] == (rows["attacked"] & (rows["adversarial_prediction"] == rows["label"]))).all()
    assert (rows["linf"][~rows["attacked"]] == 0).all()
    adversarial = torch.from_numpy(result.adversarial_images)
    clean = torch.from_numpy(images.images).double() / 255
    assert np.allclose(distance(adversarial.double() - clean, "L2"), rows["l2"], atol=1e-6)
    judged = copy.deepcopy(model).double()(adversarial).argmax(1).numpy()
    assert (judged == rows["adversarial_prediction"]).all(), "saved in the precision that was judged"


def test_more_steps_and_restarts_never_help_the_defender(model, images, spec_of):
    shares = []
    for attack in ("pgd-10:step_size=0.01", "pgd-20:step_size=0.01", "pgd-20:step_size=0.01,restarts=3"):
        spec, ids = spec_of(attack=attack)
        shares.append(rows_of(answer(model, images, spec, ids))["robust"])
    assert (shares[0] >= shares[1]).all()
    assert (shares[1] >= shares[2]).all()


def test_every_pass_is_counted(model, images, spec_of):
    # So small a ball that nothing falls: 10 gradient steps per correct image, and the search copy's last look at the
    # eighth that is nearest to falling.
    spec, ids = spec_of(threat="Linf@0.000001")
    (result,) = answer(model, images, spec, ids)
    correct = int(result.rows["attacked"].sum())
    assert result.rows["robust"].sum() == correct
    assert result.cost.backward_passes == 10 * correct
    batches = [int(result.rows["attacked"][i : i + 64].sum()) for i in range(0, COUNT, 64)]
    assert result.cost.forward_passes == 10 * correct + sum(-(-n // 8) for n in batches)
    # So large a ball that all fall at the first look.
    spec, ids = spec_of(threat="Linf@1")
    (result,) = answer(model, images, spec, ids)
    assert result.cost.backward_passes < 2 * correct


def with_attack(monkeypatch, function):
    """Make the catalog's pgd run `function`."""
    plugin = catalog.find("attacks", "pgd")
    entry = dataclasses.replace(plugin.load(), attack=function)
    monkeypatch.setattr(catalog.Plugin, "load", lambda self: entry)


@pytest.mark.parametrize(
    ("attack", "kind"),
    [
        (lambda model, images, labels, **_: (images - 0.2).abs(), "outside-ball"),
        (lambda model, images, labels, **_: images * float("nan"), "not-a-number"),
        (lambda model, images, labels, **_: images[:1], "wrong-shape"),
        (lambda model, images, labels, **_: 1 / 0, "crash"),
        (lambda model, images, labels, **_: None.shape, "crash"),
    ],
)
def test_a_failing_attack_is_an_error_and_never_robust(model, images, spec_of, monkeypatch, attack, kind):
    spec, ids = spec_of()
    with_attack(monkeypatch, attack)
    results = answer(model, images, spec, ids, shard_size=100)
    assert [r.error.kind for r in results] == [kind] * 3
    assert all(not r.rows for r in results)
    assert [r.error.first_id for r in results] == [0, 100, 200]


def test_a_cpu_takes_batches_whose_activations_fit(model, images, spec_of, monkeypatch):
    # In float64 the image and the 6 maps of 4x4 after the ReLU are kept; the weights, kept once, do not count.
    monkeypatch.setattr(worker_module, "_CPU_BATCHES", (1, 512))
    monkeypatch.setattr(worker_module, "_CPU_ACTIVATIONS", 30 * ((1 + 6) * 4 * 4 * 8) + 1)
    spec, ids = spec_of()
    worker = Worker(model, images, device=CPU, precision="fp64")
    (shard,) = split(spec, ids, COUNT)
    worker(shard)
    assert worker.batch_size == 30


def test_disputes_beyond_the_narrowest_margins_are_found(model, images):
    """Rows are looked at in the order of their margins, an eighth at a time, until an eighth has no dispute."""
    worker = Worker(model, images, device=CPU, precision="fp32")
    logits = torch.zeros(80, 5)
    logits[:, 0] = torch.arange(80).flip(0) + 1.0  # the last row is the narrowest
    labels = torch.zeros(80, dtype=torch.int64)
    labels[::4] = 1  # these do not stand: 60 do, looked at by eights
    looked: list[int] = []

    class Doubtful(torch.nn.Module):
        def forward(self, rows):
            looked.append(len(rows))
            answers = torch.zeros(len(rows), 5)
            answers[rows.flatten(1)[:, 0] > 50, 2] = 1
            return answers

    worker.search = Doubtful()
    numbered = torch.arange(80.0).view(80, 1, 1, 1).expand(80, 1, 4, 4)
    disputed = worker._disputed(numbered, labels, logits, TOP_1, ledger=Ledger.of(80))
    assert sorted(disputed.tolist()) == [row for row in range(51, 80) if row % 4]
    assert looked == [8, 8, 8, 8]


def test_memory_that_runs_out_halves_the_batch(model, images, spec_of, monkeypatch):
    spec, ids = spec_of()
    pgd = catalog.find("attacks", "pgd").load().attack
    expected = rows_of(answer(model, images, spec, ids))
    sizes = []

    def hungry(model, images, labels, **options):
        sizes.append(len(images))
        if len(images) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return pgd(model, images, labels, **options)

    with_attack(monkeypatch, hungry)
    found = rows_of(answer(model, images, spec, ids, batch_size=128))
    assert max(sizes) > 20
    assert all(same(found[name], expected[name], name) for name in expected)


def test_one_example_that_does_not_fit_is_an_error(model, images, spec_of, monkeypatch):
    spec, ids = spec_of()

    def hungry(model, images, labels, **options):
        raise torch.OutOfMemoryError("out of memory")

    with_attack(monkeypatch, hungry)
    (result,) = answer(model, images, spec, ids)
    assert result.error.kind == "crash"
    assert "memory" in result.error.message


def test_a_search_that_is_wrong_about_success_is_repeated_on_the_judge(model, images, spec_of):
    """A search copy that believes everything is broken at once would stop at the start points."""
    spec, ids = spec_of(precision="fp32")
    honest = rows_of(answer(model, images, spec, ids))
    worker = Worker(model, images, device=CPU, precision="fp32", batch_size=64)

    class Deluded(torch.nn.Module):
        def forward(self, batch):
            return -model(batch)

    worker.search = Deluded()
    found = rows_of([worker(shard) for shard in split(spec, ids, COUNT)])
    assert (found["robust"] == honest["robust"]).mean() > 0.99


def test_nan_logits_on_clean_images_stop_the_evaluation(images, spec_of):
    broken = SmallNet().eval()
    broken.classify.bias.data[0] = float("nan")
    spec, ids = spec_of()
    with pytest.raises(PreflightFailed, match="NaN"):
        answer(Classifier(broken, input_shape=(1, 4, 4), num_classes=5), images, spec, ids)


def test_rank_breaks_ties_like_argmax():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert rank_of(logits, torch.tensor([0, 1, 0])).tolist() == [0, 1, 2]


def test_seed_and_restart_change_the_start(model, images, spec_of):
    found = []
    short = "pgd:steps=1,step_size=0.001"
    for attack, seed in ((short, 0), (short, 1), (f"{short},restarts=2", 0)):
        spec, ids = spec_of(attack=attack, seed=seed)
        found.append(answer(model, images, spec, ids, keep_adversarials="left")[0].adversarial_images)
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert (np.abs(one - other).max(axis=(1, 2, 3)) > 1e-3).mean() > 0.5


def test_nan_on_an_adversarial_image_is_an_error_and_not_class_zero(model, images, spec_of):
    class Fragile(torch.nn.Module):
        """Right on the images, NaN beside them."""

        def forward(self, batch):
            logits = model(batch)
            whole = ((batch * 255).round() / 255 - batch).abs().flatten(1).amax(1) < 1e-6
            return torch.where(whole[:, None], logits, torch.full_like(logits, torch.nan))

    spec, ids = spec_of(precision="fp32")
    fragile = Classifier(Fragile().eval(), input_shape=(1, 4, 4), num_classes=5)
    (result,) = answer(fragile, images, spec, ids)
    assert result.error.kind == "not-a-number"

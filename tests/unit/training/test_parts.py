"""Schedules, augmentation, order, seeding, averaging, snapshots, logs."""

from __future__ import annotations

import errno
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from robench.classifier import Classifier
from robench.datasets import fixed_shuffle
from robench.errors import StorageError, UnsafeFile, UserError
from robench.random_streams import RandomStream
from robench.recipe import CropFlip, NoAugmentation
from robench.training import snapshot
from robench.training.augmentation import augmented
from robench.training.data import Pixels, as_floats, epoch_order, steps_per_epoch
from robench.training.log import ScalarsFile, write_log
from robench.training.optimization import averaged_copy, update_average
from robench.training.schedules import learning_rate
from robench.training.seeding import seeded
from robench.training.snapshot import read_snapshot, write_snapshot
from tests.unit.training.problems import make_workspace, small_recipe

CPU = torch.device("cpu")


def rates(tmp_path, schedule, epochs=4, steps=10):
    recipe = small_recipe(make_workspace(tmp_path), schedule=schedule, epochs=epochs)
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 1.0})})
    return [learning_rate(recipe, step, steps) for step in range(epochs * steps)]


def test_constant_with_warmup(tmp_path):
    found = rates(tmp_path, {"name": "constant", "warmup": 0.5})
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert set(found[5:]) == {1.0}


def test_steps_at_milestones_fractions_included(tmp_path):
    found = rates(tmp_path, {"name": "step", "milestones": [1, 2.5], "factor": 0.1})
    assert found == pytest.approx([1.0] * 10 + [0.1] * 15 + [0.01] * 15)


def test_cosine_halves_in_the_middle(tmp_path):
    found = rates(tmp_path, {"name": "cosine"})
    assert found[0] == 1
    assert found[20] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.01


def test_one_cycle_rises_to_its_peak_and_falls(tmp_path):
    found = rates(tmp_path, {"name": "one-cycle", "peak": 0.25})
    top = found.index(max(found))
    assert top in (9, 10)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found) > 0


def pictures(count=12, side=6):
    return torch.arange(count * 2 * side * side).remainder(251).to(torch.uint8).view(count, 2, side, side)


def stream(ids, epoch=0):
    return RandomStream(5, ids, ("training", epoch))


def test_no_augmentation_is_none():
    images = pictures()
    assert augmented(images, NoAugmentation(), stream(torch.arange(12))) is images


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror():
    images, pad, side = pictures(40), 2, 6
    found = augmented(images, CropFlip(name="crop-flip", pad=pad), stream(torch.arange(40)))
    padded = nn.functional.pad(images, (pad,) * 4)
    seen = set()
    for image, crop in zip(padded, found, strict=True):
        windows = {
            (top, left, flip): window.flip(2) if flip else window
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for flip in (False, True)
            for window in [image[:, top : top + side, left : left + side]]
        }
        matching = [key for key, window in windows.items() if torch.equal(window, crop)]
        assert matching
        seen.add(matching[0])
    assert {key[2] for key in seen} == {False, True}
    assert {key[0] for key in seen} == {key[1] for key in seen} == set(range(2 * pad + 1))


def test_augmentation_belongs_to_example_and_epoch_not_to_the_batch():
    images, ids, crop = pictures(), torch.arange(12), CropFlip(name="crop-flip", pad=2)
    whole = augmented(images, crop, stream(ids))
    rows = torch.tensor([7, 2, 11])
    assert torch.equal(augmented(images[rows], crop, stream(ids[rows])), whole[rows])
    assert not torch.equal(augmented(images, crop, stream(ids, epoch=1)), whole)


def test_without_flip_nothing_is_mirrored():
    image = torch.zeros(30, 1, 5, 5, dtype=torch.uint8)
    image[:, :, 2, 1:4] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    found = augmented(image, CropFlip(name="crop-flip", pad=1, flip=False), stream(torch.arange(30)))
    for crop in found:
        present = [v for v in crop.flatten().tolist() if v]
        assert present == sorted(present)


def test_every_epoch_is_another_permutation_in_even_batches():
    orders = [epoch_order(103, 10, seed=1, epoch=e) for e in (0, 1)]
    for order in orders:
        assert len(order) == steps_per_epoch(103, 10) == 11
        assert {len(batch) for batch in order} <= {9, 10}
        assert sorted(torch.cat(order).tolist()) == list(range(103))
    assert not torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))
    again = epoch_order(103, 10, seed=1, epoch=1)
    assert all(torch.equal(a, b) for a, b in zip(again, orders[1], strict=True))


class Streaming:
    """An image set that is read in pieces, and remembers by which thread."""

    in_memory = False
    classes = ("a", "b")
    image_shape = (1, 2, 2)

    def __init__(self, count=20, fail_at=None):
        self.labels = np.arange(count) % 2
        self.fail_at = fail_at
        self.threads = set()

    def __len__(self):
        return len(self.labels)

    def read(self, positions):
        self.threads.add(threading.current_thread())
        if self.fail_at in positions.tolist():
            raise OSError("a damaged file")
        return np.broadcast_to(positions.astype(np.uint8)[:, None, None, None], (len(positions), 1, 2, 2)).copy()


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_streamed_pixels_arrive_in_order_from_another_thread(batch_size):
    source = Streaming()
    batches = epoch_order(20, batch_size, seed=0, epoch=0)
    for batch, (ids, images) in zip(batches, Pixels(source, CPU).batches(batches), strict=True):
        assert torch.equal(ids, batch)
        assert images[:, 0, 0, 0].tolist() == batch.tolist()
    assert threading.main_thread() not in source.threads
    assert not any(thread.is_alive() for thread in source.threads)


def test_fewer_training_images_are_the_first_of_the_fixed_shuffle():
    source, chosen = Streaming(), set(fixed_shuffle(20)[:7].tolist())
    pixels = Pixels(source, CPU, count=7)
    assert len(pixels) == 7
    seen = []
    for ids, images in pixels.batches(epoch_order(len(pixels), 3, seed=0, epoch=0)):
        # Ids are the examples' own, so that labels and random numbers are theirs, too.
        assert images[:, 0, 0, 0].tolist() == ids.tolist()
        assert pixels.labels[ids].tolist() == (ids % 2).tolist()
        seen += ids.tolist()
    assert sorted(seen) == sorted(chosen)
    with pytest.raises(UserError, match="train_examples = 21 is more than the 20 images"):
        Pixels(source, CPU, count=21)


def test_a_failing_read_reaches_the_loop_and_stops_the_thread():
    source = Streaming(fail_at=7)
    with pytest.raises(OSError, match="damaged"):
        list(Pixels(source, CPU).batches(list(torch.arange(20).split(2))))
    assert not any(thread.is_alive() for thread in source.threads)


def test_floats_are_in_the_box():
    assert as_floats(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


def test_seeding_repeats_and_leaves_the_callers_generator_alone():
    before = torch.get_rng_state()
    draws = []
    for labels in (("step", 1), ("step", 1), ("step", 2)):
        with seeded(CPU, 0, *labels):
            draws.append(torch.empty(4).uniform_())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_average_follows_weights_and_running_statistics():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    model = Classifier(network, input_shape=(1, 2, 2), num_classes=3)
    average = averaged_copy(model)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(30):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        update_average(average, model, decay=0.7, step=step)
        decay = min(0.7, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value
            expected[name] = mixed if value.is_floating_point() else value.double()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())


def test_snapshots_read_back_equal(tmp_path):
    path = tmp_path / "run" / "snapshot.safetensors"
    tensors = {"model/a": torch.arange(6.0).view(2, 3).T, "sums/loss": torch.tensor(0.1, dtype=torch.float64)}
    write_snapshot(path, tensors, {"epoch": 2, "rows": [{"epoch": 1.0}]})
    found, facts = read_snapshot(path)
    assert facts == {"epoch": 2, "rows": [{"epoch": 1.0}]}
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_a_crash_while_writing_leaves_the_former_snapshot(tmp_path, monkeypatch):
    path = tmp_path / "snapshot.safetensors"
    write_snapshot(path, {"a": torch.ones(2)}, {"epoch": 1})

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        write_snapshot(path, {"a": torch.zeros(2)}, {"epoch": 2})
    assert read_snapshot(path)[1] == {"epoch": 1}


def test_damaged_and_foreign_snapshots_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "snapshot.safetensors"
    write_snapshot(path, {"a": torch.ones(200)}, {"epoch": 1})
    whole = path.read_bytes()
    for damaged in (b"", b"\x80\x04junk", whole[:100], whole[:-5]):
        path.write_bytes(damaged)
        with pytest.raises(UnsafeFile, match="no readable checkpoint"):
            read_snapshot(path)
    monkeypatch.setattr(snapshot, "FORMAT", 2)
    write_snapshot(path, {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="another version"):
        read_snapshot(path)


def test_the_log_has_a_row_per_epoch_and_seconds_last(tmp_path):
    write_log(tmp_path / "log.csv", [{"epoch": 1.0, "seconds": 2.5}, {"epoch": 2.0, "extra": 0.25, "seconds": 5.0}])
    lines = (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["epoch,extra,seconds", "1,,2.5", "2,0.25,5"]


def test_scalars_after_the_snapshot_are_cut_off(tmp_path):
    path = tmp_path / "scalars.jsonl"
    with ScalarsFile(path, 0) as file:
        file.append(50, {"loss": 1.5})
        length = file.flushed()
        file.append(100, {"loss": 0.5})
    with ScalarsFile(path, length) as file:
        file.append(100, {"loss": 0.25})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 50, "loss": 1.5},
        {"step": 100, "loss": 0.25},
    ]


def test_logs_that_cannot_be_written_name_the_remedy(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for write in (lambda path: ScalarsFile(path, 0), lambda path: write_log(path, [{"epoch": 1.0}])):
        with pytest.raises(StorageError, match=r"cannot write to .*/taken: a file is in the way; .* with --workspace$"):
            write(tmp_path / "taken" / "scalars.jsonl")


def test_a_full_disk_is_said_by_the_log_of_steps(tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = ScalarsFile(tmp_path / "scalars.jsonl", 0)
    log._file.close()
    log._file = SimpleNamespace(write=full, flush=full, close=full)
    for use in (lambda: log.append(1, {"loss": 1.0}), log.flushed, lambda: log.__exit__(None, None, None)):
        with pytest.raises(StorageError, match="the disk is full; free some space"):
            use()

"""Noise with a scale and no bound: judged wherever it lies; and noise with the covariance of the training split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from robench.datasets import ArrayImages
from robench.errors import UserError
from robench.evaluation.shards import split
from robench.evaluation.training_moments import TrainingMoments, second_moment_factor
from robench.evaluation.verification import find_violation
from robench.evaluation.worker import Worker
from robench.threat_model import ThreatModel

CPU = torch.device("cpu")


def answer(model, images, question, **options):
    spec, ids = question
    worker = Worker(model, images, device=CPU, precision=spec.precision, batch_size=64, **options)
    (result,) = [worker(shard) for shard in split(spec, ids[:120], 120)]
    return result


def test_noise_outside_the_ball_counts(model, images, spec_of):
    rows = answer(model, images, spec_of("lrc-noise-2:samples=20", "Linf@0.1")).rows
    fallen = rows["attacked"] & ~rows["robust"]
    assert np.array_equal(fallen, rows["attacked"] & rows["broken"])
    assert (rows["linf"][fallen] > 0.1).any()
    assert 0 < fallen.sum() < rows["attacked"].sum()


def test_an_attack_of_the_ball_is_held_to_it(model, images, spec_of):
    rows = answer(model, images, spec_of("random-noise:samples=20", "Linf@0.1")).rows
    assert (rows["linf"] <= 0.1 + 1e-6).all()


@pytest.mark.parametrize("clip", [True, False])
def test_only_noise_that_was_asked_for_without_clipping_may_leave_the_box(model, images, spec_of, clip):
    result = answer(model, images, spec_of(f"lrc-noise-8:samples=1,clip={clip}", "Linf@0.7"), keep_adversarials="left")
    assert result.error is None
    inside = (result.adversarial_images >= 0).all() and (result.adversarial_images <= 1).all()
    assert inside == clip
    outside = torch.full((1, 1, 2, 2), 1.5)
    assert find_violation(outside, outside * 0, None).kind == "outside-box"
    assert find_violation(outside, outside * 0, None, box=False) is None
    assert find_violation(outside * torch.nan, outside, None, box=False).kind == "not-a-number"
    ball = ThreatModel(norm="Linf", epsilon="0.1")
    assert find_violation(outside, outside * 0, ball, box=False).kind == "outside-ball"


def training_split(count=400):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    pixels[:, :, 0] = 0  # as the margins of handwritten digits
    pixels[:, :, 2] = pixels[:, :, 3] // 2
    return ArrayImages(images=pixels, labels=np.zeros(count, np.int64), classes=("a",), origin="made here")


def test_factor_is_a_root_of_the_second_moments():
    images = training_split()
    flat = images.images.reshape(len(images), -1).astype(float) / 255
    moments = flat.T @ flat / len(images)
    factor = second_moment_factor(images, CPU).numpy()
    assert np.allclose(factor @ factor.T, moments / np.diag(moments).mean(), atol=1e-12)


def test_factor_of_images_that_are_too_large_is_refused():
    pixels = np.zeros((2, 3, 64, 64), np.uint8)
    images = ArrayImages(images=pixels, labels=np.zeros(2, np.int64), classes=("a",), origin="made here")
    with pytest.raises(UserError, match="12288"):
        second_moment_factor(images, CPU)


def test_noise_with_the_covariance_of_the_training_split(model, images, spec_of):
    training = training_split()
    opened = []

    def open_training():
        opened.append(True)
        return training

    options = f"samples=1,clip=false,covariance=training:{training.sha256[:12]}"
    result = answer(
        model, images, spec_of(f"lrc-noise:{options}", "Linf@0.2"), keep_adversarials="left", training=open_training
    )
    assert opened == [True], "once for all batches"
    rows = result.rows
    clean = images.images[rows["example_id"]] / 255
    noise = (result.adversarial_images - clean)[rows["attacked"]]
    assert np.abs(noise[:, :, 0]).max() < 1e-6, "pixels that are always black stay so"
    # The third row of pixels is half of the fourth.
    assert np.allclose(noise[:, :, 2], noise[:, :, 3] / 2, atol=0.02)
    assert noise.std() == pytest.approx(0.2, rel=0.1)


def test_other_data_than_were_named_are_refused(model, images, spec_of):
    training = training_split()
    wrong = spec_of("lrc-noise:covariance=training:0123456789abcdef", "Linf@0.2")
    with pytest.raises(UserError, match=f"write covariance=training:{training.sha256[:16]}"):
        answer(model, images, wrong, training=lambda: training)
    with pytest.raises(UserError, match="no training split"):
        answer(model, images, wrong)
    with pytest.raises(UserError, match="write lrc or training:HASH"):
        answer(model, images, spec_of("lrc-noise:covariance=dataset", "Linf@0.2"), training=lambda: training)


def test_training_split_is_not_opened_without_need(model, images, spec_of):
    def never():
        raise AssertionError

    assert answer(model, images, spec_of("lrc-noise:samples=1", "Linf@0.2"), training=never).error is None
    assert dataclasses.is_dataclass(training_split())
    with pytest.raises(UserError, match="no training split"):
        TrainingMoments(None, CPU)()

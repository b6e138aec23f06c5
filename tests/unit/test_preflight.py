"""Every way to break the classifier contract is stopped with its likely cause; sound models pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robench.classifier import Classifier, random_images
from robench.errors import PreflightFailed
from robench.preflight import preflight
from robench.records import Decision, Proportion
from robench.statistics import proportion
from tests.models import SmallNet

SHAPE = (1, 4, 4)
IMAGES = random_images(SHAPE, count=100)


class Wrapped(nn.Module):
    """A sound network whose answers a test spoils."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SmallNet().float()

    def forward(self, images: Tensor) -> Tensor:
        return self.spoil(self.network(images))

    def spoil(self, logits: Tensor) -> Tensor:
        return logits


class Probabilities(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class NotANumber(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(len(logits))[:, None] == 1, torch.nan)


class TooManyClasses(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        return torch.cat([logits, logits], 1)


class Tuple(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        return (logits, logits)  # type: ignore[return-value]


class Crashing(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        raise KeyError("no such head\nsecond line")


class BatchStatistics(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(0)


class Randomised(Wrapped):
    """Changes its answer at every call, without a random generator that other tests could notice."""

    calls = 0

    def spoil(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits * (1 + 1e-3 * self.calls)


class Counting(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def spoil(self, logits: Tensor) -> Tensor:
        self.seen += 1
        return logits


class Detached(Wrapped):
    def spoil(self, logits: Tensor) -> Tensor:
        return logits.detach()


class Quantised(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * 4).round() / 4)


class Constant(Wrapped):
    """What is left where every unit is dead: the last layer's bias."""

    def forward(self, images: Tensor) -> Tensor:
        return 0 * super().forward(images).clamp(-1, 1) + torch.tensor([1.5, *[-0.5] * 4], dtype=images.dtype)


class InfiniteSlope(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - images).sqrt() + images)


def sound(network: nn.Module | None = None) -> Classifier:
    return Classifier((network or Wrapped()).eval(), input_shape=SHAPE, num_classes=5)


def labels(model: Classifier) -> Tensor:
    with torch.no_grad():
        return model(IMAGES).argmax(1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Probabilities, "probabilities"),
        (NotANumber, "NaN or infinite logits"),
        (TooManyClasses, r"returns \(32, 10\) for 32 images, not \(32, 5\)"),
        (Tuple, "returns a tuple"),
        (Crashing, "fails on images of shape .*KeyError: 'no such head"),
        (BatchStatistics, "depends on the rest of the batch"),
        (Randomised, "answers the same images differently"),
        (Counting, r"changes it \(buffer network.seen\)"),
        (Detached, "no gradient leads"),
        (Constant, "it has collapsed to a constant"),
        (Quantised, "zero for all of them"),
        (InfiniteSlope, "gradient to the images has NaN"),
    ],
)
def test_a_broken_model_is_stopped(network: type[Wrapped], message: str) -> None:
    with pytest.raises(PreflightFailed, match=message) as caught:
        preflight(sound(network()), IMAGES, torch.zeros(100, dtype=torch.int64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [("", "Wrapped"), ("network", "Wrapped"), ("network.network.features.1", "network.features.1")],
)
def test_train_mode_is_stopped_even_of_a_single_layer(spoiled: str, named: str) -> None:
    model = sound()
    model.get_submodule(spoiled).training = True
    with pytest.raises(PreflightFailed, match=f"train mode \\({named}\\)"):
        preflight(model, IMAGES, labels(model))


def test_batch_norm_without_running_statistics_is_stopped() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, 5))
    model = sound(network)
    # One image has no batch statistics at all: the layer refuses it, or its answer differs.
    with pytest.raises(PreflightFailed, match=r"depends on the rest of the batch|fails on images of shape \(1"):
        preflight(model, IMAGES, torch.zeros(100, dtype=torch.int64))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :, :3], r"images have shape \(100, 1, 3, 4\), the model takes \(N, 1, 4, 4\)"),
        (IMAGES[:, 0], "images have shape"),
        (IMAGES[:0], "images have shape"),
        (IMAGES * 255, r"not within \[0, 1\]; divide pixels by 255"),
        (IMAGES - 0.5, r"not within \[0, 1\]"),
        (IMAGES * torch.nan, r"not within \[0, 1\]"),
    ],
)
def test_images_that_do_not_fit_are_stopped(images: Tensor, message: str) -> None:
    with pytest.raises(PreflightFailed, match=message):
        preflight(sound(), images, torch.zeros(len(images), dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.full((100,), 5), r"label 5 is not in 0\.\.4"),
        (torch.full((100,), -1), r"label -1 is not in 0\.\.4"),
        (torch.zeros(100, 5, dtype=torch.int64), "not one int64"),
        (torch.zeros(100), "labels are torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_stopped(wrong: Tensor, message: str) -> None:
    with pytest.raises(PreflightFailed, match=message):
        preflight(sound(), IMAGES, wrong)


@pytest.mark.parametrize(
    ("correct", "card", "passes"),
    [
        (100, proportion(990, 1000), True),
        (90, proportion(950, 1000), True),  # 1 % likely: sound models are not stopped for it
        (80, proportion(950, 1000), False),
        (100, proportion(800, 1000), False),  # far too good is no less wrong
        (100, None, True),
        (50, proportion(1, 3), True),  # a card that knows little accuses nobody
    ],
)
def test_accuracy_far_from_the_cards_is_stopped(correct: int, card: Proportion | None, passes: bool) -> None:
    model = sound()
    targets = labels(model)
    targets[correct:] = (targets[correct:] + 1) % 5
    if passes:
        preflight(model, IMAGES, targets, card_accuracy=card)
        return
    with pytest.raises(PreflightFailed, match=rf"clean accuracy is .*\({correct} of 100\).*wrong normalisation"):
        preflight(model, IMAGES, targets, card_accuracy=card)


def test_a_sound_model_passes_unchanged_whatever_its_confidence() -> None:
    model = sound()
    with torch.no_grad():
        # So confident that the cross entropy's gradient is zero in float32.
        model.network.network.classify.weight.mul_(1e4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    preflight(model, IMAGES, labels(model))
    preflight(model, IMAGES[:1], labels(model)[:1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


class Huge(Wrapped):
    factor = 1e5

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * super().forward(images)


def test_a_loss_that_is_flat_for_most_images_is_stopped_and_another_loss_passes() -> None:
    model = sound(Huge())
    labels = model(IMAGES).argmax(1)
    preflight(model, IMAGES, labels, losses=["margin"])
    with pytest.raises(PreflightFailed, match=r"loss 'ce' is exactly zero for \d+ of 100 images .*loss=margin"):
        preflight(model, IMAGES, labels, losses=["ce"])


def test_a_loss_that_is_flat_for_some_images_is_left_to_the_diagnostics() -> None:
    model = sound(Huge())
    with torch.no_grad():
        gaps = model(IMAGES).topk(2, dim=1).values.diff(dim=1).abs().squeeze(1) / Huge.factor
    # The softmax of float32 is exactly 0 and 1 from a margin of about 104 on: so for a third of the images.
    model.network.factor = 104 / gaps.quantile(2 / 3).item()
    preflight(model, IMAGES, model(IMAGES).argmax(1), losses=["ce"])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_a_loss_without_a_form_is_looked_at_as_attacks_replace_it(classes: int, top_k: int) -> None:
    model = Classifier(SmallNet(classes).eval().float(), input_shape=SHAPE, num_classes=classes)
    preflight(model, IMAGES, model(IMAGES).argmax(1), losses=["dlr", "margin"], decision=Decision(top_k=top_k))


def test_random_answers_pass_where_several_passes_decide() -> None:
    for decision in (Decision(votes=5), Decision(repeats=2), Decision(sigma=0.1)):
        preflight(sound(Randomised()), IMAGES, labels(sound()), decision=decision)
    # What is not random is looked at all the same.
    with pytest.raises(PreflightFailed, match="depends on the rest of the batch"):
        preflight(sound(BatchStatistics()), IMAGES, labels(sound()), decision=Decision(votes=5))
    with pytest.raises(PreflightFailed, match="train mode"):
        preflight(sound().train(), IMAGES, labels(sound()), decision=Decision(votes=5))

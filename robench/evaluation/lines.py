"""What a model answers along straight lines from images to adversarial images, the engine having verified these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robench.classifier import Classifier, tensor_float32
from robench.datasets import ImageSet
from robench.errors import EvaluationFailed
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.records import EvalSpec
from robench.softmax_lines import StraightLine

#: Points that go through the network at once.
_BATCH = 64


@dataclass(frozen=True)
class Found:
    """What became of the images."""

    attacked: int
    """Right without an attack."""
    fallen: int
    lines: tuple[StraightLine, ...]
    """Of the first that fell."""


@torch.no_grad()
def softmax_along(model: nn.Module, image: Tensor, adversarial: Tensor, *, points: int) -> NDArray[np.float64]:
    """Return the softmax of every class `(K, points)` from an image to its adversarial image, both `(C, H, W)`.

    The points are equally spaced and include both images as they are. The model is in eval mode.
    """
    way = torch.linspace(0, 1, points, dtype=image.dtype, device=image.device).view(-1, 1, 1, 1)
    line = (1 - way) * image + way * adversarial
    with tensor_float32(allowed=False):
        logits = torch.cat([model(part) for part in line.split(_BATCH)])
    return logits.double().softmax(dim=1).T.cpu().numpy()


def lines_of(
    model: Classifier,
    images: ImageSet,
    ids: NDArray[np.int64],
    spec: EvalSpec,
    *,
    device: torch.device,
    training: Callable[[], ImageSet],
    points: int,
    most: int,
) -> Found:
    """Attack the images `ids` of a split as an evaluation does, and ask along the lines of the first `most` that fell.

    Fallen is what counts as such in a record: right before, wrong for the plain model after, and inside the ball.
    Raises EvaluationFailed for an attack that crashes or returns what is no valid answer.
    """
    worker = Worker(model, images, device=device, precision=spec.precision, keep_adversarials="left", training=training)
    result = worker(Shard(spec, ids))
    if result.error is not None:
        attack = f"{spec.attack.title} under {spec.threat}"
        raise EvaluationFailed(f"{attack} failed on {spec.model.id}: {result.error.kind}: {result.error.message}")
    assert result.adversarial_images is not None
    rows = result.rows
    fell = np.flatnonzero(rows["attacked"] & ~rows["robust"])
    clean, _ = worker.load(rows["example_id"][fell[:most]])
    lines = []
    for row, image in zip(fell[:most].tolist(), clean, strict=True):
        adversarial = torch.from_numpy(result.adversarial_images[row]).to(image)
        lines.append(
            StraightLine.of(
                softmax_along(worker.judge.model, image, adversarial, points=points),
                example=int(rows["example_id"][row]),
                label=int(rows["label"][row]),
                adversarial=int(rows["adversarial_prediction"][row]),
                distance=float(rows[spec.threat.norm.lower()][row]),
            )
        )
    return Found(int(rows["attacked"].sum()), len(fell), tuple(lines))

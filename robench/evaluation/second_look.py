"""The second look at saved adversarial images: what their record says must come out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robench.classifier import LOGIT_TOLERANCE, Classifier, tensor_float32
from robench.datasets import ImageSet
from robench.errors import UserError
from robench.evaluation.adversarials import SavedAdversarials, unfit
from robench.evaluation.shards import Rows
from robench.evaluation.verification import find_violation, inside_ball
from robench.losses import Criterion
from robench.lp_geometry import distance
from robench.planning import is_minimum_norm
from robench.records import EvalRecord, EvalSpec

#: Images that are looked at together: their activations fit wherever the model was attacked.
_AT_ONCE = 100


@dataclass(frozen=True)
class Agreement:
    """What the second look at a record's images found; that nothing contradicts the record is its condition."""

    examples: int
    agreeing: int
    """As broken, and as far inside the ball, as the record says."""

    @property
    def borderline(self) -> int:
        """Return how many images another rounding decides otherwise: their margin is within the logits' tolerance."""
        return self.examples - self.agreeing


class Shown(NamedTuple):
    """Some examples in front of a judge, on its device."""

    ids: NDArray[np.int64]
    labels: Tensor
    """(N,) int64."""
    clean: Tensor
    """(N, C, H, W) in [0, 1]."""
    adversarial: Tensor
    """(N, C, H, W) in [0, 1], if they keep the rules."""


class Judge:
    """The plain model that decides what is broken: in float32 or float64, without TF32, without gradients."""

    def __init__(self, model: Classifier, *, device: torch.device, double: bool = False) -> None:
        """Copy `model` to the device; `double` computes in float64."""
        self.device, self.dtype = device, torch.float64 if double else torch.float32
        self.model = copy.deepcopy(model).to(device=device, dtype=self.dtype).eval()

    def shown(self, saved: SavedAdversarials, images: ImageSet) -> Iterator[Shown]:
        """Yield the saved examples, some at a time; `images` is the split that they are of."""
        for start in range(0, len(saved.ids), _AT_ONCE):
            ids = saved.ids[start : start + _AT_ONCE]
            labels = torch.from_numpy(images.labels[ids]).to(self.device)
            clean = torch.from_numpy(images.read(ids)).to(self.device).to(self.dtype) / 255
            adversarial = torch.from_numpy(saved.read(start, start + len(ids))).to(self.device, self.dtype)
            yield Shown(ids, labels, clean, adversarial)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return `(N, K)` logits; raise UserError for NaN and infinity, which would be some class to argmax."""
        with tensor_float32(allowed=False):
            logits: Tensor = self.model(images)
        if not bool(torch.isfinite(logits).all()):
            raise UserError("the model returns NaN or infinity for an image; it cannot be judged")
        return logits


def verify(saved: SavedAdversarials, record: EvalRecord, rows: Rows, *, images: ImageSet, judge: Judge) -> Agreement:
    """Look at every saved image again: what the record says of it must come out.

    Each image is finite, in the box, and in the ball (unless the attack looks for the minimum norm); the plain model
    misclassifies it exactly where the record says it is broken, and it is inside the ball where the record says so. An
    image on which the model's margin is within the tolerance of two float32 computations may go either way
    (:attr:`Agreement.borderline`).

    Args:
        saved: the record's images.
        record: a complete record.
        rows: the record's rows.
        images: the split that the record's examples are of.
        judge: the record's model.

    Raises UnsafeFile, one line that says how many images contradict the record, and which is the first.
    """
    spec = record.spec
    if not spec.decision.plain:
        raise UserError(
            f"record {spec.identity} is of a model that decides at random: no second look repeats the first"
        )
    if not np.array_equal(saved.ids, rows["example_id"]) or images.sha256 != spec.examples.split_sha256:
        raise unfit(saved.path, "it holds other examples than the record")
    bounded = None if is_minimum_norm(spec) else spec.threat
    agreeing, wrong = 0, []
    for shown in judge.shown(saved, images):
        if violation := find_violation(shown.adversarial, shown.clean, bounded):
            raise unfit(saved.path, f"images from example {shown.ids[0]} on break the rules: {violation.message}")
        part = {name: values[np.isin(rows["example_id"], shown.ids)] for name, values in rows.items()}
        agrees, certain = _compared(spec, part, shown, judge)
        if saved.misclassified == "attacked":
            # What the attack made of an example that it need not have attacked is not in the record.
            agrees |= ~part["attacked"]
        agreeing += int(agrees.sum())
        wrong += shown.ids[~agrees & certain].tolist()
    if wrong:
        raise unfit(
            saved.path,
            f"{len(wrong)} of {len(saved.ids)} images do not do what record {spec.identity} says "
            f"(the first is example {wrong[0]})",
        )
    return Agreement(len(saved.ids), agreeing)


def _compared(spec: EvalSpec, rows: Rows, shown: Shown, judge: Judge) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return `(N,)` where verdict and ball agree with the rows, and where no rounding could change the verdict."""
    criterion = Criterion(spec.decision.top_k)
    logits = judge.logits(shown.adversarial)
    length = distance(shown.adversarial.double() - shown.clean.double(), spec.threat.norm)
    broken = criterion.broken(logits, shown.labels).cpu().numpy()
    robust = rows["attacked"] & ~(broken & inside_ball(length, spec.threat).cpu().numpy())
    clear = criterion.margin(logits, shown.labels).abs() > LOGIT_TOLERANCE * logits.abs().amax(1)
    return (broken == rows["broken"]) & (robust == rows["robust"]), clear.cpu().numpy()

"""The second look at saved adversarial images: what their record says must come out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robench.classifier import LOGIT_TOLERANCE, Classifier
from robench.datasets import ImageSet
from robench.errors import UserError
from robench.evaluation.adversarials import SavedAdversarials, unfit
from robench.evaluation.judging import Judge
from robench.evaluation.shards import Batch, InvalidAnswer, Rows
from robench.evaluation.verification import rules_of
from robench.losses import Criterion
from robench.random_streams import RandomStream
from robench.records import EvalRecord, EvalSpec, ModelIdentity, Precision

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
    """Some examples and what an attack made of them, on a device."""

    batch: Batch
    adversarial: Tensor
    """(N, C, H, W) in [0, 1], if they keep the rules."""


@dataclass
class Bench:
    """The models that judge, one in memory at a time: a matrix of large models needs no more room than one of them."""

    load: Callable[[ModelIdentity], Classifier]
    """Returns the model of an identity."""
    device: torch.device
    _held: tuple[ModelIdentity, torch.dtype, Judge] | None = field(default=None, init=False)

    def judge(self, model: ModelIdentity, precision: Precision) -> Judge:
        """Return the plain model as it judges a search of this precision: in float32, or in float64 for fp64."""
        dtype = _dtype(precision)
        if self._held is None or self._held[:2] != (model, dtype):
            self._held = None
            plain = self.load(model)
            own = copy.deepcopy(plain).to(device=self.device, dtype=dtype)
            self._held = (model, dtype, Judge(own, num_classes=plain.num_classes))
        return self._held[2]

    def shown(self, saved: SavedAdversarials, images: ImageSet, precision: Precision) -> Iterator[Shown]:
        """Yield saved images with their examples, some at a time; `images` is the split that they are of."""
        for start in range(0, len(saved.ids), _AT_ONCE):
            ids = saved.ids[start : start + _AT_ONCE]
            labels = torch.from_numpy(images.labels[ids]).to(self.device)
            clean = torch.from_numpy(images.read(ids)).to(self.device).to(_dtype(precision)) / 255
            adversarial = torch.from_numpy(saved.read(start, start + len(ids))).to(self.device, _dtype(precision))
            yield Shown(Batch(ids, clean, labels), adversarial)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float64 if precision == "fp64" else torch.float32


def verify(saved: SavedAdversarials, record: EvalRecord, rows: Rows, *, images: ImageSet, bench: Bench) -> Agreement:
    """Look at every saved image again: what the record says of it must come out.

    Each image is finite, in the box, and in the ball, as far as these are rules of its attack; the plain model
    misclassifies it exactly where the record says it is broken, and it is inside the ball where the record says so. An
    image on which the model's margin is within the tolerance of two computations may go either way
    (:attr:`Agreement.borderline`).

    Args:
        saved: the record's images.
        record: a complete record.
        rows: the record's rows.
        images: the split that the record's examples are of.
        bench: where the record's model comes from.

    Raises UnsafeFile, one line that says how many images contradict the record, and which is the first; UserError for
    a model that is random itself, whose decisions nobody can repeat.
    """
    spec = record.spec
    if spec.decision.votes > 1 and spec.decision.sigma == 0:
        raise UserError(f"record {spec.identity} is of a model that is random itself; a second look cannot repeat it")
    if not np.array_equal(saved.ids, rows["example_id"]) or images.sha256 != spec.examples.split_sha256:
        raise unfit(saved.path, "it holds other examples than the record")
    judge, rules = bench.judge(spec.model, spec.precision), rules_of(spec)
    agreeing, wrong = 0, []
    for batch, adversarial in bench.shown(saved, images, spec.precision):
        if violation := rules.violation(adversarial, batch.images):
            raise unfit(saved.path, f"images from example {batch.ids[0]} on break the rules: {violation.message}")
        part = {name: values[np.isin(rows["example_id"], batch.ids)] for name, values in rows.items()}
        counts = rules.counts(adversarial.double() - batch.images.double()).cpu().numpy()
        broken, certain = _decided(spec, batch, adversarial, judge)
        agrees = (broken == part["broken"]) & (part["robust"] == (part["attacked"] & ~(broken & counts)))
        if saved.misclassified == "attacked":
            # What the attack made of an example that it need not have attacked is not in the record.
            agrees |= ~part["attacked"]
        agreeing += int(agrees.sum())
        wrong += batch.ids[~agrees & certain].tolist()
    if wrong:
        raise unfit(
            saved.path,
            f"{len(wrong)} of {len(saved.ids)} images do not do what record {spec.identity} says "
            f"(the first is example {wrong[0]})",
        )
    return Agreement(len(saved.ids), agreeing)


def _decided(
    spec: EvalSpec, batch: Batch, adversarial: Tensor, judge: Judge
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return `(N,)` what is broken, and where no rounding could change that."""
    criterion, random = Criterion(spec.decision.top_k), random_of(spec, batch)
    try:
        scores = judge.scores(spec.decision, adversarial, random.at("judge"))
    except InvalidAnswer as problem:
        raise UserError(f"record {spec.identity} cannot be looked at again: {problem}") from None
    margin = criterion.margin(scores, batch.labels).abs()
    # Rounding may turn a vote; of votes the tolerance is two.
    tolerance = LOGIT_TOLERANCE * scores.abs().amax(1) if spec.decision.plain else torch.full_like(margin, 2.0)
    return criterion.broken(scores, batch.labels).cpu().numpy(), (margin > tolerance).cpu().numpy()


def random_of(spec: EvalSpec, batch: Batch) -> RandomStream:
    """Return the random numbers of some examples of a question."""
    return RandomStream(spec.seed, torch.from_numpy(batch.ids).to(batch.images.device))

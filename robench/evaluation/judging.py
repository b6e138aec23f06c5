"""What a prediction is and whether it is right: decided by the plain model, in full precision, in one place."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robench.classifier import tensor_float32
from robench.errors import PreflightFailed
from robench.evaluation.shards import Batch, InvalidAnswer
from robench.losses import Criterion, rank_of
from robench.random_streams import RandomStream
from robench.records import Decision, EvalSpec
from robench.voting import Votes, decision_bits, majority, repeated_decisions

#: Images that vote together.
_CHUNK = 512


class Answer(NamedTuple):
    """What an attack returned for a batch, and what became of it."""

    images: Tensor
    """(N, C, H, W)."""
    labels: Tensor
    broken: Tensor
    """(N,) bool."""


class Judge:
    """The plain model, and how it decides."""

    def __init__(self, model: nn.Module, *, num_classes: int) -> None:
        """Take over the model, in the precision in which it judges."""
        self.model = model.eval()
        self.num_classes = num_classes
        self._clean: dict[tuple[object, int], tuple[int, int]] = {}

    @torch.no_grad()
    def scores(self, decision: Decision, images: Tensor, random: RandomStream) -> Tensor:
        """Return the numbers `(N, K)` by which the classes rank: logits where one pass decides, else the votes'.

        Raises InvalidAnswer for NaN: it would be some class to argmax, and robust where it is the label's.
        """
        with tensor_float32(allowed=False):
            if decision.plain:
                scores: Tensor = self.model(images)
            else:
                scores = self._votes(decision, images, random).ranking
        if not bool(torch.isfinite(scores).all()):
            raise InvalidAnswer("not-a-number", "the model returns NaN or infinity for an adversarial image")
        return scores

    def _votes(self, decision: Decision, images: Tensor, random: RandomStream) -> Votes:
        try:
            return majority(
                self.model,
                images,
                sigma=decision.sigma,
                votes=decision.votes,
                random=random,
                num_classes=self.num_classes,
                chunk=max(_CHUNK, len(images)),
            )
        except FloatingPointError as error:
            raise InvalidAnswer("not-a-number", str(error)) from error

    def of_clean(
        self, spec: EvalSpec, batch: Batch, random: RandomStream
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return prediction and rank of the label; each image is decided on once for all questions."""
        ids, images, labels = batch
        decision = spec.decision
        how = None if decision.plain else (decision.votes, decision.sigma, spec.seed)
        if not all((how, int(i)) in self._clean for i in ids):
            try:
                scores = self.scores(decision, images, random.at("clean"))
            except InvalidAnswer:
                first, last = int(ids[0]), int(ids[-1])
                raise PreflightFailed(
                    f"the model returns NaN or infinity for a clean example between {first} and {last}"
                ) from None
            prediction, rank = scores.argmax(1), rank_of(scores, labels)
            answers = zip(prediction.tolist(), rank.tolist(), strict=True)
            self._clean |= dict(zip([(how, int(i)) for i in ids], answers, strict=True))
        answers_of = np.array([self._clean[how, int(i)] for i in ids], dtype=np.int64)
        return answers_of[:, 0], answers_of[:, 1]

    def broken_in_8_bit(self, spec: EvalSpec, answer: Answer, random: RandomStream) -> Tensor:
        """Return which broken examples `(N,)` stay broken as a file of 256 levels would hold them."""
        rows = answer.broken.nonzero().squeeze(1)
        survives = torch.zeros_like(answer.broken)
        if len(rows):
            rounded = (answer.images[rows] * 255).round().clamp(0, 255) / 255
            scores = self.scores(spec.decision, rounded, random[rows].at("8 bit"))
            survives[rows] = Criterion(spec.decision.top_k).broken(scores, answer.labels[rows])
        return survives

    def wrong_decisions(self, spec: EvalSpec, answer: Answer, rows: Tensor, random: RandomStream) -> Tensor:
        """Return which of the repeated decisions on the examples `rows` are wrong, as bits `(N,)`."""
        bits = torch.zeros_like(answer.labels)
        if spec.decision.repeats > 1 and len(rows):
            images, labels = answer.images[rows], answer.labels[rows]
            wrong = repeated_decisions(
                lambda stream: self._votes(spec.decision, images, stream),
                labels,
                repeats=spec.decision.repeats,
                random=random[rows].at("repeat"),
                criterion=Criterion(spec.decision.top_k),
            )
            bits[rows] = decision_bits(wrong)
        return bits

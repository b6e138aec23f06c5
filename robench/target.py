"""What an attack is given as its model: it answers like the classifier and keeps the book of the batch.

An attack that goes on with some of its examples says so, in the same breath for everything that belongs to them::

    images, labels, random, model = images[rows], labels[rows], random[rows], narrowed(model, rows)

Then every pass is charged to the examples that it was made for. With a plain module in place of a :class:`Target` (in a
notebook, inside a defense) the same lines do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Ledger:
    """What the attacks on one batch took, and what they want to be known."""

    forward_passes: Tensor
    """(N,) int64."""
    backward_passes: Tensor
    """(N,) int64."""
    broken_by: list[str]
    """Per example the member of a combined attack that broke it; empty where none claims it."""
    unattributed: tuple[int, int] = (0, 0)
    """Forward and backward passes whose examples the attack did not tell."""
    second_looks: int = 0
    """Forward passes by which the engine compared the searched copy with the judge."""
    notes: set[str] = field(default_factory=set)
    """Sentences for the record: what an attack did other than its parameters say, and why."""

    @classmethod
    def of(cls, count: int, device: torch.device | str = "cpu") -> Ledger:
        """Return an empty book for `count` examples."""
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(zeros, zeros.clone(), [""] * count)


class Target(nn.Module):
    """A model in front of an attack, with the ledger of its batch and the rows that are looked at."""

    def __init__(self, model: nn.Module, ledger: Ledger, rows: Tensor | None = None) -> None:
        """Wrap `model`; `rows` `(M,)` are those of the ledger that the images of a call belong to, None for all."""
        super().__init__()
        self.model = model
        self.training = model.training
        self.ledger = ledger
        count = len(ledger.forward_passes)
        self.rows = torch.arange(count, device=ledger.forward_passes.device) if rows is None else rows

    def __getitem__(self, rows: Tensor) -> Target:
        """Return the same model in front of some of these examples, by row numbers or a mask."""
        return Target(self.model, self.ledger, self.rows[rows])

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits; a backward pass through them is counted when it happens.

        A call with k times as many images as examples (candidates side by side) counts k for each.
        """
        logits: Tensor = self.model(images)
        self._charge(len(images), backward=False)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._charge(len(gradient), backward=True))
        return logits

    def _charge(self, images: int, *, backward: bool) -> None:
        if len(self.rows) and images % len(self.rows) == 0:
            book = self.ledger.backward_passes if backward else self.ledger.forward_passes
            book[self.rows] += images // len(self.rows)
        else:
            forward_passes, backward_passes = self.ledger.unattributed
            self.ledger.unattributed = (
                forward_passes + (0 if backward else images),
                backward_passes + (images if backward else 0),
            )


def narrowed(model: nn.Module, rows: Tensor) -> nn.Module:
    """Return the model in front of some of the examples it is in front of now; a plain module as it is."""
    return model[rows] if isinstance(model, Target) else model


def credit(model: nn.Module, name: str) -> None:
    """Note that the member `name` of a combined attack broke the examples that `model` is in front of."""
    if isinstance(model, Target):
        for row in model.rows.tolist():
            model.ledger.broken_by[row] = name


def remark(model: nn.Module, sentence: str) -> None:
    """Put a sentence into the record of this evaluation, once."""
    if isinstance(model, Target):
        model.ledger.notes.add(sentence)

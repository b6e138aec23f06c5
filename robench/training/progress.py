"""What a training tells whoever watches it; the command line draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class TrainingProgress(Protocol):
    """Called by the training loop. An exception raised here stops the training; the last checkpoint stays."""

    def on_step(self, *, step: int, total_steps: int, epoch: int, epochs: int) -> None:
        """After each step: `step` of `total_steps` are done, `epoch` of `epochs` (from 1) is running.

        The first call of a resumed training starts at the step after its checkpoint.
        """

    def on_epoch(self, row: Mapping[str, float]) -> None:
        """After each epoch, with its row of the training log."""


class Silent:
    """Nobody watches."""

    def on_step(self, *, step: int, total_steps: int, epoch: int, epochs: int) -> None:
        """Do nothing."""

    def on_epoch(self, row: Mapping[str, float]) -> None:
        """Do nothing."""

"""Accuracy on the validation split: what the best weights are chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robench import catalog
from robench.classifier import frozen, mode
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from robench.training.data import Pixels, as_floats

BATCH_SIZE = 250


@dataclass(frozen=True)
class Measurement:
    """Counts over the examples that were measured."""

    examples: int
    clean: int
    robust: int | None
    """None where no attack ran."""

    @property
    def accuracies(self) -> dict[str, float]:
        """Return the shares by name."""
        shares = {"clean_accuracy": self.clean / self.examples}
        return shares if self.robust is None else {**shares, "robust_accuracy": self.robust / self.examples}

    @property
    def counts(self) -> dict[str, int]:
        """Return the counts that there are, by name."""
        counts = {"examples": self.examples, "clean": self.clean}
        return counts if self.robust is None else {**counts, "robust": self.robust}


@dataclass(frozen=True)
class Examiner:
    """The measurement that a recipe's selection asks for."""

    pixels: Pixels
    """Of the validation split."""
    ids: Tensor
    """(n,) int64 on the CPU: the examples that are measured."""
    attack: str | None
    threat: ThreatModel | None
    seed: int

    def measure(self, model: nn.Module) -> Measurement:
        """Count correct predictions on clean images and on what the attack finds, in eval mode and fp32."""
        found = self._load_attack()
        clean = torch.zeros((), dtype=torch.int64, device=self.pixels.device)
        robust = clean.clone()
        with frozen(model), mode(model, training=False):
            for ids, raw in self.pixels.batches(list(self.ids.split(BATCH_SIZE))):
                images, labels = as_floats(raw), self.pixels.labels[ids]
                correct = _correct(model, images, labels)
                clean += correct.sum()
                if found is not None:
                    attack, parameters = found
                    kept = correct.nonzero().squeeze(1)
                    random = RandomStream(self.seed, ids[kept], ("validation",))
                    adversarial = attack(
                        model, images[kept], labels[kept], threat=self.threat, random=random, **parameters
                    )
                    robust += _correct(model, adversarial, labels[kept]).sum()
        return Measurement(len(self.ids), int(clean), None if found is None else int(robust))

    def _load_attack(self) -> tuple[Any, dict[str, Any]] | None:
        if self.attack is None:
            return None
        plugin = catalog.find("attacks", self.attack)
        return plugin.load().attack, plugin.settings()


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    correct: Tensor = model(images).argmax(1) == labels
    return correct

"""MMA, max-margin adversarial training (Ding, Sharma, Lui, Huang, arXiv:1812.02637), in L-infinity and L2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks.pgd import Ascent, ascend
from robench.catalog import DefenseEntry, PositiveFloat, PositiveInt, Probability
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.errors import UserError
from robench.losses import cross_entropy, soft_margin
from robench.lp_geometry import Balls, distance, per_example, random_start
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: The search looks so much farther than where margins stop to count, so that it sees that they do.
_BEYOND = 1.05


class MaxMarginTraining:
    """Each image is trained on where its own margin ends: at the nearest point of the boundary, as far as it is known.

    d_i is the distance at which a search that starts from the last known d_i finds the boundary. Images that are
    misclassified are trained on as they are, and those whose margin reaches d_max not at all:

        clean_share mean CE(x_i) + (1 - clean_share) mean ([wrong] CE(x_i) + [right, d_i < d_max] CE(x_i + delta_i)).
    """

    def __init__(
        self,
        *,
        d_max: PositiveFloat | None = None,
        first_radius: PositiveFloat | None = None,
        steps: PositiveInt = 10,
        step_scale: PositiveFloat = 2.5,
        bisections: PositiveInt = 10,
        clean_share: Probability = 0.3333333333333333,
        attack_mode: Literal["eval", "train"] = "eval",
    ) -> None:
        """Take the parameters; raise UserError where they contradict each other.

        Args:
            d_max: the margin that is enough, in the threat's norm. None: the threat's epsilon.
            first_radius: the smallest ball that is searched, and the first, for an image that has no margin yet. None:
                a quarter of d_max.
            steps: gradient steps of the search.
            step_scale: the length of a step is this times the image's radius / steps.
            bisections: how often the distance of the boundary is halved down to, on the way that the search found.
            clean_share: weight of the clean images' cross-entropy.
            attack_mode: the network's mode during the search. `eval` uses the running statistics; `train` normalises by
                the batch and updates them with the iterates.
        """
        if d_max is not None and first_radius is not None and first_radius > d_max:
            raise UserError(
                f"mma: first_radius = {first_radius:g} is larger than d_max = {d_max:g}, where margins stop to count; "
                "take a smaller one"
            )
        self.d_max, self.first_radius = d_max, first_radius
        self.steps, self.step_scale, self.bisections = steps, step_scale, bisections
        self.clean_share, self.attack_mode = clean_share, attack_mode
        self.margins = torch.zeros(0)
        """By the images' ids: the last distance of the boundary; 0 where an image was misclassified or not yet seen."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,
        progress: float,  # noqa: ARG002  the contract's argument; nothing changes in the course of the training
        threat: ThreatModel,
    ) -> LossParts:
        """Return the loss, and keep the images' margins (Algorithm 1 of the paper)."""
        d_max = threat.radius if self.d_max is None else self.d_max
        clean = evaluated(model, images, images)
        right = soft_margin(clean.logits.detach(), labels) < 0
        rows = right.nonzero().squeeze(1)
        margins = images.new_zeros(len(images))
        points = images.detach().clone()
        if len(rows) > 0:
            with frozen(model), mode(model, training=self.attack_mode == "train"):
                balls = Balls(threat.norm, self._radii(random.ids[rows], d_max).to(images))
                points[rows], margins[rows] = self._boundary(
                    model,
                    points[rows],
                    labels[rows],
                    balls=balls,
                    random=random[rows].at("mma"),
                    farthest=_BEYOND * d_max,
                )
        self._keep(random.ids, margins)
        view = evaluated(model, points, images)
        counts = (~right | (margins < d_max)).to(view.logits.dtype)
        max_margin = (counts * cross_entropy(view.logits, labels)).mean()
        natural = cross_entropy(clean.logits, labels).mean()
        parts = {
            "accuracy": accuracy_of(clean.logits, labels),
            "adversarial_accuracy": accuracy_of(view.logits, labels),
            "margin": margins.mean(),
        }
        total = self.clean_share * natural + (1 - self.clean_share) * max_margin
        return LossParts(total, parts, {"clean": clean, "adversarial": view})

    def _boundary(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, balls: Balls, random: RandomStream, farthest: float
    ) -> tuple[Tensor, Tensor]:
        """Return where the soft margin vanishes, and how far that is `(n,)`: PGD, then bisection on the way it found.

        At most `farthest` away, where it does not vanish before.
        """
        length = per_example(self.step_scale / self.steps * balls.radius, images)
        walk = Ascent(balls, self.steps, length, soft_margin)
        found = ascend(model, random_start(images, balls, random), images, labels, ascent=walk)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            offset = found - images
            far = distance(offset, balls.norm)
            direction = offset / per_example(torch.where(far > 0, far, 1.0), offset)
            radius = balls.radius
            low, high = torch.zeros_like(radius), torch.full_like(radius, farthest)
            for _ in range(self.bisections):
                broken = soft_margin(model(_moved(images, direction, radius)), labels) >= 0
                low, high = torch.where(broken, low, radius), torch.where(broken, radius, high)
                radius = (low + high) / 2
            return _moved(images, direction, radius), radius

    def _radii(self, ids: Tensor, d_max: float) -> Tensor:
        """Return how large the balls are to be that are searched around these images `(n,)`."""
        smallest = d_max / 4 if self.first_radius is None else self.first_radius
        self._make_room(ids)
        return self.margins[ids].clamp(smallest, max(smallest, _BEYOND * d_max))

    def _keep(self, ids: Tensor, margins: Tensor) -> None:
        self._make_room(ids)
        self.margins[ids] = margins.to(self.margins.dtype)

    def _make_room(self, ids: Tensor) -> None:
        missing = int(ids.max()) + 1 - len(self.margins)
        self.margins = self.margins.to(ids.device)
        if missing > 0:
            self.margins = torch.cat([self.margins, self.margins.new_zeros(missing)])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the margins."""
        return {"margins": self.margins}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these margins."""
        self.margins = state["margins"].clone()


def _moved(images: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    return (images + per_example(radius, images) * direction).clamp(0.0, 1.0)


ENTRY = DefenseEntry(
    name="mma",
    objective=MaxMarginTraining,
    summary="cross-entropy where each image's own margin ends, as long as it is below d_max",
    source="Ding et al., ICLR 2020 (arXiv:1812.02637), algorithm 1",
    views=("clean", "adversarial"),
    passes="steps + bisections + 1",
    presets={
        # github.com/BorealisAI/mma_training. On MNIST, Linf@0.3 and L2@2, with the d_max that ATENT compares with.
        "mma_mnist_linf": {"d_max": 0.45, "first_radius": 0.1, "steps": 40},
        "mma_mnist_l2": {"d_max": 4.0, "first_radius": 0.5, "steps": 40},
        # On CIFAR-10, Linf@8/255 (d_max 12/255 is one of the paper's) and L2@1.
        "mma_cifar10_linf": {"d_max": 0.047058823529411764, "first_radius": 0.005, "steps": 10},
        "mma_cifar10_l2": {"d_max": 1.0, "first_radius": 0.5, "steps": 10},
    },
)

"""ATENT's Langevin walk as an attack (Jagatap et al., "Adversarially robust learning via entropic regularization",
arXiv:2008.12338), in L-infinity and L2.

The paper trains on samples of the density p(x') ~ exp(loss(x') - gamma/2 |x' - x|^2), drawn by a Langevin walk from
near the image (equations 8 to 10, 14); its table 6 attacks with the same walk. The walk is :func:`langevin_walk`, for
attack and training alike. Where the printed algorithms and the authors' code (GauriJagatap/StochAT) differ, the code's
form is the default, because the printed one hardly moves: the gradient of a pixel is 1e-3 to 1e-2, so a step of 0.007
times the raw gradient changes nothing against a radius of 0.031. The printed form is the preset `atent-20-paper`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robench.attacks import _compaction
from robench.catalog import AttackEntry, NonNegativeFloat, PositiveFloat, PositiveInt
from robench.losses import TOP_1, Criterion, PerExampleLoss, loss_named
from robench.lp_geometry import distance, per_example, project, random_start, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

Transform = Literal["sign", "unit", "raw"]
Init = Literal["corner", "sphere", "normal", "uniform", "none"]
When = Literal["last", "every", "never"]

#: Table 6 takes 20 steps of 0.003 at 8/255; with the ball the steps are scaled.
_TABLE_6_STEPS, _TABLE_6_STEP_SIZE, _TABLE_6_EPSILON = 20, 0.003, Fraction(8, 255)


def atent(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 20,
    step_size: PositiveFloat | None = None,
    noise: NonNegativeFloat = 0.001,
    gamma: NonNegativeFloat | None = None,
    restoring: Literal["direct", "times_step"] = "direct",
    gradient_transform: Literal["sign", "unit", "raw"] | None = None,
    init: Literal["corner", "sphere", "normal", "uniform", "none"] | None = None,
    init_std: PositiveFloat = 0.001,
    projection_target: Literal["total", "increment"] = "total",
    projection_when: Literal["last", "every", "never"] = "last",
    loss: Literal["ce", "margin", "dlr"] = "ce",
    keep: Literal["last", "first_broken"] = "last",
) -> Tensor:
    """Walk up the loss with a little noise; appendix A.3 and table 6 of the paper.

    Whatever the walk's own projections, the answer is projected on the ball. The authors' code also stops the whole
    batch where its gradient falls below 5e-4; that would make an example's answer depend on its batch and is left out.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius; in Linf the paper's 1/gamma is epsilon.
        random: the examples' random numbers (start point and noise).
        criterion: what counts as broken (it enters `keep=first_broken` and the margin).
        steps: gradient steps, K.
        step_size: eta', length of a step on the [0, 1] scale. None: in Linf table 6's 0.003 at 8/255 in 20 steps,
            scaled with epsilon and over the steps (1.9125 epsilon / steps); in L2 2.5 epsilon / steps.
        noise: amplitude; every step adds sqrt(2 step_size) * noise * N(0, I).
        gamma: pull back to the image, `gamma (x - x')`. None: 0.05 in L2, the paper's; 0 in Linf, where the projection
            takes its place.
        restoring: `direct` adds the pull as it is, so that a straight walk settles at radius step_size / gamma;
            `times_step` multiplies it by step_size as equation 9 has it: radius 1 / gamma.
        gradient_transform: `sign`, `unit` (over its L2 norm) or `raw`: each example's own gradient, not the batch mean
            of algorithm 1, line 7. None: sign in Linf, unit in L2.
        init: `corner` a random sign per pixel and `sphere` a random direction, both at distance epsilon in the
            threat's norm; `normal` with `init_std`; `uniform` in the ball; `none` the image. None: corner in Linf,
            sphere in L2.
        init_std: standard deviation of `init=normal`.
        projection_target: what the ball bounds: the `total` perturbation, or the last step's `increment` (equation 14).
        projection_when: after the `last` step (CIFAR-10), after `every` one (MNIST; the start, too) or `never`.
        loss: `ce` cross-entropy, `margin` Carlini and Wagner's, `dlr` the difference of logits ratio.
        keep: `last` classifies where the walk ends, as table 6 does. `first_broken` returns the first iterate whose
            projection on the ball is broken, and lets the example go: never weaker, and usually cheaper, although
            iterates outside the ball cost a second forward pass.

    Returns:
        `(N, C, H, W)` in the ball and the box.
    """
    walk = LangevinWalk.planned(
        threat,
        steps=steps,
        step_size=step_size,
        noise=noise,
        gamma=gamma,
        restoring=restoring,
        gradient_transform=gradient_transform,
        init=init,
        init_std=init_std,
        projection_target=projection_target,
        projection_when=projection_when,
    )
    ascended = loss_named(loss, criterion, model)
    if keep == "first_broken":
        return _first_broken(model, images, labels, walk=walk, random=random, loss=ascended, criterion=criterion)
    (last,) = deque(langevin_walk(model, images, labels, walk=walk, random=random, loss=ascended), maxlen=1)
    return project(last, images, threat)


def default_step_size(threat: ThreatModel, steps: int) -> float:
    """Return table 6's step, scaled, in Linf; in L2 2.5 epsilon / steps, which is 0.125 for the code's MNIST walk."""
    if threat.norm == "L2":
        return 2.5 * threat.radius / steps
    return _TABLE_6_STEP_SIZE * float(threat.epsilon / _TABLE_6_EPSILON * _TABLE_6_STEPS / steps)


@dataclass(frozen=True, kw_only=True)
class LangevinWalk:
    """How to walk; the fields are :func:`atent`'s parameters, with the defaults of the norm filled in."""

    threat: ThreatModel
    steps: int
    step_size: float
    noise: float
    gamma: float
    restoring: Literal["direct", "times_step"]
    gradient_transform: Transform
    init: Init
    init_std: float
    projection_target: Literal["total", "increment"]
    projection_when: When

    @classmethod
    def planned(
        cls,
        threat: ThreatModel,
        *,
        steps: int,
        step_size: float | None,
        gamma: float | None,
        gradient_transform: Transform | None,
        init: Init | None,
        **rest: Any,
    ) -> LangevinWalk:
        """Return the walk of the given parameters; what is None gets the default of the norm."""
        linf = threat.norm == "Linf"
        return cls(
            threat=threat,
            steps=steps,
            step_size=default_step_size(threat, steps) if step_size is None else step_size,
            gamma=(0.0 if linf else 0.05) if gamma is None else gamma,
            gradient_transform=gradient_transform or ("sign" if linf else "unit"),
            init=init or ("corner" if linf else "sphere"),
            **rest,
        )

    @property
    def stays_inside(self) -> bool:
        """Tell whether every iterate lies in the ball by itself."""
        return self.projection_when == "every" and self.projection_target == "total"

    def start(self, images: Tensor, random: RandomStream) -> Tensor:
        """Return x'^0 `(N, C, H, W)` in the box."""
        random = random.at("init")
        if self.init == "none":
            begin = images
        elif self.init == "uniform":
            begin = random_start(images, self.threat, random)
        elif self.init == "normal":
            begin = images + self.init_std * random.normal(images)
        else:
            direction = random.normal(images)
            direction = direction.sign() if self.init == "corner" else direction
            length = distance(direction, self.threat.norm).clamp_min(torch.finfo(images.dtype).tiny)
            begin = images + self.threat.radius * direction / per_example(length, images)
        return project(begin, images, self.threat) if self.stays_inside else begin.clamp(0.0, 1.0)

    def step(self, gradient: Tensor, current: Tensor, images: Tensor, *, number: int, random: RandomStream) -> Tensor:
        """Return x'^k from x'^(k-1) `current` and the loss's gradient there, k = `number` from 1 on."""
        current = current.detach()
        pull = self.gamma * (self.step_size if self.restoring == "times_step" else 1.0)
        moved = current + self.step_size * self._direction(gradient) + pull * (images - current)
        if self.noise > 0:
            spread = math.sqrt(2 * self.step_size) * self.noise
            moved = moved + spread * random.at("noise", number).normal(images)
        if self.projection_when == "never" or (self.projection_when == "last" and number < self.steps):
            return moved.clamp(0.0, 1.0)
        return project(moved, images if self.projection_target == "total" else current, self.threat)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.gradient_transform == "raw":
            return gradient
        return steepest(gradient, "Linf" if self.gradient_transform == "sign" else "L2")


def langevin_walk(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    walk: LangevinWalk,
    random: RandomStream,
    loss: PerExampleLoss,
) -> Iterator[Tensor]:
    """Yield the iterates x'^1, ..., x'^K, each `(N, C, H, W)` in the box and without a graph.

    The model's mode is the caller's: the paper's training walks in train mode, an attack in eval mode. Between two
    iterates the model is run once, forward and backward to the input.
    """
    current = walk.start(images, random)
    for number in range(1, walk.steps + 1):
        current = current.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(current), labels).sum(), current)
        current = walk.step(gradient, current, images, number=number, random=random)
        yield current


def _first_broken(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    walk: LangevinWalk,
    random: RandomStream,
    loss: PerExampleLoss,
    criterion: Criterion,
) -> Tensor:
    """Return the first iterate (x'^0 counts) whose projection is broken; where none is, the last one's projection.

    The last ones are not looked at: the engine does that.
    """
    interval = _compaction.steps_between_looks(images.device)
    result = images.detach().clone()
    standing = torch.ones_like(labels, dtype=torch.bool)
    rows = torch.arange(len(images), device=images.device)
    current = walk.start(images, random)
    for number in range(1, walk.steps + 1):
        current = current.detach().requires_grad_()
        logits = model(current)
        point, seen = current.detach(), logits.detach()
        if not walk.stays_inside:
            point = project(point, images, walk.threat)
            with torch.no_grad():
                seen = model(point)
        # `result` follows an example while it stands, and so keeps the point at which it first fell.
        still = standing[rows]
        result[rows] = torch.where(per_example(still, point), point, result[rows])
        standing[rows] = still & ~criterion.broken(seen, labels)
        look = (number - 1) % interval == 0
        kept = standing[rows].nonzero().squeeze(1) if look else rows
        if len(kept) == 0:
            return result
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), current)
        current = walk.step(gradient, current, images, number=number, random=random)
        if look and len(kept) < len(rows):
            current, images, labels, random = current[kept], images[kept], labels[kept], random[kept]
            rows, model = rows[kept], narrowed(model, kept)
    still = standing[rows]
    result[rows[still]] = project(current, images, walk.threat)[still]
    return result


ENTRY = AttackEntry(
    name="atent",
    attack=atent,
    summary="Langevin walk up the loss from a random corner of the ball (Linf) or point of the sphere (L2)",
    source="Jagatap, Joshi, Chowdhury, Garg, Hegde, arXiv:2008.12338, algorithms 1 and 2, table 6; code StochAT",
    version=2,
    norms=("Linf", "L2"),
    passes="steps",
    queries='steps if keep == "first_broken" else 0',
    presets={
        "atent-20": {"steps": 20},
        "atent-20-paper": {
            "steps": 20,
            "gradient_transform": "raw",
            "restoring": "times_step",
            "init": "normal",
            "projection_target": "increment",
        },
        "atent-linf-mnist": {"steps": 80, "step_size": 0.01, "noise": 0.0001, "projection_when": "every"},
        "atent-l2-mnist": {"steps": 40, "step_size": 0.125, "noise": 0.01, "projection_when": "every"},
        "atent-l2-cifar10": {"steps": 10, "step_size": 0.2, "gamma": 0.08, "projection_when": "never"},
        "atent-l2-paper": {
            "steps": 40,
            "step_size": 0.25,
            "gradient_transform": "raw",
            "restoring": "times_step",
            "init": "normal",
            "projection_when": "never",
        },
    },
    preset_norms={
        "atent-20-paper": ("Linf",),
        "atent-linf-mnist": ("Linf",),
        "atent-l2-mnist": ("L2",),
        "atent-l2-cifar10": ("L2",),
        "atent-l2-paper": ("L2",),
    },
)

"""ATENT, adversarial training by entropic regularization (Jagatap et al., arXiv:2008.12338), in L-infinity and L2.

Equation (6) trains on the mean loss over p(x') ~ exp(loss(x') - gamma/2 |x' - x|^2), a density of images around each
image. Algorithms 1 (L2) and 2 (L-infinity) sample it by a short Langevin walk and average the losses along the walk::

    x' <- x' + step_size * direction of grad loss(x') + gamma (x - x') + sqrt(2 step_size) noise N(0, I)
    average <- (1 - alpha) average + alpha * loss(x')

The walk is the one of the attack (:mod:`robench.attacks.atent`), which says where the printed algorithms and the
authors' code (GauriJagatap/StochAT) differ. The images of the walk are constants for the weights, as in both.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from torch import Tensor, nn

from robench.attacks.atent import LangevinWalk, langevin_walk
from robench.catalog import DefenseEntry, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.defenses._warmup import grown
from robench.errors import UserError
from robench.losses import cross_entropy
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: The paper prints gamma = 3.33 for epsilon = 0.3.
_ROUNDING_OF_GAMMA = 0.01


def atent(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,
    threat: ThreatModel,
    steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    noise: NonNegativeFloat = 0.001,
    gamma: NonNegativeFloat | None = None,
    restoring: Literal["direct", "times_step"] = "direct",
    gradient_transform: Literal["sign", "unit", "raw"] | None = None,
    raw_reduction: Literal["sum", "mean"] = "sum",
    init: Literal["corner", "sphere", "normal", "uniform", "none"] | None = None,
    init_std: PositiveFloat = 0.001,
    projection_target: Literal["total", "increment"] = "total",
    projection_when: Literal["last", "every", "never"] = "last",
    alpha: Probability = 0.9,
    truncate_average: NonNegativeInt = 0,
    attack_mode: Literal["eval", "train"] = "train",
    warmup: Probability = 0.0,
) -> LossParts:
    """Return the losses along the walk, averaged: sum over k of alpha (1 - alpha)^(steps - k) loss(x'^k).

    The average is differentiated in every term, so the graphs of all of them are kept until the loop has the gradient:
    memory of `steps` evaluations, or of `truncate_average`. The authors' code also ends the walk of a whole batch where
    its gradient falls below 5e-4, and evaluates the clean batch to no purpose; both are left out.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (start points and noise).
        progress: share of the training that is done.
        threat: norm and radius.
        steps: steps of the walk, K.
        step_size: eta', on the [0, 1] scale; None: 1.9125 epsilon / steps in Linf, 2.5 epsilon / steps in L2.
        noise: amplitude; every step adds sqrt(2 step_size) * noise * N(0, I).
        gamma: in L2 the pull back to the image; None: 0.05, the paper's. It is chosen so that walks end about epsilon
            away, which the part `perturbation` of the log shows. In Linf nothing pulls: 1/gamma is the radius of the
            projection, so gamma is None or 1/epsilon.
        restoring: the pull as it is (`direct`, the code's: a straight walk settles at radius step_size / gamma), or
            multiplied by step_size (`times_step`, equation 9: radius 1 / gamma).
        gradient_transform: `sign`, `unit` (over its L2 norm) or `raw`. None: sign in Linf, unit in L2.
        raw_reduction: raw gradients of the `sum` of the batch's losses, so that an image moves alike in any batch, or
            of the `mean`, as line 7 of the algorithms divides.
        init: start of the walk: `corner` a random sign per pixel and `sphere` a random direction, both at distance
            epsilon; `normal` with `init_std`; `uniform` in the ball; `none` the image. None: corner in Linf, sphere in
            L2.
        init_std: standard deviation of `init=normal`.
        projection_target: what the ball bounds: the `total` perturbation, or the last step's `increment` (equation 14).
        projection_when: after the `last` step (the code's CIFAR-10 in Linf), after `every` one and the start (its
            MNIST) or `never` (its CIFAR-10 in L2).
        alpha: weight of the newest loss in the average, in (0, 1].
        truncate_average: how many of the last losses are averaged; the earlier ones are neither evaluated nor
            differentiated. 0: all. The gradient changes by about (1 - alpha)^truncate_average of itself.
        attack_mode: the network's mode during the walk. `train`, as in the authors' code, normalises by the batch and
            updates running statistics with the iterates; `eval` uses the running statistics.
        warmup: share of the training over which radius and step size grow linearly from 0.

    Raises:
        UserError: for options that contradict each other.
    """
    _check(threat, gamma=gamma, alpha=alpha, gradient_transform=gradient_transform, raw_reduction=raw_reduction)
    threat, share = grown(threat, progress=progress, warmup=warmup)
    walk = LangevinWalk.planned(
        threat,
        steps=steps,
        step_size=None if step_size is None else share * step_size,
        noise=noise,
        gamma=0.0 if threat.norm == "Linf" else gamma,
        restoring=restoring,
        gradient_transform=gradient_transform,
        init=init,
        init_std=init_std,
        projection_target=projection_target,
        projection_when=projection_when,
    )

    def ascended(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) / (len(labels) if raw_reduction == "mean" else 1)

    with frozen(model), mode(model, training=attack_mode == "train"):
        walked = langevin_walk(model, images.detach(), labels, walk=walk, random=random.at("atent"), loss=ascended)
        iterates = deque(walked, maxlen=truncate_average or steps)
    average = images.new_zeros(())
    for iterate in iterates:
        last = evaluated(model, iterate, images)
        average = (1 - alpha) * average + alpha * cross_entropy(last.logits, labels).mean()
    moved = distance(last.images.detach() - images.detach(), threat.norm).mean()
    return LossParts(
        average, {"accuracy": accuracy_of(last.logits, labels), "perturbation": moved}, {"adversarial": last}
    )


def _check(
    threat: ThreatModel, *, gamma: float | None, alpha: float, gradient_transform: str | None, raw_reduction: str
) -> None:
    if threat.norm == "Linf" and gamma is not None and abs(gamma * threat.radius - 1) > _ROUNDING_OF_GAMMA:
        raise UserError(
            f"defense atent: gamma = {gamma:g} contradicts threat {threat}: in Linf epsilon is 1/gamma; "
            f"leave gamma out, or write gamma = {1 / threat.radius:.6g}"
        )
    if alpha == 0:
        raise UserError("defense atent: alpha = 0 averages nothing; write a weight above 0, such as 0.9")
    if raw_reduction == "mean" and gradient_transform != "raw":
        raise UserError(
            "defense atent: raw_reduction = mean changes nothing where gradients are normalised; "
            "add gradient_transform = raw, or leave it out"
        )


ENTRY = DefenseEntry(
    name="atent",
    objective=atent,
    summary="cross-entropy averaged along a Langevin walk up the loss (ATENT)",
    source="Jagatap, Joshi, Chowdhury, Garg, Hegde, 2020, arXiv:2008.12338, algorithms 1 and 2; code StochAT",
    views=("adversarial",),
    passes="steps + (min(truncate_average, steps) if truncate_average else steps) - 1",
    presets={
        "atent-linf-mnist-official": {"steps": 80, "step_size": 0.01, "noise": 0.0001, "projection_when": "every"},
        "atent-linf-cifar10-official": {"steps": 10, "step_size": 0.007},
        "atent-l2-mnist-official": {"steps": 40, "step_size": 0.125, "noise": 0.01, "projection_when": "every"},
        "atent-l2-smooth-cifar10-official": {
            "steps": 10,
            "step_size": 0.02175,
            "noise": 0.577,
            "projection_when": "never",
        },
        "atent-linf-paper": {
            "steps": 10,
            "step_size": 0.007,
            "gradient_transform": "raw",
            "raw_reduction": "mean",
            "init": "normal",
            "projection_target": "increment",
        },
        "atent-l2-paper": {
            "steps": 40,
            "step_size": 0.25,
            "gradient_transform": "raw",
            "raw_reduction": "mean",
            "restoring": "times_step",
            "init": "normal",
            "projection_when": "never",
        },
    },
)

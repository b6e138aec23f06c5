"""Projected gradient descent on smoothed and on random models (SmoothAdv: Salman et al., arXiv:1906.04584; as
HeatSmoothing uses it: Campbell, Finlay, Oberman, arXiv:2010.02508, section 3.4).

One step follows the gradient of a loss that is averaged over noisy copies of the image; the prediction is the majority
over the same copies. Without noise it is equation 8 of HeatSmoothing for deterministic models (one copy), and
expectation over transformation for models that are random themselves (several).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks import _compaction
from robench.attacks._noisy_copies import NoisyCopies, or_normal
from robench.catalog import AttackEntry, NonNegativeFloat, PositiveFloat, PositiveInt
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import distance, per_example, project, random_start, steepest
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def smoothed_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    steps: PositiveInt = 20,
    step_size: PositiveFloat | None = None,
    start: Literal["image", "random"] = "image",
    copies: PositiveInt = 1,
    sigma: NonNegativeFloat = 0.0,
    average: Literal["log_mean_prob", "mean_loss"] = "log_mean_prob",
    resample_noise: bool = False,
    stop: Literal["unanimous", "majority", "never"] = "unanimous",
) -> Tensor:
    """Ascend the averaged loss by `steps` projected steepest steps.

    A step is clamped to the box first and then, in L2, shortened to the ball, as the authors' code does. A gradient
    that vanishes gives way to a normal vector.

    Args:
        model: images `(N, C, H, W)` in [0, 1], with noise also beyond -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius; the papers attack in L2.
        random: the examples' random numbers (noise, start).
        criterion: what counts as broken, of the classes ranked by votes.
        steps: gradient steps.
        step_size: length of a step in the threat's norm; None: 2 epsilon / steps.
        start: the image, or a uniformly random point of the ball.
        copies: noisy copies per image, n; HeatSmoothing takes 100 on CIFAR-10 and 25 on ImageNet.
        sigma: standard deviation of their noise, on the [0, 1] scale; what the smoothed model is smoothed with.
        average: over the copies: `log_mean_prob` is -log of the label's mean probability (SmoothAdv), `mean_loss` the
            mean cross-entropy (equation 9).
        resample_noise: draw the noise anew at every step; else an image keeps its noises, as in the authors' code, and
            the attack fits itself to them: resampling is stronger against the judge's noise.
        stop: when an example is done and returned as it is there. At a bare `majority` of wrong copies, as the authors'
            code has it, it is a coin toss for other noise, and the judge's is other: an attack far too weak. So it goes
            on until the copies are `unanimous` (with one copy that is the same); `never` walks all steps: the inner
            maximisation of SmoothAdv's training.

    Returns:
        `(N, C, H, W)` in the ball and the box.
    """
    length = 2 * threat.radius / steps if step_size is None else step_size
    interval = _compaction.steps_between_looks(images.device)
    result = images.detach().clone()
    standing = torch.ones_like(labels, dtype=torch.bool)
    rows = torch.arange(len(images), device=images.device)
    current = random_start(images, threat, random.at("start")) if start == "random" else images
    noisy = NoisyCopies.of(
        model,
        images,
        random=random,
        copies=copies,
        sigma=sigma,
        average=average,
        resample=resample_noise,
        criterion=criterion,
    )
    for step in range(steps if len(images) else 0):
        seen = noisy.look(current, labels, step=step)
        # `result` follows an example while it stands, and so keeps the iterate at which it first fell.
        still = standing[rows]
        result[rows] = torch.where(per_example(still, current), current, result[rows])
        if stop != "never":
            standing[rows] = still & ~(seen.majority if stop == "majority" else seen.unanimous)
        direction = steepest(or_normal(seen.gradient, noisy.random.at("zero", step)), threat.norm)
        current = within(current + length * direction, images, threat)
        if stop != "never" and step % interval == 0:
            kept = standing[rows].nonzero().squeeze(1)
            if len(kept) == 0:
                return result
            if len(kept) < len(rows):
                current, images, labels = current[kept], images[kept], labels[kept]
                rows, noisy = rows[kept], noisy[kept]
    still = standing[rows]
    result[rows[still]] = current[still]
    return result


def within(moved: Tensor, images: Tensor, threat: ThreatModel) -> Tensor:
    """Return `moved` clamped to the box and then, in L2, drawn towards the image until it lies in the ball.

    In Linf the order does not matter. A point between one of the box and the image lies in the box.
    """
    if threat.norm == "Linf":
        return project(moved, images, threat)
    offset = moved.clamp(0.0, 1.0) - images
    length = distance(offset, "L2").clamp_min(torch.finfo(offset.dtype).tiny)
    return (images + offset * per_example((threat.radius / length).clamp_max(1.0), offset)).clamp(0.0, 1.0)


ENTRY = AttackEntry(
    name="smoothed-pgd",
    attack=smoothed_pgd,
    summary="projected steps along the gradient averaged over noisy copies; the majority of the copies predicts",
    source="Salman et al., arXiv:1906.04584, section 2.2; Campbell et al., arXiv:2010.02508, equations 8 and 9",
    version=2,
    passes="steps * copies",
    norms=("L2", "Linf"),
    presets={"smoothed-pgd-20": {"steps": 20}},
)

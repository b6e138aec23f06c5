"""SmoothAdv, adversarial training of smoothed classifiers (Salman et al., arXiv:1906.04584)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks._noisy_copies import NoisyCopies
from robench.attacks.smoothed_pgd import smoothed_pgd
from robench.catalog import DefenseEntry, PositiveFloat, PositiveInt, Probability
from robench.classifier import frozen, mode
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.defenses._warmup import grown
from robench.losses import TOP_1, cross_entropy
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def smooth_adv(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,
    threat: ThreatModel,
    sigma: PositiveFloat = 0.25,
    copies: PositiveInt = 2,
    steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    outer: Literal["all", "one", "none"] = "all",
    attack_mode: Literal["eval", "train"] = "eval",
    warmup: Probability = 0.0,
) -> LossParts:
    """Return the mean cross-entropy at the images that are worst for the smoothed classifier, plus noise.

    The perturbation maximises -log of the label's probability, averaged over `copies` of the image plus Gaussian noise
    (equation (S) of section 2.2 of the paper); the noise stays the same for all steps, and the network is trained at
    the perturbed copies with that noise (section 2.3). Noisy images leave [0, 1], as they do when the smoothed
    classifier is asked.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (noise).
        progress: share of the training that is done.
        threat: norm and radius; the paper's is L2.
        sigma: standard deviation of the noise, on the [0, 1] scale: that of the smoothing.
        copies: noisy copies per image, m.
        steps: gradient steps of the inner maximisation, from the image.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2 epsilon / steps.
        outer: where the network is trained: at `all` copies of the perturbed images, at `one`, or with `none` of the
            noise, as the authors of HeatSmoothing (arXiv:2010.02508) do in their code.
        attack_mode: the network's mode during the inner maximisation. `eval` uses the running statistics; `train`
            normalises by the batch and updates them with the iterates.
        warmup: share of the training over which radius and step size grow linearly from 0.
    """
    threat, share = grown(threat, progress=progress, warmup=warmup)
    stream = random.at("smooth_adv")
    with frozen(model), mode(model, training=attack_mode == "train"):
        adversarial = smoothed_pgd(
            model,
            images.detach(),
            labels,
            threat=threat,
            random=stream,
            steps=steps,
            step_size=None if step_size is None else share * step_size,
            copies=copies,
            sigma=sigma,
            stop="never",
        )
    trained = {"all": copies, "one": 1, "none": 0}[outer]
    points = [adversarial + noise for noise in _noises(stream, images.detach(), sigma=sigma, copies=trained)]
    noisy = evaluated(model, torch.cat(points or [adversarial]), images)
    repeated = labels.repeat(max(1, trained))
    loss = cross_entropy(noisy.logits, repeated).mean()
    return LossParts(loss, {"accuracy": accuracy_of(noisy.logits, repeated)})


def _noises(random: RandomStream, images: Tensor, *, sigma: float, copies: int) -> list[Tensor]:
    """Return the noise `(N, C, H, W)` of the first copies that the attack looked at with the same random numbers."""
    if copies == 0:
        return []
    drawn = NoisyCopies.of(
        nn.Identity(),
        images,
        random=random,
        copies=copies,
        sigma=sigma,
        average="log_mean_prob",
        resample=False,
        criterion=TOP_1,
    )
    return [drawn.noise(copy, images, step=0) for copy in range(copies)]


ENTRY = DefenseEntry(
    name="smooth_adv",
    objective=smooth_adv,
    summary="cross-entropy at noisy copies of the images that are worst for the smoothed classifier",
    source="Salman et al., 2019, arXiv:1906.04584, sections 2.2 and 2.3",
    views=(),
    passes="steps * copies + (copies - 1 if outer == 'all' else 0)",
    presets={
        # What the code of HeatSmoothing (arXiv:2010.02508) trains as SmoothAdv, on CIFAR-10, L2@0.5.
        "smooth_adv_heat_official": {"sigma": 0.1, "copies": 1, "steps": 4, "outer": "none"},
    },
)

"""The L-bound: how far a Gaussian average cannot change its mind, read off its outputs without a sample."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from robench.catalog import CertificateEntry, NonNegativeInt, PositiveFloat, PositiveInt
from robench.certification import Certified, NoisyModel
from robench.errors import UserError


def l_bound(
    model: NoisyModel,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: PositiveFloat,
    samples: NonNegativeInt = 0,
    top_k: PositiveInt = 1,
    form: Literal["ranked", "true-class"] = "ranked",
    premise_samples: NonNegativeInt = 100,
) -> Certified:
    """Return sigma sqrt(pi / 2) times the gap between two probabilities: theorem 3 of the paper.

    It holds for outputs in [0, 1] that *are* the average of something over Gaussian noise. A network that was trained
    to be one is one only as far as training went, so the distance from an average is estimated beside the bound.

    Args:
        model: the classifier, whose softmax is the average, or is averaged here.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        sigma: standard deviation of the average's noise, on the [0, 1] scale.
        samples: take the mean of the softmax over so many noisy copies (a stochastic model); 0 takes the softmax of one
            forward pass (a deterministic model).
        top_k: rank k against rank k + 1.
        form: `ranked`, the theorem's: no rank changes. `true-class`: the label's probability over the (k + 1)-th
            largest, 0 where it is not above it, which the paper's tables print and which uses the label.
        premise_samples: noisy copies that estimate how far the model is from its Gaussian average; 0 does not look.

    Raises:
        UserError: top_k is not below the number of classes.
    """
    if top_k >= model.num_classes:
        raise UserError(f"certificate l-bound: top_k = {top_k} leaves no class of {model.num_classes} to compare with")
    plain = model.logits(images).double().softmax(1)
    averaged = plain
    if samples:
        averaged = model.mean_probabilities(images, sigma=sigma, samples=samples, purpose="average")
    ordered, classes = averaged.sort(dim=1, descending=True, stable=True)
    truth = labels.to(classes.device)[:, None]
    correct = (classes[:, :top_k] == truth).any(1)
    if form == "ranked":
        gap = ordered[:, top_k - 1] - ordered[:, top_k]
    else:
        gap = torch.where(correct, averaged.gather(1, truth)[:, 0] - ordered[:, top_k], 0.0)
    distance = None
    if premise_samples:
        mean = model.mean_probabilities(images, sigma=sigma, samples=premise_samples, purpose="premise")
        distance = torch.linalg.vector_norm(mean - averaged, dim=1).cpu().numpy()
    return Certified(
        prediction=classes[:, 0].cpu().numpy(),
        correct=correct.cpu().numpy(),
        radius=(sigma * math.sqrt(math.pi / 2) * gap).cpu().numpy(),
        premise_gap=distance,
    )


ENTRY = CertificateEntry(
    name="l-bound",
    certify=l_bound,
    summary="lower bound of the L2 distance at which a Gaussian average changes its answer",
    source="HeatSmoothing, arXiv:2010.02508, theorem 3",
    version=1,
    guarantee="A guarantee only as far as the model is the average of another over Gaussian noise (sigma {sigma}), "
    "which nothing proves; the estimated distance from that average stands beside it.",
    passes="samples + premise_samples + 1",
    presets={"l-bound-stochastic": {"samples": 100}},
)

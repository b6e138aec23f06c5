"""Randomised smoothing's prediction alone: PREDICT of Cohen et al., which abstains where it is not sure."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from robench.catalog import CertificateEntry, PositiveFloat, PositiveInt
from robench.certification import Certified, NoisyModel, most_frequent
from robench.errors import UserError
from robench.smoothing_bounds import two_sided_p_value


def predict(
    model: NoisyModel,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: PositiveFloat,
    n: PositiveInt = 1000,
    alpha: PositiveFloat = 0.001,
) -> Certified:
    """Return the class of the smoothed classifier, -1 where a binomial test cannot tell the first two apart.

    Args:
        model: the base classifier.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        sigma: standard deviation of the noise, on the [0, 1] scale.
        n: noisy copies of each image.
        alpha: probability at most that an answer is not the smoothed classifier's.

    Raises:
        UserError: alpha is no probability, or n copies can tell nothing apart at this alpha.
    """
    if not 0 < alpha < 1 or two_sided_p_value(n, 0) > alpha:
        raise UserError(
            f"certificate smoothed-prediction: n = {n} samples can tell no class from another at alpha = {alpha:g}; "
            "take more"
        )
    counts = model.counts(images, sigma=sigma, samples=n, purpose="prediction")
    first_two = most_frequent(counts, 2)
    first, second = (np.take_along_axis(counts, first_two[:, i : i + 1], 1)[:, 0] for i in (0, 1))
    sure = two_sided_p_value(first, second) <= alpha
    prediction = np.where(sure, first_two[:, 0], -1)
    return Certified(
        prediction=prediction, correct=prediction == labels.cpu().numpy(), radius=np.zeros(len(first)), hits=first
    )


ENTRY = CertificateEntry(
    name="smoothed-prediction",
    certify=predict,
    summary="the smoothed classifier's class, or an abstention; no radius",
    source="Cohen et al., arXiv:1902.02918, PREDICT and proposition 2",
    version=1,
    guarantee="An answer is that of the model smoothed by Gaussian noise (sigma {sigma}) except with probability "
    "{alpha} at most. No radius.",
    passes="n + 1",
)

"""Gaussian augmentation: the training of randomised smoothing's base classifier (Cohen et al., arXiv:1902.02918)."""

from __future__ import annotations

from torch import Tensor, nn

from robench.catalog import DefenseEntry, PositiveFloat, Probability
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.losses import cross_entropy
from robench.random_streams import RandomStream


def gaussian_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,  # noqa: ARG001  the contract's argument; the noise is the same throughout
    sigma: PositiveFloat = 0.25,
    share: Probability = 1.0,
) -> LossParts:
    """Return the mean cross-entropy at images plus Gaussian noise: section 3.1 of the paper.

    Noisy images leave [0, 1], as they do when the smoothed classifier is asked.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (noise).
        progress: share of the training that is done.
        sigma: standard deviation of the noise, on the [0, 1] scale: that of the smoothing.
        share: of the images that get noise, on average; the others stay as they are.
    """
    noise = sigma * random.at("noise").normal(images)
    if share < 1:
        chosen = random.at("chosen").uniform(images.new_empty(len(images))) < share
        noise = noise * chosen.view(-1, 1, 1, 1)
    noisy = evaluated(model, images.detach() + noise, images)
    loss = cross_entropy(noisy.logits, labels).mean()
    return LossParts(loss, {"accuracy": accuracy_of(noisy.logits, labels)})


ENTRY = DefenseEntry(
    name="gaussian_noise",
    objective=gaussian_noise,
    summary="cross-entropy at images plus Gaussian noise: the base classifier of randomised smoothing",
    source="Cohen et al., 2019, arXiv:1902.02918, section 3.1",
    views=(),
)

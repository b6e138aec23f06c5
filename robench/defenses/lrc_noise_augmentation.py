"""Long-range correlated noise as augmentation: what structured gradient regularisation is compared with under it (Roth
et al., arXiv:1805.08736, section 4.3; the noise itself is :mod:`robench.attacks.lrc_noise`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robench.attacks.lrc_noise import long_range_noise, with_noise
from robench.catalog import DefenseEntry, PositiveFloat, Probability
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.losses import cross_entropy
from robench.lp_geometry import per_example
from robench.random_streams import RandomStream


def lrc_noise_augmentation(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,  # noqa: ARG001  the contract's argument; the noise is the same throughout
    sigma: PositiveFloat = 0.3,
    decay_length: PositiveFloat = 8.0,
    eps_unit: Literal["pixel", "image_std"] = "pixel",
    clip: bool = True,
    share: Probability = 1.0,
) -> LossParts:
    """Return the mean cross-entropy at images plus Gaussian noise of covariance sigma^2 exp(-|i - j| / decay_length).

    The paper trains with "LRC noise" and does not give its strength; 0.3 is that of its figure 3, 8 the decay length at
    which it chooses its own strengths. The other options are those of the attack, with its defaults.

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (noise).
        progress: share of the training that is done.
        sigma: standard deviation of the noise: epsilon of the attack.
        decay_length: zeta, in pixels.
        eps_unit: sigma is on the [0, 1] scale of a `pixel`, or in units of each image's own standard deviation
            (`image_std`).
        clip: clamp noisy images to [0, 1]; False leaves the range of pixels.
        share: of the images that get noise, on average; the others stay as they are.
    """
    clean = images.detach()
    noise = long_range_noise(clean, decay_length, random.at("noise"))
    if share < 1:
        chosen = random.at("chosen").uniform(clean.new_empty(len(clean))) < share
        noise = noise * per_example(chosen, clean)
    noisy = evaluated(model, with_noise(clean, noise, sigma=sigma, eps_unit=eps_unit, clip=clip), images)
    loss = cross_entropy(noisy.logits, labels).mean()
    return LossParts(loss, {"accuracy": accuracy_of(noisy.logits, labels)})


ENTRY = DefenseEntry(
    name="lrc_noise_augmentation",
    objective=lrc_noise_augmentation,
    summary="cross-entropy at images plus long-range correlated noise",
    source="Roth, Lucchi, Nowozin, Hofmann, 2018, arXiv:1805.08736, section 4.3",
    views=(),
)

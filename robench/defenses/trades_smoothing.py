"""TRADES with Gaussian noise, whose network is then smoothed (Blum, Dick, Manoj, Zhang, "Random smoothing might be
unable to certify l-infinity robustness for high-dimensional images", arXiv:2002.03517).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt
from robench.defenses import LossParts
from robench.defenses.trades import trades
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


def trades_smoothing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    random: RandomStream,
    progress: float,
    threat: ThreatModel,
    sigma: PositiveFloat = 0.12,
    beta: NonNegativeFloat = 6.0,
    steps: PositiveInt = 10,
    step_size: PositiveFloat | None = None,
    attack_mode: Literal["eval", "train"] = "eval",
) -> LossParts:
    """Return the loss of TRADES for the network behind noise: CE(x + n) + beta KL(p(x + n) || p(x' + n)).

    n ~ N(0, sigma^2 I) is drawn once per image, and is the same at the image, at x' and in every step of the inner
    maximisation, which keeps x' in the ball and the box; noisy images leave the box, as they do when the smoothed
    classifier is asked. The objective is that of the authors' code (hongyanz/TRADES-smoothing).

    Args:
        model: the network, in training mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        random: the examples' random numbers (noise, start points).
        progress: share of the training that is done.
        threat: norm and radius; the paper's is L2.
        sigma: standard deviation of the noise, on the [0, 1] scale: that of the smoothing.
        beta: weight of robustness against accuracy; 0 is training with Gaussian noise.
        steps: gradient steps of the inner maximisation.
        step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps in Linf and
            2 epsilon / steps in L2.
        attack_mode: the network's mode during the inner maximisation. `eval`, as in the authors' code, uses the running
            statistics; `train` normalises by the batch and updates them with the iterates.
    """
    noise = sigma * random.at("noise").normal(images)
    parts = trades(
        _BehindNoise(model, noise),
        images,
        labels,
        random=random,
        progress=progress,
        threat=threat,
        beta=beta,
        steps=steps,
        step_size=step_size,
        attack_mode=attack_mode,
    )
    # A regularizer that looked at the views' images again would not find the noise there.
    return LossParts(parts.total, parts.parts)


class _BehindNoise(nn.Module):
    """The network at a batch of images plus its noise `(N, C, H, W)`."""

    def __init__(self, network: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images + self.noise)
        return logits


ENTRY = DefenseEntry(
    name="trades_smoothing",
    objective=trades_smoothing,
    summary="TRADES at images plus Gaussian noise: the base classifier of a smoothed TRADES",
    source="Blum, Dick, Manoj, Zhang, 2020, arXiv:2002.03517, with the authors' code",
    views=(),
    passes="steps + 1",
    presets={
        # github.com/hongyanz/TRADES-smoothing on CIFAR-10, L2@0.435.
        "trades_smoothing_official": {"sigma": 0.12, "beta": 6.0, "steps": 10},
    },
)

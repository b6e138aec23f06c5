"""The inner maximisation that TRADES and what follows it share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robench.attacks.pgd import Ascent, ascend
from robench.losses import PerExampleLoss
from robench.lp_geometry import project, random_start
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: Standard deviation per pixel of the noise that an ascent starts with.
_NOISE = 0.001


def climbed(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    loss: PerExampleLoss,
    steps: int,
    step_size: float | None,
    start: Literal["noise", "random"],
) -> Tensor:
    """Return the images `(N, C, H, W)` at which projected steps of `loss` end, whatever is predicted there.

    They start at the image plus normal noise of standard deviation 0.001, or at a uniformly `random` point of the ball.
    A `step_size` of None is 2.5 epsilon / steps in Linf and, as in the code of TRADES, 2 epsilon / steps in L2.
    """
    length = (2.5 if threat.norm == "Linf" else 2.0) * threat.radius / steps if step_size is None else step_size
    images = images.detach()
    if start == "random":
        begin = random_start(images, threat, random)
    else:
        begin = project(images + _NOISE * random.normal(images), images, threat)
    return ascend(model, begin, images, labels, ascent=Ascent(threat, steps, length, loss))

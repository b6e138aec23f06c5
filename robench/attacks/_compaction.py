"""How often attacks look at which examples are broken, so that these leave the batch."""

from __future__ import annotations

import torch

#: On an accelerator looking makes the host wait.
_STEPS_ON_AN_ACCELERATOR = 5


def steps_between_looks(device: torch.device) -> int:
    """Return after how many steps an attack on this device looks again."""
    return 1 if device.type == "cpu" else _STEPS_ON_AN_ACCELERATOR

"""Where a number comes from: code, libraries, device and command, without any path of the machine."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

import robench
from robench.records import Provenance

PACKAGE = Path(__file__).parent


def provenance(device: torch.device | str, command: str, *, compiled: bool = False) -> Provenance:
    """Return what is true of this process now; `command` is what was typed, free of machine paths."""
    return Provenance(
        robench=robench.__version__,
        code=code_version(PACKAGE),
        torch=torch.__version__,
        python=platform.python_version(),
        device=device_name(torch.device(device)),
        threads=torch.get_num_threads(),
        command=command,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        compiled=compiled,
    )


def device_name(device: torch.device) -> str:
    """Return `cuda (NVIDIA H200)` or `cpu (x86_64)`."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({kind})"


def code_version(package: Path) -> str:
    """Return the git commit of the checkout that `package` stands in, with `+changes` where the package
    differs from it.

    `release VERSION` where the package is installed, even inside somebody else's working tree. Changes beside
    the package (records that were just written, say) do not count: they cannot change a number.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent.resolve():
        return f"release {robench.__version__}"
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    return f"release {robench.__version__}" if commit is None else commit + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

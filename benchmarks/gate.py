"""robench guards itself: is the engine as strong as it was, and nearly as fast?

python -m benchmarks.gate [--strength-only | --speed-only]

Strength: the questions of `reports/engine/baseline.toml` on the committed MNIST models are answered anew and compared
(`robench check --engine`). Speed: PGD's time over its ideal (`benchmarks/ideal.py`), a ratio that a slow machine leaves
as it is; processor time is measured, because a busy one would change it.

An attack that was changed on purpose has a new version. Its questions are then answered by `robench eval` into a folder
whose reports/ becomes reports/engine, and `robench baseline set --baseline reports/engine/baseline.toml` names them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import pgd_speed
from benchmarks.problems import Choice, Problem, make
from robench.classifier import keep_large_buffers
from robench.cli import run

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "reports" / "engine" / "baseline.toml"

#: The ideal's time over the engine's, on a model that it has seen before: 0.87 to 0.89 on one thread of an AMD EPYC.
EFFICIENCY = 0.88
#: What may be lost of it before the gate fails.
LOSS = 1 / 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--strength-only", action="store_true")
    only.add_argument("--speed-only", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="robench-gate-") as folder:
        data_root = find_data(Path(folder))
        if data_root is None:
            print("gate: skipped: ROBENCH_DATA names no folder with MNIST/raw, and ../shared/data is not there")
            return 0
        status = 0 if options.speed_only else strength(data_root)
        return status or (0 if options.strength_only else speed(data_root))


def find_data(folder: Path) -> Path | None:
    """Return a folder with MNIST: that of ROBENCH_DATA, else `folder`, filled from ../shared/data; None without any."""
    given = os.environ.get("ROBENCH_DATA")
    if given and (Path(given) / "MNIST" / "raw").is_dir():
        return Path(given)
    expand = ROOT.parent / "shared" / "data" / "expand.py"
    if not expand.is_file():
        return None
    subprocess.run([sys.executable, str(expand), str(folder)], check=True, capture_output=True)
    return folder


def strength(data_root: Path) -> int:
    """Return the exit status of the engine gate."""
    places = ["--workspace", str(ROOT), "--data-root", str(data_root)]
    return run(["check", "--engine", "--measure", "--baseline", str(BASELINE), "--device", "cpu", *places])


def speed(data_root: Path) -> int:
    """Return 1 where the engine has lost a third of its efficiency, else 0."""
    keep_large_buffers()
    problem = make(Choice("lenet5", data_root, ROOT / "build" / "benchmarks", 200, 10, "mnist-pgd"))
    measured = efficiency(problem)
    least = EFFICIENCY * (1 - LOSS)
    slow = measured < least
    print(
        f"gate: PGD takes {1 / measured:.2f} times its ideal (efficiency {measured:.2f}, usually {EFFICIENCY:.2f}); "
        + (f"below {least:.2f}: profile the step loop, or run it again on an idle machine" if slow else "passed")
    )
    return int(slow)


def efficiency(problem: Problem) -> float:
    """Return the ideal's time over the engine's best of three."""
    report = pgd_speed.compare(problem, others=(), repeats=3, clock=time.process_time)
    return report.ideal_seconds / min(report.results["robench, again"].seconds)


if __name__ == "__main__":
    sys.exit(main())

"""How often `robench check --fast` errs, and after how many examples it stops: by simulation, without a model.

python -m benchmarks.races [--runs N] [--alpha A] [--tolerance POINTS]

Each run draws up to 10,000 examples of which stated shares are lost and gained, and bets until it is clear.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from robench.gate.paired_tests import Race

#: Shares of the examples that are lost and that are gained.
CHANGES = ((0.01, 0.01), (0.02, 0.01), (0.03, 0.01), (0.04, 0.02), (0.06, 0.01), (0.22, 0.02))
EXAMPLES = 10_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="of each row (default 300)")
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--tolerance", type=float, default=1.0, help="in points (default 1)")
    options = parser.parse_args(arguments)
    print("| lost % | gained % | worse % | not worse % | undecided % | examples on average |")
    print("|---|---|---|---|---|---|")
    for lost, gained in CHANGES:
        races = [raced(lost, gained, options.tolerance / 100, options.alpha, seed) for seed in range(options.runs)]
        decisions = [race.decision for race in races]
        shares = [100 * decisions.count(decision) / len(races) for decision in ("worse", "not worse", None)]
        cells = [*(f"{share:.1f}" for share in shares), f"{np.mean([race.drawn for race in races]):,.0f}"]
        print(f"| {100 * lost:g} | {100 * gained:g} | {' | '.join(cells)} |", flush=True)


def raced(lost: float, gained: float, tolerance: float, alpha: float, seed: int) -> Race:
    """Return a race where it stopped."""
    changes = np.random.default_rng(seed).choice(3, size=EXAMPLES, p=[lost, gained, 1 - lost - gained])
    race = Race(tolerance, alpha)
    for change in changes.tolist():
        race.add(change != 1, change != 0)
        if race.decision is not None:
            break
    return race


if __name__ == "__main__":
    main()

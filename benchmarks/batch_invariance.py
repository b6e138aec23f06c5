"""How many outcomes differ between batch sizes, in float64 (none may) and in float32 (rounding).

python -m benchmarks.batch_invariance [--model mnist-pgd] [--examples 1000] [--attack pgd-20]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robench import planning
from robench.checkpoints import load_card_model
from robench.datasets import open_split, select_examples
from robench.evaluation.merging import sort_rows
from robench.evaluation.shards import split
from robench.evaluation.worker import Worker
from robench.records import Precision
from robench.registry import find_card, identity_of
from robench.threat_model import ThreatModel
from robench.workspace import Workspace


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist-pgd")
    parser.add_argument("--attack", default="pgd-20")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--data-root", type=Path)
    options = parser.parse_args()
    for precision in ("fp64", "fp32"):
        found = {cut: outcomes(options, precision, *cut) for cut in ((250, 1), (64, 1), (16, 4))}
        (first, expected), *others = found.items()
        for cut, rows in others:
            changed = int((rows["robust"] != expected["robust"]).sum())
            moved = int((np.abs(rows["linf"] - expected["linf"]) > 1e-6).sum())
            print(
                f"{precision}: batches of {cut[0]} in {cut[1]} shards against {first[0]} in {first[1]}: "
                f"{changed} of {options.examples} outcomes differ, {moved} distances by more than 1e-6"
            )


def outcomes(
    options: argparse.Namespace, precision: Precision, batch_size: int, shards: int
) -> dict[str, NDArray[Any]]:
    """Return the rows of one evaluation."""
    place = Workspace.locate(None, options.data_root)
    folder, card = find_card(options.model, place)
    images = open_split(card.dataset, "test", place)
    examples, ids = select_examples(images, dataset=card.dataset, split="test", count=options.examples)
    threat = card.threat or ThreatModel.parse("Linf@0.3")
    request = planning.Request(identity_of(card), examples, [threat], [options.attack], 0, precision)
    (spec,) = planning.plan(request)
    worker = Worker(
        load_card_model(card, folder),
        images,
        device=torch.device("cpu"),
        precision=precision,
        batch_size=batch_size,
    )
    return sort_rows([worker(shard).rows for shard in split(spec, ids, -(-len(ids) // shards))])


if __name__ == "__main__":
    main()

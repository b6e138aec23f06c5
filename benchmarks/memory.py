"""Peak memory of evaluating 10,000 MNIST images, in a process of its own.

python -m benchmarks.memory [--attack pgd-40] [--images N] [--architecture lenet5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from robench import planning
from robench.checkpoints import build_classifier
from robench.classifier import keep_large_buffers
from robench.datasets import open_split, select_examples
from robench.evaluation.shards import split
from robench.evaluation.worker import Worker
from robench.records import Configured, ModelIdentity
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

#: What a record is cut into on a CPU (robench.evaluation.campaign).
_SHARD_SIZE = 500


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a child process, whose peak is nobody else's, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The peak is reached in the first steps of the first shard; more of them only take longer.
    parser.add_argument("--attack", default="pgd:steps=2")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--architecture", default="lenet5")
    parser.add_argument("--data-root", type=Path, help="default ROBENCH_DATA")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.here:
        given = sys.argv[1:] if arguments is None else list(arguments)
        subprocess.run([sys.executable, "-m", "benchmarks.memory", "--here", *given], check=True)
        return
    evaluate(options)
    # Unlike getrusage's, this peak starts with the program: the parent's memory is not in it.
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    print(f"{options.architecture}, {options.images} images, {options.attack}: {kibibytes / 2**20:.2f} GiB at most")


def evaluate(options: argparse.Namespace) -> None:
    """Attack untrained weights, labelled by their own predictions: as many steps as a model that nothing breaks."""
    keep_large_buffers()
    images = open_split("mnist", "test", Workspace.locate(data_root=options.data_root))
    architecture = Configured(name=options.architecture)
    model = build_classifier(architecture, num_classes=10, input_shape=images.image_shape).eval()
    examples, ids = select_examples(images, dataset="mnist", split="test", count=options.images)
    identity = ModelIdentity(id="benchmark", weights_sha256="0" * 64, architecture=architecture)
    threat = ThreatModel.parse("Linf@0.001")
    (spec,) = planning.plan(planning.Request(identity, examples, [threat], [options.attack]))
    worker = Worker(model, images, device=torch.device("cpu"), precision="fp32")
    for shard in split(spec, ids, _SHARD_SIZE):
        assert worker(shard).error is None


if __name__ == "__main__":
    main()

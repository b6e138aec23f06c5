"""Does `robench eval --compile` pay? One forward and image-gradient pass, as the search runs it, with and without.

::

    OMP_NUM_THREADS=1 python -m benchmarks.compile_speed --model resnet18 --clock cpu
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import SETTINGS, Choice, make
from robench.classifier import keep_large_buffers, search_copy
from robench.compilation import compiled

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Print the time per image at several batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SETTINGS), default="lenet5")
    parser.add_argument("--sizes", default="2,7,16,64", help="batch sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()
    keep_large_buffers()
    sizes = [int(size) for size in options.sizes.split(",")]
    problem = make(Choice(options.model, options.data_root, options.cache, images=max(sizes)))
    device, clock = torch.device(options.device), CLOCKS[options.clock]
    usual = search_copy(problem.model, precision="fp32", device=device)
    started = time.perf_counter()
    plain = search_copy(problem.model, precision="fp32", device=device, cheap_layers=False)
    fast = compiled(plain, input_shape=problem.model.input_shape, device=device)
    print(f"{options.model} on {device}: compiled in {time.perf_counter() - started:.0f} s of wall time")
    for size in sizes:
        images, labels = problem.images[:size].to(device), problem.labels[:size].to(device)
        best = [float("inf")] * 2
        for _ in range(options.repeats + 1):  # the first one warms up
            best = [min(b, timed(m, images, labels, clock)) for b, m in zip(best, (usual, fast), strict=True)]
        eager, through = (1e6 * seconds / size for seconds in best)
        print(f"batch {size:4}: {eager:8.0f} us per image, compiled {through:8.0f}: {eager / through:.2f} x as fast")


def timed(model: nn.Module, images: Tensor, labels: Tensor, clock: Callable[[], float]) -> float:
    """Return the seconds of one pass."""
    if images.is_cuda:
        torch.cuda.synchronize()
    started = clock()
    start = images.detach().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(start), labels, reduction="sum"), start)
    if images.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    main()

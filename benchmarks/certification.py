"""Certification side by side: the ideal, robench, the published per-image loop and ART; and samples that are saved.

python -m benchmarks.certification [--model lenet5|resnet18|NAME] [--examples N] [--samples N] [--saved] [--json FILE]

Each answers the same question: n noisy copies of each image, their classes counted. *ideal* is a loop of n forward
passes at the best batch size and memory format, and nothing else. *per-image loop* is the published algorithm: one
image at a time, noise by `randn_like`, predictions counted in Python, at its best batch size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problems import SETTINGS, Choice, Problem, make
from robench.certification import NoisyModel
from robench.certification.cohen import certify
from robench.certification.sequential import certify_anytime
from robench.classifier import keep_large_buffers, search_copy
from robench.provenance import PACKAGE, code_version, device_name
from robench.smoothing_bounds import largest_radius

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIGMA = 0.25
RADII = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lenet5", help="lenet5, resnet18, or a registered model of MNIST")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--untuned", action="store_true", help="leave the allocator as it is, as the others find it")
    parser.add_argument("--saved", action="store_true", help="how many samples the anytime certificates save instead")
    parser.add_argument("--radius", type=float, default=0.5, help="of the decisions that --saved makes")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()
    if not options.untuned:
        keep_large_buffers()
    known = options.model in SETTINGS
    choice = Choice(
        options.model if known else "lenet5",
        options.data_root,
        options.cache,
        images=options.examples,
        registered=None if known else options.model,
    )
    problem, device = make(choice), torch.device(options.device)
    if options.saved:
        found = saved(problem, samples=options.samples, radius=options.radius, device=device)
    else:
        found = speeds(
            problem, samples=options.samples, device=device, clock=CLOCKS[options.clock], repeats=options.repeats
        )
    print(f"{options.model}: {options.examples} images, {options.samples:,} samples each, sigma {SIGMA}")
    for name, value in found.items():
        print(f"  {name}: {value:.4g}")
    if options.json:
        facts = {
            "model": options.model,
            "examples": options.examples,
            "samples": options.samples,
            "clock": options.clock,
            "allocator tuned": not options.untuned,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "code": code_version(PACKAGE),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "found": found}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def speeds(
    problem: Problem, *, samples: int, device: torch.device, clock: Callable[[], float], repeats: int
) -> dict[str, float]:
    """Return seconds of everybody, interleaved, the best of the repeats, and ratios."""
    images, labels = problem.images.to(device), problem.labels.to(device)
    plain = problem.model.to(device).eval()
    searched = search_copy(problem.model, precision="fp32", device=device)
    # The ideal is of the model in the faster of the two forms.
    fast = min((plain, searched), key=lambda model: min(_timed(model, images, 200, device, clock) for _ in range(5)))
    sizes = (100, 200, 400, 800)
    per_image = {size: min(_timed(fast, images, size, device, clock) for _ in range(3)) / size for size in sizes}
    best = min(per_image, key=per_image.__getitem__)

    def robench() -> None:
        asked = NoisyModel(searched, np.arange(len(images)), 0, plain.num_classes, best)
        certify(asked, images, labels, sigma=SIGMA, n0=100, n=samples)

    def loop() -> None:
        for image in images:
            counts = np.zeros(plain.num_classes, dtype=int)
            for size in _batches(samples + 100, best):
                batch = image.repeat((size, 1, 1, 1))
                for prediction in plain(batch + SIGMA * torch.randn_like(batch)).argmax(1).cpu().numpy():
                    counts[prediction] += 1

    def ideal() -> None:
        batch = images[:1].expand(best, *images.shape[1:]).contiguous()
        for size in _batches(len(images) * (samples + 100), best):
            fast(batch[:size])

    contestants = {"ideal": ideal, "robench": robench, "per-image loop": loop}
    if importlib.util.find_spec("art"):
        contestants["art"] = _art(plain, images, samples, best)
    times = dict.fromkeys(contestants, float("inf"))
    for _ in range(repeats):
        for name, contestant in contestants.items():
            started = clock()
            contestant()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name] = min(times[name], clock() - started)
    others = [seconds for name, seconds in times.items() if name not in {"ideal", "robench"}]
    return {
        "best batch size": best,
        **{f"{name}, s": seconds for name, seconds in times.items()},
        "robench, of ideal": times["ideal"] / times["robench"],
        "robench, times as fast as the fastest other": min(others) / times["robench"],
    }


@torch.no_grad()
def saved(problem: Problem, *, samples: int, radius: float, device: torch.device) -> dict[str, float]:
    """Return how many samples the anytime certificates take, and what they lose against the fixed number.

    The fixed number is drawn only for images where it can be better: not for those that the anytime certificate knows
    to be right beyond the largest radius of the table that so many samples can reach at all.
    """
    images, labels = problem.images.to(device), problem.labels.to(device)
    model = problem.model.to(device).eval().to(memory_format=torch.channels_last)

    def asked() -> NoisyModel:
        return NoisyModel(model, np.arange(len(images)), 0, problem.model.num_classes, 400)

    decided = asked()
    decision = certify_anytime(decided, images, labels, sigma=SIGMA, goal="decision", at=radius, n=samples)
    tabled = asked()
    table = certify_anytime(tabled, images, labels, sigma=SIGMA, radii=RADII, n=samples)
    furthest = max(r for r in RADII if r < largest_radius(samples, 0.001, SIGMA))
    known = table.correct & (table.radius > furthest) & ((decision.radius > 0) | (radius > furthest))
    rows = np.flatnonzero(~known)
    some = NoisyModel(model, rows, 0, problem.model.num_classes, 400)
    fixed = certify(some, images[rows], labels[rows], sigma=SIGMA, n=samples)
    agree = (decision.radius[rows] > 0) == (fixed.radius >= radius)
    found = {
        "decision, samples per image": float(decided.samples.mean()),
        "decision, times fewer": samples / float(decided.samples.mean()),
        "radius, samples per image": float(tabled.samples.mean()),
        "radius, times fewer": samples / float(tabled.samples.mean()),
        "images with the fixed number": len(rows),
        "decisions that the fixed number changes": int((~agree).sum()),
    }
    for r in RADII:
        lost = (fixed.correct & (fixed.radius > r)) & ~(table.correct & (table.radius > r))[rows]
        found[f"certified accuracy lost at {r:g}, points"] = 100 * float(lost.sum()) / len(images)
    return found


def _batches(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _timed(model: nn.Module, images: Tensor, size: int, device: torch.device, clock: Callable[[], float]) -> float:
    batch = images[:1].expand(size, *images.shape[1:]).contiguous()
    started = clock()
    model(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def _art(model: nn.Module, images: Tensor, samples: int, batch_size: int) -> Callable[[], None]:
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=model.num_classes,
        sample_size=100,
        scale=SIGMA,
        alpha=0.001,
        clip_values=None,
        channels_first=True,
    )
    pixels = images.cpu().numpy()

    def run() -> None:
        smoothed.certify(pixels, n=samples, batch_size=batch_size)

    return run


if __name__ == "__main__":
    main()

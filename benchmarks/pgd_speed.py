"""PGD side by side: robench, torchattacks, foolbox and ART on the same model, images, steps and step size.

python -m benchmarks.pgd_speed [--model lenet5|resnet18] [--registered NAME] [--images N] [--repeats R] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import contestants
from benchmarks.ideal import BestPass, Clock, gradient_passes
from benchmarks.problems import SETTINGS, Choice, Problem, Walk, make, plain_pgd
from robench.classifier import keep_large_buffers, search_copy
from robench.evaluation.verification import find_violation

CACHE = Path("build") / "benchmarks"


#: Processor time is what to compare on a machine that is busy with other things; it needs OMP_NUM_THREADS=1, because
#: threads that wait for each other use it up, too.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Standing:
    """How a contestant did."""

    version: str
    seconds: list[float] = field(default_factory=list)
    """Of each repeat, with the allocator tuned as robench tunes it."""
    untuned_seconds: list[float] = field(default_factory=list)
    """Of each repeat in a process of its own that leaves the allocator as it is."""
    broken: int = 0
    """Images whose adversarial image is valid and misclassified by the plain model."""
    only_here: int = 0
    """Of these, the ones that robench does not break."""
    only_here_exactly: int = 0
    """Of these, the ones that plain PGD in float64 breaks: the others fell by the luck of rounding."""
    only_robench: int = 0
    """The ones that robench breaks and this one does not."""


@dataclass
class Report:
    """What one run measured."""

    problem: str
    images: int
    steps: int
    gradient_passes: int
    """Ideally: the sum over the steps of the images still standing."""
    standing_at_the_end: int
    ideal_seconds: float
    ideal_pass: str
    look_seconds: float
    """Of one forward pass of the plain model over all images: what it takes to know which ones broke."""
    machine: str
    results: dict[str, Standing]
    not_installed: list[str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = _parser().parse_args(arguments)
    choice = Choice(options.model, options.data_root, options.cache, options.images, options.steps, options.registered)
    if options.only:
        problem = make(choice)
        call = _OTHERS_AND_OWN[options.only](problem)
        seconds = [_timed(call, CLOCKS[options.clock])[0] for _ in range(options.repeats)]
        print(json.dumps(seconds))
        return
    keep_large_buffers()
    problem = make(choice)
    report = compare(problem, others=contestants.OTHERS, repeats=options.repeats, clock=CLOCKS[options.clock])
    if not options.tuned_only:
        for name in report.results.keys() & contestants.OTHERS.keys():
            report.results[name].untuned_seconds = _in_own_process(name, options)
    print(text_of(report))
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")


_OTHERS_AND_OWN = contestants.OWN | contestants.OTHERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SETTINGS), default="lenet5")
    parser.add_argument("--registered", metavar="NAME", help="a model of the registry, for that data set")
    parser.add_argument("--images", type=int, help="how many; default 500 (lenet5), 64 (resnet18)")
    parser.add_argument("--steps", type=int, help="default 40 (lenet5), 10 (resnet18)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: on a busy machine, one thread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--data-root", type=Path, help="default ROBENCH_DATA")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the weights made here")
    parser.add_argument("--tuned-only", action="store_true", help="skip the others' runs in untuned processes")
    parser.add_argument("--only", choices=sorted(_OTHERS_AND_OWN), help=argparse.SUPPRESS)
    return parser


def compare(problem: Problem, *, others: Collection[str], repeats: int, clock: Clock = time.perf_counter) -> Report:
    """Let all take part in turn, `repeats` times, and measure the ideal in every round."""
    images, labels = problem.images, problem.labels
    walk = plain_pgd(
        problem.model, images, labels, threat=problem.threat, steps=problem.steps, step_size=problem.step_size
    )
    best = BestPass(search_copy(problem.model, precision="fp32", device="cpu"), images, labels, clock)
    best.measure()
    versions = {name: contestants.version(name) for name in others}
    entrants = {name: enter(problem) for name, enter in contestants.OWN.items()}
    entrants |= {name: contestants.OTHERS[name](problem) for name, number in versions.items() if number}
    results = {name: Standing(versions.get(name) or "this checkout") for name in entrants}
    found: dict[str, Tensor] = {}
    looks: list[float] = []
    for _ in range(repeats):
        for name, call in entrants.items():
            seconds, found[name] = _timed(call, clock)
            results[name].seconds.append(seconds)
        best.measure_best()
        looks.append(_timed(lambda: _looked_at(problem, images), clock)[0])
    _judge(problem, found, results)
    passes = gradient_passes(walk, problem.steps)
    return Report(
        problem=" ".join(problem.description.split()),
        images=len(images),
        steps=problem.steps,
        gradient_passes=passes,
        standing_at_the_end=_standing(walk, problem.steps),
        ideal_seconds=passes * best.seconds_per_image,
        ideal_pass=f"{best.seconds_per_image * 1e6:.0f} us per image, batches of {best.batch_size}, "
        f"{str(best.memory_format).removeprefix('torch.')}",
        look_seconds=min(looks),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        results=results,
        not_installed=[name for name, number in versions.items() if number is None],
    )


def _standing(walk: Walk, steps: int) -> int:
    return int((walk.first_broken > steps).sum())


def _timed(call: Callable[[], Tensor], clock: Clock) -> tuple[float, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other libraries
        started = clock()
        found = call()
        return clock() - started, found.detach()


@torch.no_grad()
def _looked_at(problem: Problem, images: Tensor) -> Tensor:
    """Return which ones the plain model gets wrong."""
    wrong: Tensor = problem.model(images).argmax(1) != problem.labels
    return wrong


def _judge(problem: Problem, found: dict[str, Tensor], results: dict[str, Standing]) -> None:
    """Count what each one broke: one judge, the plain model, and one rule for the ball, for all."""
    broken: dict[str, Tensor] = {}
    for name, adversarial in found.items():
        assert find_violation(adversarial, problem.images, problem.threat) is None, name
        broken[name] = _looked_at(problem, adversarial)
    for name, result in results.items():
        result.broken = int(broken[name].sum())
        only_here = broken[name] & ~broken["robench"]
        result.only_here = int(only_here.sum())
        result.only_here_exactly = _broken_in_float64(problem, only_here.nonzero().squeeze(1))
        result.only_robench = int((broken["robench"] & ~broken[name]).sum())


def _broken_in_float64(problem: Problem, rows: Tensor) -> int:
    if len(rows) == 0:
        return 0
    walk = plain_pgd(
        copy.deepcopy(problem.model).double(),
        problem.images[rows].double(),
        problem.labels[rows],
        threat=problem.threat,
        steps=problem.steps,
        step_size=problem.step_size,
    )
    return int((walk.first_broken <= problem.steps).sum())


def _in_own_process(name: str, options: argparse.Namespace) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.pgd_speed", "--only", name, "--model", options.model]
    for option in ("registered", "images", "steps", "steps", "repeats", "clock", "data_root", "cache"):
        value = getattr(options, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def text_of(report: Report) -> str:
    """Return the report as text: a table, and the claims with what they rest on."""
    lines = [
        report.problem,
        f"{report.images} images, PGD-{report.steps} from the images; {report.standing_at_the_end} stand through all "
        f"steps; {report.gradient_passes} gradient passes needed",
        f"machine: {report.machine}",
        f"ideal: {report.ideal_seconds:.2f} s ({report.ideal_pass})",
        f"one look at which images are broken: {report.look_seconds:.2f} s",
        "",
        f"{'':16}{'best s':>8}{'median s':>10}{'of ideal':>10}{'untuned s':>11}{'broken':>8}"
        f"{'not by robench':>16}{'in float64':>12}{'only robench':>14}  version",
    ]
    for name, result in report.results.items():
        best = min(result.seconds)
        untuned = f"{min(result.untuned_seconds):.2f}" if result.untuned_seconds else "-"
        lines.append(
            f"{name:16}{best:8.2f}{statistics.median(result.seconds):10.2f}{report.ideal_seconds / best:10.2f}"
            f"{untuned:>11}{result.broken:8}{result.only_here:16}{result.only_here_exactly:12}"
            f"{result.only_robench:14}  {result.version}"
        )
    lines += [f"{name:16}not installed; pip install '.[bench]'" for name in report.not_installed]
    others = {n: min(r.seconds) for n, r in report.results.items() if n in contestants.OTHERS}
    if others:
        fastest = min(others, key=lambda name: others[name])
        for name in contestants.OWN:
            own = min(report.results[name].seconds)
            lines.append(
                f"{name}: {others[fastest] / own:.2f} x as fast as {fastest}, the fastest of the others, at its best; "
                f"{(others[fastest] + report.look_seconds) / own:.2f} x where a look is added to its time"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

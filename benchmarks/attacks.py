"""Every attack side by side with the other libraries: how fast, how near to the ideal, and how strong.

python -m benchmarks.attacks [--attack NAME ...] [--model NAME ...] [--examples N] [--quick] [--json FILE]
python -m benchmarks.attacks --show FILE ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contestants import shard_of
from benchmarks.ideal import BestPass
from benchmarks.problems import L2_THREATS, SETTINGS, Choice, Problem, make
from benchmarks.rivals import LIBRARIES, NotOffered, Target, otherwise, rival
from benchmarks.standings import OWN, Elapsed, Goal, Report, Standing, line_of, report_of, short_table, table, verdicts
from robench import planning
from robench.attacks import _compaction
from robench.classifier import keep_large_buffers, search_copy
from robench.errors import UnknownName
from robench.evaluation.shards import Shard, ShardResult
from robench.evaluation.verification import inside_ball
from robench.evaluation.worker import Worker
from robench.lp_geometry import distance
from robench.provenance import PACKAGE, code_version, device_name
from robench.records import Precision
from robench.threat_model import ThreatModel

CACHE = Path("build") / "benchmarks"

_NEARER = 0.99


@dataclass(frozen=True)
class Case:
    """An attack as robench spells it, in one norm, on some models."""

    attack: str
    norm: str
    models: tuple[str, ...]
    goal: Goal
    others: str | None = None
    """How the others are asked, where robench's defaults say nothing to them; None: the same."""

    @property
    def name(self) -> str:
        """Return the attack's name without parameters."""
        return self.attack.partition(":")[0]


_BOTH = ("lenet5", "resnet18")
_USUAL = {"lenet5": 1.25, "resnet18": 1.05}
CASES = (
    *(
        Case(f"pgd-{steps}:start=image", norm, _BOTH, Goal(of_ideal=0.9, times_faster=_USUAL))
        for steps in (20, 40)
        for norm in ("Linf", "L2")
    ),
    Case("pgd-100:start=image", "Linf", ("lenet5-undefended",), Goal(times_faster={"cpu": 5.0})),
    *(Case("apgd-ce", norm, _BOTH, Goal(of_ideal=0.9)) for norm in ("Linf", "L2")),
    Case("ddn:steps=100", "L2", _BOTH, Goal(of_ideal=0.9, times_faster=_USUAL)),
    Case(
        "cw-l2",
        "L2",
        _BOTH,
        Goal(times_faster=_USUAL, among_equals=True),
        # With these steps foolbox comes as near as it does; robench sets its step sizes and constants itself.
        others="cw-l2:rounds=9,steps=200,step_size=0.1,constant=0.1",
    ),
    *(Case("deepfool", norm, _BOTH, Goal(times_faster={"cpu": 4.0})) for norm in ("Linf", "L2")),
    Case("autoattack", "Linf", ("lenet5",), Goal(times_faster={"cpu": 1.7, "cuda": 4.0}, against=("autoattack",))),
)

#: How many images an attack gets that costs thousands of passes for each; others get the problem's own number.
_FEWER = {"autoattack": 100, "cw-l2": 100, "deepfool": 100}
_QUICK = {"lenet5": 32, "lenet5-undefended": 32, "resnet18": 8}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = _parser().parse_args(arguments)
    keep_large_buffers()
    if options.show:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in options.show]
        print(short_table([report_of(values) for content in files for values in content["reports"]]))
        return
    device, problems, reports = torch.device(options.device), {}, []
    for case in CASES:
        for model in case.models:
            if (options.attack and case.name not in options.attack) or (options.model and model not in options.model):
                continue
            try:
                planning.attack_settings(case.attack)
            except UnknownName:
                print(f"skipped: {case.attack} on {model}: the catalog has no such attack", flush=True)
                continue
            count = options.examples or (_QUICK[model] if options.quick else _FEWER.get(case.name))
            key = model, count
            if key not in problems:
                problems[key] = make(Choice(model, options.data_root, options.cache, count))
            problem = dataclasses.replace(problems[key], threat=threat_of(case, model))
            repeats = 1 if options.quick else options.repeats
            report = compare(case.attack, model, problem, device=device, repeats=repeats, others=case.others)
            print(line_of(report, device), flush=True)
            reports.append((case.goal, report))
    print()
    print(table([report for _, report in reports], device))
    print()
    print(verdicts(reports, device))
    for line in remarks([report for _, report in reports]):
        print(line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(device), "reports": [asdict(report) for _, report in reports]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({case.name for case in CASES})
    parser.add_argument("--attack", action="append", choices=names, help="repeatable; default all")
    parser.add_argument("--model", action="append", choices=sorted(SETTINGS), help="repeatable; default all")
    parser.add_argument("--examples", type=int, help="how many images")
    parser.add_argument("--quick", action="store_true", help="few images, one repeat: does everything run?")
    parser.add_argument("--repeats", type=int, default=2, help="the best counts; default 2")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print what was measured before, shortly")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--data-root", type=Path, help="default ROBENCH_DATA")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the weights made here")
    return parser


def threat_of(case: Case, model: str) -> ThreatModel:
    """Return the ball of a case's norm on a model."""
    return ThreatModel.parse(SETTINGS[model][1] if case.norm == "Linf" else L2_THREATS[model])


def compare(
    attack: str, name: str, problem: Problem, *, device: torch.device, repeats: int, others: str | None = None
) -> Report:
    """Let all take part in turn, `repeats` times, then judge what they found; `others` is what the others are asked."""
    plugin, _ = planning.attack_settings(attack)
    minimum_norm = bool(plugin.facts.get("minimum_norm", False))
    model = problem.model.to(device)
    target = Target(model, problem.images.to(device), problem.labels.to(device), problem.threat)
    entrants: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "robench": ("this checkout", lambda: answer(problem, attack, device=device)),
        OWN: ("this checkout", warmed(problem, attack, device=device)),
    }
    if device.type == "cuda":
        entrants["robench, bf16"] = ("this checkout", warmed(problem, attack, device=device, precision="bf16"))
    not_offered = {}
    for library in LIBRARIES:
        try:
            entrants[library] = rival(library, others or attack, target)
        except NotOffered as error:
            not_offered[library] = str(error)
    results = {entrant: Standing(version) for entrant, (version, _) in entrants.items()}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for entrant, (_, call) in entrants.items():
            seconds, found[entrant] = timed(call, device)
            results[entrant].seconds.append(seconds)
    judge(target, found, results, minimum_norm=minimum_norm)
    passes = passes_needed(problem, attack, device)
    ideal = None if passes is None else ideal_time(problem, target, passes, device)
    model.cpu()
    return Report(
        attack=attack,
        others=others or attack,
        model=name,
        threat=str(problem.threat),
        images=len(target.images),
        minimum_norm=minimum_norm,
        passes=passes,
        ideal=ideal,
        results=results,
        not_offered=not_offered,
    )


def remarks(reports: Sequence[Report]) -> list[str]:
    """Return a line for each library that took part and does otherwise than it was asked."""
    asked = {(library, report.others) for report in reports for library in report.results}
    return [f"{lib}, {attack}: {text}" for lib, attack in sorted(asked) if (text := otherwise(lib, attack))]


def worker_of(problem: Problem, device: torch.device, precision: Precision = "fp32") -> Worker:
    """Return an engine that keeps the adversarial images."""
    return Worker(problem.model, problem.pixels, device=device, precision=precision, keep_adversarials="left")


def answer(problem: Problem, attack: str, *, device: torch.device) -> Tensor:
    """Let a new worker answer the whole question: clean predictions, batch size, attack, verification."""
    return images_of(worker_of(problem, device)(shard_of(problem, attack)))


def warmed(
    problem: Problem, attack: str, *, device: torch.device, precision: Precision = "fp32"
) -> Callable[[], Tensor]:
    """Return a worker that has answered before, as for every attack of a suite but the first."""
    worker, shard = worker_of(problem, device, precision), shard_of(problem, attack)
    shard = Shard(shard.spec.model_copy(update={"precision": precision}), shard.ids)
    worker(Shard(shard_of(problem, "fgsm").spec.model_copy(update={"precision": precision}), shard.ids))
    return lambda: images_of(worker(shard))


def images_of(result: ShardResult) -> Tensor:
    """Return the adversarial images of a shard that went well."""
    assert result.error is None, result.error
    assert result.adversarial_images is not None
    return torch.from_numpy(result.adversarial_images)


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Elapsed, Tensor]:
    """Return how long a call took, and what it found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other libraries
        before = _now(device)
        found = call().detach()
        after = _now(device)
    return Elapsed(after.processor - before.processor, after.wall - before.wall), found


def _now(device: torch.device) -> Elapsed:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Elapsed(time.process_time(), time.perf_counter())


@torch.no_grad()
def judge(target: Target, found: dict[str, Tensor], results: dict[str, Standing], *, minimum_norm: bool) -> None:
    """Measure what each one reached: one judge, the plain model, and one rule for box and ball, for all."""
    reached: dict[str, Tensor] = {}
    for name, images in found.items():
        adversarial = images.to(target.images)
        length = distance(adversarial.double() - target.images.double(), target.threat.norm)
        valid = torch.isfinite(adversarial).flatten(1).all(1)
        valid &= ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
        if not minimum_norm:
            valid &= inside_ball(length, target.threat)
        broken = valid & (target.model(adversarial).argmax(1) != target.labels)
        results[name].invalid = int((~valid).sum())
        results[name].broken = int(broken.sum())
        # Of a fixed budget all that counts is whether: every broken image is at the same distance.
        reached[name] = torch.where(broken, length if minimum_norm else torch.ones_like(length), torch.inf)
        if minimum_norm:
            median = float(reached[name].quantile(0.5, interpolation="higher"))
            results[name].median = median if math.isfinite(median) else None
    for name, result in results.items():
        result.stronger_here = (reached[name] < _NEARER * reached[OWN]).nonzero().squeeze(1).tolist()
        result.stronger_robench = (reached[OWN] < _NEARER * reached[name]).nonzero().squeeze(1).tolist()


def passes_needed(problem: Problem, attack: str, device: torch.device) -> int | None:
    """Return how many gradients the attack cannot do without on these images; None for other attacks.

    PGD and APGD: those that it takes on each image when it looks after every step, less the one in whose forward pass
    the image was seen to be broken. DDN: all steps on all images.
    """
    plugin, settings = planning.attack_settings(attack)
    parameters: dict[str, Any] = settings
    if plugin.entry == "ddn":
        return int(parameters["steps"]) * len(problem.labels)
    if plugin.entry not in {"pgd", "apgd"} or parameters["restarts"] != 1 or parameters.get("targets"):
        return None
    with looking_at_every_step():
        result = worker_of(problem, device)(shard_of(problem, attack))
    assert result.error is None, result.error
    taken, steps = result.rows["backward_passes"], parameters["steps"]
    assert (taken >= 0).all()
    # Images that a second look on the plain model found to stand walked all steps a second time.
    seen_on_the_way = result.rows["broken"] & (taken < steps)
    return int(np.minimum(taken - seen_on_the_way, steps).sum())


@contextmanager
def looking_at_every_step() -> Iterator[None]:
    """Let attacks look at who is broken after every step, as they do on a CPU, on any device."""
    usual = _compaction.steps_between_looks
    _compaction.steps_between_looks = lambda device: 1  # noqa: ARG005 - an attack's argument
    try:
        yield
    finally:
        _compaction.steps_between_looks = usual


def ideal_time(problem: Problem, target: Target, passes: int, device: torch.device) -> Elapsed:
    """Return the time of so many gradients at the best batch size and memory format of the searched copy."""
    model = search_copy(problem.model, precision="fp32", device=device)
    best = BestPass(model, target.images, target.labels, lambda: _now(device).wall)
    best.measure()
    best.measure_best()
    wall = best.seconds_per_image
    best.clock, best.seconds_per_image = lambda: _now(device).processor, math.inf
    best.measure_best()
    return Elapsed(passes * best.seconds_per_image, passes * wall)


def machine(device: torch.device) -> dict[str, Any]:
    """Return where and with what this was measured."""
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": code_version(PACKAGE),
    }


def processor_name() -> str:
    """Return the processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

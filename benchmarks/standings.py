"""What the attacks' benchmark found, and what it had to reach: values, and their text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.rivals import LIBRARIES

#: A fixed-budget attack is as strong as another if it leaves at most this share of the images more; a minimum-norm
#: attack if its median is at most this factor larger.
POINTS, FACTOR = 0.002, 1.01
#: The contestant that is judged: robench's answer to every question but the first.
OWN = "robench, again"


@dataclass(frozen=True)
class Goal:
    """What has to be reached."""

    of_ideal: float | None = None
    """Ideal time over robench's."""
    times_faster: dict[str, float] = field(default_factory=dict)
    """Fastest other's time over robench's: by model or `cpu`, and for a search in bf16 `cuda`."""
    against: tuple[str, ...] = ("foolbox", "art", "torchattacks")
    among_equals: bool = False
    """Only those others count whose median norm is no larger than robench's."""

    def factor(self, model: str, device: str) -> float | None:
        """Return how many times as fast as the others robench has to be."""
        if device == "cuda":
            return self.times_faster.get("cuda", self.times_faster.get(model))
        return self.times_faster.get(model, self.times_faster.get("cpu"))


@dataclass(frozen=True)
class Elapsed:
    """Seconds on two clocks."""

    processor: float
    """Of this process; with one thread that of the thread. It does not count what an accelerator does."""
    wall: float


@dataclass
class Standing:
    """How one contestant did."""

    version: str
    seconds: list[Elapsed] = field(default_factory=list)
    """Of each repeat."""
    invalid: int = 0
    """Answers outside the box, not finite, or (of a fixed budget) outside the ball; they break nothing."""
    broken: int = 0
    """Images whose answer is valid and misclassified by the plain model."""
    median: float | None = None
    """Of a minimum-norm attack: of all distances, where those of unbroken images are infinite; None: infinite."""
    stronger_here: list[int] = field(default_factory=list)
    """Images that this one breaks and robench does not, or breaks at less than 0.99 of robench's distance."""
    stronger_robench: list[int] = field(default_factory=list)
    """The other way round."""

    @property
    def best(self) -> Elapsed:
        """Return the shortest time on each clock."""
        return Elapsed(min(s.processor for s in self.seconds), min(s.wall for s in self.seconds))


@dataclass
class Report:
    """One attack on one model."""

    attack: str
    others: str
    """What the other libraries were asked: the same, unless robench's defaults say nothing to them."""
    model: str
    threat: str
    images: int
    minimum_norm: bool
    passes: int | None
    """Gradients that the attack needs at least; None where no ideal is known."""
    ideal: Elapsed | None
    results: dict[str, Standing]
    not_offered: dict[str, str]


def clock_of(device: torch.device) -> str:
    """Return the clock that is to be believed: processor time where one thread does the work."""
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def others_of(report: Report) -> dict[str, Standing]:
    """Return the standings of the other libraries."""
    return {name: standing for name, standing in report.results.items() if name in LIBRARIES}


def line_of(report: Report, device: torch.device) -> str:
    """Return one line for the impatient."""
    clock = clock_of(device)
    times = ", ".join(f"{name} {getattr(s.best, clock):.2f}" for name, s in report.results.items())
    ideal = "" if report.ideal is None else f"; ideal {getattr(report.ideal, clock):.2f}"
    return f"{report.attack} {report.threat} on {report.model}, {report.images} images, {clock} s: {times}{ideal}"


def table(reports: Sequence[Report], device: torch.device) -> str:
    """Return everything as a Markdown table; times and ratios on the clock that is to be believed, then the other."""
    clocks = [clock_of(device)]
    if device.type == "cpu":
        clocks.append("wall" if clocks[0] == "processor" else "processor")
    lines = [
        f"Seconds of {clocks[0]} time" + (f"; ratios by {' / by '.join(clocks)} time" if len(clocks) > 1 else "") + ".",
        "",
        "| attack | model (images) | ideal | robench: first / again | of ideal | others, and how many times as long | "
        "broken or median norm: robench, others | images where another is stronger / robench is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        own, first = report.results[OWN], report.results["robench"]
        ideal = report.ideal
        shares = "-" if ideal is None else " / ".join(f"{getattr(ideal, c) / getattr(own.best, c):.2f}" for c in clocks)
        others = others_of(report)
        ratios = "; ".join(
            f"{name} {getattr(s.best, clocks[0]):.2f}, "
            + " / ".join(f"{getattr(s.best, c) / getattr(own.best, c):.2f}" for c in clocks)
            for name, s in sorted(others.items(), key=lambda item: getattr(item[1].best, clocks[0]))
        )
        each = [f"{name} {strength_text(report, s)}" for name, s in others.items()]
        differ = "; ".join(f"{n} {len(s.stronger_here)} / {len(s.stronger_robench)}" for n, s in others.items())
        cells = [
            f"{report.attack}, {report.threat}",
            f"{report.model} ({report.images})",
            "-" if ideal is None else f"{getattr(ideal, clocks[0]):.2f}",
            f"{getattr(first.best, clocks[0]):.2f} / {getattr(own.best, clocks[0]):.2f}",
            shares,
            ratios or "none offers it",
            "; ".join([strength_text(report, own), *each]),
            differ or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(reports: Sequence[Report]) -> str:
    """Return the Markdown table that the README shows: robench's later questions, by processor time."""
    lines = [
        "| attack | model (images) | robench, s | of ideal | others: times as long | broken, or median norm |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        own = report.results[OWN]
        others = sorted(others_of(report).items(), key=lambda item: item[1].best.processor)
        cells = [
            f"{report.attack}, {report.threat}",
            f"{report.model} ({report.images})",
            f"{own.best.processor:.2f}",
            f"{report.ideal.processor / own.best.processor:.2f}" if report.ideal else "",
            ", ".join(f"{name} {s.best.processor / own.best.processor:.2f}" for name, s in others),
            ", ".join([f"**{strength_text(report, own)}**", *(f"{n} {strength_text(report, s)}" for n, s in others)]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report_of(values: Mapping[str, Any]) -> Report:
    """Return the report that a JSON file holds."""
    results = {
        name: Standing(**{**s, "seconds": [Elapsed(**e) for e in s["seconds"]]})
        for name, s in values["results"].items()
    }
    ideal = Elapsed(**values["ideal"]) if values["ideal"] else None
    return Report(**{**values, "results": results, "ideal": ideal})


def strength_text(report: Report, standing: Standing) -> str:
    """Return what a contestant reached."""
    if report.minimum_norm:
        return "infinite" if standing.median is None else f"{standing.median:.4g}"
    return f"{standing.broken}" + (f" ({standing.invalid} invalid)" if standing.invalid else "")


def as_strong(report: Report, own: Standing, other: Standing) -> bool:
    """Tell whether `own` is no weaker than `other`, up to the tolerance."""
    if report.minimum_norm:
        return (math.inf if own.median is None else own.median) <= FACTOR * (
            math.inf if other.median is None else other.median
        )
    return own.broken >= other.broken - POINTS * report.images


def verdicts(reports: Sequence[tuple[Goal, Report]], device: torch.device) -> str:
    """Return the table of what has to be reached."""
    clock = clock_of(device)
    lines = [
        f"By {clock} time, robench's later questions:",
        "",
        "| attack | model | asked | found | |",
        "|---|---|---|---|---|",
    ]
    for goal, report in reports:
        own = report.results["robench, bf16" if device.type == "cuda" else OWN]
        seconds = getattr(own.best, clock)
        start = f"| {report.attack}, {report.threat} | {report.model} |"
        if goal.of_ideal is not None and report.ideal is not None:
            share = getattr(report.ideal, clock) / seconds
            lines.append(f"{start} {goal.of_ideal} of ideal | {share:.2f} | {_word(share >= goal.of_ideal)} |")
        asked = goal.factor(report.model, device.type)
        if asked is None:
            continue
        rivals = {n: s for n, s in others_of(report).items() if n in goal.against}
        if goal.among_equals:
            rivals = {n: s for n, s in rivals.items() if as_strong(report, s, own)} or rivals
        if not rivals:
            lines.append(f"{start} {asked} x the fastest of {', '.join(goal.against)} | none is there | - |")
            continue
        fastest = min(rivals, key=lambda name: getattr(rivals[name].best, clock))
        ratio = getattr(rivals[fastest].best, clock) / seconds
        weaker_than = [n for n, s in rivals.items() if not as_strong(report, own, s)]
        weaker = f", but weaker than {', '.join(weaker_than)}" if weaker_than else ""
        reached = ratio >= asked and not weaker_than
        lines.append(f"{start} {asked} x the fastest, as strong | {ratio:.2f} x {fastest}{weaker} | {_word(reached)} |")
    return "\n".join(lines)


def _word(reached: bool) -> str:
    return "reached" if reached else "missed"

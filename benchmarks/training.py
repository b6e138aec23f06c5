"""What a training step of every defense costs, against the passes that it cannot do without.

python -m benchmarks.training [--defense NAME ...] [--model NAME] [--clock cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ideal import Clock
from robench import catalog
from robench.checkpoints import build_classifier
from robench.classifier import Classifier, frozen, keep_large_buffers, mode, random_images
from robench.defenses import last_layer
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.records import Configured
from robench.training.objective import Objective, build_objective

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

#: By architecture: data set, threat model, batch size. Pixels and weights are random: a step costs the same.
SETTINGS = {"lenet5": ("mnist", "Linf@0.3", 128), "resnet18": ("cifar10", "Linf@8/255", 32)}

#: Share of the training that is done: behind the burn-in of MAIL.
_PROGRESS = 0.9

#: Factor of the random last layer's weights.
_SURE = 100.0

#: What a step is made of. All are measured in every round.
PASSES = {
    "forward": "forward, no gradients",
    "input": "forward and backward to the images alone",
    "input_backward": "backward to the images alone, once more through the same graph",
    "parameter": "forward and backward to the weights",
    "double": "forward, backward to the images, and backward through both to the weights",
    "update": "the optimiser's step",
}

Counts = Mapping[str, float]
Ideal = Callable[[Mapping[str, Any], int], Counts]
"""(parameters, classes) -> how many of which passes, the update and an objective's loss included."""


def _trades(p: Mapping[str, Any], _: int) -> Counts:
    return {"forward": float(p["inner"] == "kl"), "input": p["steps"], "parameter": 2}


def _mail(p: Mapping[str, Any], _: int) -> Counts:
    # After the burn-in.
    trades = p["form"] == "trades"
    return {"forward": float(trades and p["inner"] != "ce"), "input": p["steps"], "parameter": 1 + trades}


def _emr(p: Mapping[str, Any], classes: int) -> Counts:
    # Of the exact form the forward pass is made once, and counted for each class: it needs no more than this.
    return {"double": 1 if p["form"] == "approximate" else classes}


def _atent(p: Mapping[str, Any], _: int) -> Counts:
    # One pass to the images per step; the loss is averaged over the last iterates, each by a pass to the weights.
    steps = p["steps"]
    return {"input": steps, "parameter": min(steps, p["truncate_average"] or steps)}


def _smooth_adv(p: Mapping[str, Any], _: int) -> Counts:
    return {"input": p["steps"] * p["copies"], "parameter": p["copies"] if p["outer"] == "all" else 1}


def _augmentation(p: Mapping[str, Any], _: int) -> Counts:
    steps = p["steps"] if p["attack"] == "pgd" else 1
    return {"forward": float(p["attacked_label"] == "predicted"), "input": steps, "parameter": 2}


def _awp(p: Mapping[str, Any], classes: int) -> Counts:
    # The plain loss's gradient by the weights, and the loss at the moved ones: TRADES' are two passes each.
    if p["form"] == "trades":
        return {**_trades({"inner": "kl", **p}, classes), "parameter": 4}
    return {"input": p["steps"], "parameter": 2}


def _lbgat(p: Mapping[str, Any], _: int) -> Counts:
    # The network at the worst and at the clean images, the companion at the clean ones.
    return {"forward": float(p["inner"] == "kl"), "input": p["steps"], "parameter": 3}


def _heat(p: Mapping[str, Any], _: int) -> Counts:
    # One direction per projection, through one graph; the student at the image and at each moved image; the teacher.
    return {"forward": 1, "input_backward": p["kappa"], "parameter": p["kappa"] + 1}


#: By a defense's name in the catalog. One that is not here is measured, and said to have no ideal.
IDEALS: Mapping[str, Ideal] = {
    "standard": lambda *_: {"parameter": 1},
    "pgd_training": lambda p, _: {"input": p["steps"], "parameter": 1},
    "trades": _trades,
    "mart": lambda p, _: {"input": p["steps"], "parameter": 2},
    "mail": _mail,
    "mma": lambda p, _: {"forward": p["bisections"], "input": p["steps"], "parameter": 2},
    "lbgat": _lbgat,
    "awp": _awp,
    # They turn logits that are there.
    "he": lambda *_: {},
    "l_softmax": lambda *_: {},
    "atent": _atent,
    "heat_smoothing": _heat,
    "smooth_adv": _smooth_adv,
    "emr": _emr,
    # The objective's own pass to the weights becomes the double one: they share the graph.
    "gn": lambda *_: {"double": 1, "parameter": -1},
    "sgr": lambda *_: {"double": 1, "parameter": -1},
    "igr": lambda *_: {"double": 1, "parameter": -1},
    "gaussian_noise": lambda *_: {"parameter": 1},
    "lrc_noise_augmentation": lambda *_: {"parameter": 1},
    "adversarial_augmentation": _augmentation,
    "trades_smoothing": lambda p, _: {"forward": 1, "input": p["steps"], "parameter": 2},
}


@dataclass(frozen=True)
class Goal:
    """What a ratio has to come to."""

    most: float
    over: str = "ideal"
    """`ideal`, or `base`: the same step without the regularizer."""


#: By contestant.
GOALS: Mapping[str, Goal] = {
    "pgd_training": Goal(1.1),
    "trades": Goal(1.1),
    "atent": Goal(1.1),
    "heat_smoothing": Goal(1.1),
    **dict.fromkeys(
        [
            "mart",
            "mail",
            "smooth_adv",
            "gaussian_noise",
            "lrc_noise_augmentation",
            "adversarial_augmentation",
            "fgsm_adv",
            "trades_smoothing",
            "fast_training",
            "mma",
            "lbgat",
            "awp",
            "standard+igr",
            "standard+he",
            "standard+l_softmax",
        ],
        Goal(1.15),
    ),
    "pgd_training+emr": Goal(1.31, "base"),
    "trades+emr": Goal(1.31, "base"),
    # What a step takes above its one double backward pass is the upkeep of the covariance.
    "standard+sgr": Goal(1.05),
}


@dataclass
class Contestant:
    """A defense, with or without a regularizer, on one model."""

    objective: Objective
    ideal: Counts | None
    step: Step
    times: list[float] = field(default_factory=list)
    """Seconds of its steps."""


@dataclass
class Row:
    """How one contestant did."""

    seconds: float
    ideal_seconds: float | None = None
    passes: Counts | None = None
    of_ideal: float | None = None
    """Time over ideal time."""
    of_base: float | None = None
    """Time over that of the same defense without the regularizer."""
    goal: Goal | None = None
    met: bool | None = None


@dataclass
class Report:
    """What was measured on one model."""

    model: str
    batch_size: int
    machine: str
    clock: str
    passes: dict[str, float]
    """Seconds of each kind of pass over the batch."""
    rows: dict[str, Row] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = _parser().parse_args(arguments)
    keep_large_buffers()
    reports = [
        measure(
            name,
            options.defense or default_names(),
            batch_size=options.batch_size or SETTINGS[name][2],
            repeats=options.repeats,
            clock=options.clock,
        )
        for name in ([options.model] if options.model else SETTINGS)
    ]
    print("\n\n".join(text_of(report) for report in reports))
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--defense", nargs="+", metavar="NAME", help="like trades or trades+emr; default: all there are"
    )
    parser.add_argument("--model", choices=sorted(SETTINGS), help="default: each in turn")
    parser.add_argument("--batch-size", type=int, help="default 128 (lenet5), 32 (resnet18)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: on a busy machine, one thread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    return parser


def default_names() -> list[str]:
    """Return every defense of the catalog, regularizers on standard training, and what has a goal besides."""
    entries = [p for p in catalog.plugins("defenses").values() if p.name == p.entry]
    objectives = [p.name for p in entries if p.facts.get("role", "objective") == "objective"]
    regularizers = [p.name for p in entries if p.name not in objectives]
    pairs = [f"standard+{name}" for name in regularizers]
    others = [g for g in GOALS if set(g.split("+")) <= catalog.plugins("defenses").keys()]
    return list(dict.fromkeys([*objectives, *pairs, *others]))


def measure(model_name: str, names: Collection[str], *, batch_size: int, repeats: int, clock: str) -> Report:
    """Time every pass and a step of every contestant in turn, `repeats` times; the median of each counts.

    A regularizer's defense takes part, too. Raises UserError for a name that the catalog does not have.
    """
    dataset, threat, _ = SETTINGS[model_name]
    facts = catalog.find("datasets", dataset).facts
    model = build_classifier(Configured(name=model_name), num_classes=10, input_shape=facts["image_shape"])
    teacher = build_classifier(Configured(name=model_name), num_classes=10, input_shape=facts["image_shape"])
    model, teacher = (m.to(memory_format=torch.channels_last) for m in (model.train(), teacher.eval()))
    teacher.requires_grad_(False)
    with_bases = dict.fromkeys(name for full in names for name in (full.partition("+")[0], full))
    images = random_images(model.input_shape, count=batch_size).contiguous(memory_format=torch.channels_last)
    with mode(model, training=False), torch.no_grad():
        # All are classified correctly, and surely, so that none is left out where only such images are attacked.
        last_layer(model).weight.mul_(_SURE)
        labels = model(images).argmax(1)
    step = Step(model, images, labels, _optimizer(model), CLOCKS[clock])
    contestants = {name: enter(name, dataset, threat, model_name, step, teacher) for name in with_bases}
    times: dict[str, list[float]] = {kind: [] for kind in PASSES}
    for kind in PASSES:
        getattr(step, kind)()  # the first pass makes the buffers
    for _ in range(repeats):
        for kind in PASSES:
            times[kind].append(getattr(step, kind)())
        for contestant in contestants.values():
            contestant.times.append(contestant.step.of(contestant.objective))
    passes = {kind: statistics.median(found) for kind, found in times.items()}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    report = Report(model_name, batch_size, machine, clock, passes)
    report.rows = {name: _row(name, contestants, passes) for name in contestants}
    return report


def enter(
    name: str, dataset: str, threat: str, model_name: str, step: Step, teacher: torch.nn.Module | None = None
) -> Contestant:
    """Return the contestant `defense` or `defense+regularizer`, with its parameters' defaults.

    It trains the step's model, or one that its regularizer's head belongs to.
    """
    plugins = [catalog.find("defenses", part) for part in name.split("+")]
    recipe = {
        "summary": "a benchmark",
        "source": "robench",
        "dataset": dataset,
        "epochs": 1,
        "batch_size": 1,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": plugins[0].name},
        "regularizers": [{"name": p.name} for p in plugins[1:]],
        "optimizer": {"name": "sgd", "lr": 1.0},
        "selection": {"metric": "last"},
    }
    attacks = any(_takes_threat(p) for p in plugins)
    parsed = parse_recipe({**recipe, "threat": threat} if attacks else recipe, origin="benchmark")

    def new_network(architecture: str) -> Classifier:
        """Return the benchmark's network, whatever would be trained along: its passes are those that are timed."""
        del architecture
        return _built(Configured(name=model_name), step.model)

    objective = build_objective(parsed, teacher=teacher, new_network=new_network)
    model = step.model
    if (head := _HEADS.get(plugins[-1].entry)) is not None:
        parameters = {"network": model_name, "head": head}
        model = _built(Configured(name="with_head", parameters=parameters), step.model)
    optimizer = _optimizer(model, *objective.companions())
    return Contestant(objective, ideal_of(name), replace(step, model=model, optimizer=optimizer))


#: The last layers that losses with margins are made for.
_HEADS = {"he": "cosine", "l_softmax": "unbiased"}


def _built(architecture: Configured, like: Classifier) -> Classifier:
    built = build_classifier(architecture, num_classes=like.num_classes, input_shape=like.input_shape)
    return built.to(memory_format=torch.channels_last).train()


def _optimizer(*models: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for model in models for parameter in model.parameters()]
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)


def _takes_threat(plugin: catalog.Plugin) -> bool:
    code = plugin.load().objective
    call = code.__call__ if isinstance(code, type) else code
    return "threat" in inspect.signature(call).parameters


def ideal_of(name: str, *, classes: int = 10) -> Counts | None:
    """Return how many of which passes a step needs; None where that of one of its parts is not known."""
    total: dict[str, float] = {"update": 1}
    for part in name.split("+"):
        plugin = catalog.find("defenses", part)
        if plugin.entry not in IDEALS:
            return None
        for kind, count in IDEALS[plugin.entry](plugin.settings(), classes).items():
            total[kind] = total.get(kind, 0) + count
    return {kind: count for kind, count in total.items() if count}


@dataclass(frozen=True)
class Step:
    """One batch in front of a model: the passes that there are, and whole steps, timed."""

    model: Classifier
    images: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer
    clock: Clock

    def of(self, objective: Objective) -> float:
        """Return the seconds of a step: loss, gradients, update."""
        random = RandomStream(0, torch.arange(len(self.images)))
        started = self.clock()
        loss = objective(self.model, self.images, self.labels, random=random, progress=_PROGRESS, learning_rate=1.0)
        self.optimizer.zero_grad()
        loss.total.backward()
        self.optimizer.step()
        return self.clock() - started

    def forward(self) -> float:
        started = self.clock()
        with torch.no_grad():
            self.model(self.images)
        return self.clock() - started

    def input(self) -> float:
        started = self.clock()
        with frozen(self.model):
            images = self.images.detach().requires_grad_()
            torch.autograd.grad(self._loss(self.model(images)), images)
        return self.clock() - started

    def input_backward(self) -> float:
        images = self.images.detach().requires_grad_()
        loss = self._loss(self.model(images))
        started = self.clock()
        torch.autograd.grad(loss, images)
        return self.clock() - started

    def parameter(self) -> float:
        self.optimizer.zero_grad()
        started = self.clock()
        self._loss(self.model(self.images)).backward()
        return self.clock() - started

    def double(self) -> float:
        self.optimizer.zero_grad()
        started = self.clock()
        images = self.images.detach().requires_grad_()
        with mode(self.model, training=False):
            loss = self._loss(self.model(images))
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        gradient.square().sum().backward()
        return self.clock() - started

    def update(self) -> float:
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        started = self.clock()
        self.optimizer.step()
        return self.clock() - started

    def _loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.labels)


def _row(name: str, contestants: Mapping[str, Contestant], passes: Mapping[str, float]) -> Row:
    contestant, base = contestants[name], name.partition("+")[0]
    seconds = {key: statistics.median(contestants[key].times) for key in (name, base)}
    row = Row(seconds[name], passes=contestant.ideal, goal=GOALS.get(name))
    if contestant.ideal is not None:
        row.ideal_seconds = sum(passes[kind] * count for kind, count in contestant.ideal.items())
        row.of_ideal = row.seconds / row.ideal_seconds
    if base != name:
        row.of_base = row.seconds / seconds[base]
    if row.goal is not None:
        ratio = row.of_base if row.goal.over == "base" else row.of_ideal
        row.met = None if ratio is None else ratio <= row.goal.most
    return row


def text_of(report: Report) -> str:
    """Return the report as text."""
    lines = [
        f"{report.model}, batches of {report.batch_size}, {report.machine}, {report.clock} time",
        *(f"  {kind:15}{report.passes[kind] * 1e3:9.1f} ms  {what}" for kind, what in PASSES.items()),
        "",
        f"{'':24}{'step ms':>10}{'ideal ms':>10}{'of ideal':>10}{'of base':>10}  goal",
    ]
    for name, row in report.rows.items():
        ideal = "-" if row.ideal_seconds is None else f"{row.ideal_seconds * 1e3:.1f}"
        ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in (row.of_ideal, row.of_base)]
        goal = "" if row.goal is None else f"at most {row.goal.most} of {row.goal.over}: {'yes' if row.met else 'NO'}"
        lines.append(f"{name:24}{row.seconds * 1e3:10.1f}{ideal:>10}{ratios[0]:>10}{ratios[1]:>10}  {goal}".rstrip())
        if row.passes is not None:
            lines.append("    " + " + ".join(f"{count:g} {kind}" for kind, count in row.passes.items()))
        else:
            lines.append("    no ideal is known; add it to IDEALS")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Are robench's attacks as strong as the other libraries'? Every example of full-size questions, by robench's engine.

python -m benchmarks.parity [--model NAME ...] [--attack NAME ...] [--examples N] [--out FOLDER]

What was measured is written after every question, and replaces only the same question's earlier answer: so it can be
run in pieces. `parity.json` has the counts, `parity.csv` every example on which a library is stronger than robench, or
robench than a library.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.problems import SETTINGS, Choice, empty, trained
from benchmarks.standings import FACTOR, POINTS
from robench import backends, planning
from robench.checkpoints import load_model
from robench.classifier import Classifier, keep_large_buffers
from robench.datasets import ImageSet, open_split, select_examples
from robench.errors import UnknownName, UserError
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.provenance import PACKAGE, code_version, device_name
from robench.records import Configured, EvalSpec, ModelIdentity
from robench.registry import find_card
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

#: By model (of the registry, or made by the benchmarks): its balls, in which some images fall and some stand.
MODELS = {
    "mnist-standard": ("Linf@0.1", "L2@1.5"),
    "mnist-pgd": ("Linf@0.3", "L2@2"),
    "resnet20": ("Linf@8/255", "L2@0.5"),
}
ATTACKS = (
    *("fgsm", "pgd-40", "apgd-ce", "apgd-dlr", "apgd-t", "square", "autoattack"),
    *("deepfool", "fab", "fab-t", "ddn", "cw-l2", "cw-linf"),
)
#: Minimum-norm distances that differ by less are equal.
_EQUAL = 0.01
#: Columns of the CSV file.
NAMES = ("model", "threat", "attack", "backend", "example_id", "native", "other")
OUT = Path("benchmarks") / "results"
CACHE = Path("build") / "benchmarks"


@dataclass
class Answer:
    """What one implementation found."""

    version: str
    robust: int
    """Examples that stand, of all."""
    median: float | None
    """Of a minimum-norm attack, of the attacked examples; None: infinite."""
    stronger: int = 0
    """Examples that it breaks and robench does not, or breaks at less than 0.99 of robench's distance."""
    weaker: int = 0
    """The other way round."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Question:
    """One attack on one model in one ball, with all that answered."""

    model: str
    threat: str
    attack: str
    examples: int
    minimum_norm: bool
    native: Answer
    others: dict[str, Answer]
    failures: dict[str, str]
    """Why a library that offers it has no answer."""
    measured: dict[str, Any]
    """Machine, versions, commit."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what makes two measurements the same question."""
        return self.model, self.threat, self.attack

    @property
    def kept(self) -> bool | None:
        """Tell whether robench is as strong as the strongest, up to the tolerance; None where nobody else answered."""
        if not self.others:
            return None
        if self.minimum_norm:
            best = min(_length(answer.median) for answer in self.others.values())
            return _length(self.native.median) <= FACTOR * best
        return self.native.robust <= min(a.robust for a in self.others.values()) + POINTS * self.examples


Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = _parser().parse_args(arguments)
    keep_large_buffers()
    place = Workspace.locate(None, options.data_root)
    for name in options.model or MODELS:
        model, images = subject(name, place, options.cache)
        for question, rows in questions(name, model, images, options):
            write(question, rows, options.out)
            print(line_of(question), flush=True)
    print()
    print(table(read(options.out / "parity.json")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="repeatable; default all")
    parser.add_argument("--attack", action="append", choices=sorted(ATTACKS), help="repeatable; default all")
    parser.add_argument("--examples", type=int, default=500, help="a prefix of the test split's fixed shuffle")
    parser.add_argument("--backend", action="append", choices=backends.names()[1:], help="repeatable; default all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of parity.json and parity.csv")
    parser.add_argument("--data-root", type=Path, help="default ROBENCH_DATA")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the weights made here")
    return parser


def subject(name: str, place: Workspace, cache: Path) -> tuple[Classifier, ImageSet]:
    """Return a model and its test split."""
    if name in SETTINGS:
        images = open_split(SETTINGS[name][0], "test", place)
        choice = Choice(name, place.data_root, cache)
        return trained(choice, empty(name, images)), images
    images = open_split(find_card(name, place)[1].dataset, "test", place)
    shape, classes = images.image_shape, len(images.classes)
    return load_model(name, place, input_shape=shape, num_classes=classes).model.eval(), images


def questions(
    name: str, model: Classifier, images: ImageSet, options: argparse.Namespace
) -> Iterator[tuple[Question, list[Row]]]:
    """Yield every question about a model with its disagreements; attacks that the catalog lacks are skipped loudly."""
    worker = Worker(model, images, device=torch.device(options.device), precision="fp32")
    for text in MODELS[name]:
        threat = ThreatModel.parse(text)
        for attack in options.attack or ATTACKS:
            try:
                spec, ids = plan(name, images, threat, attack, options.examples)
            except UnknownName as error:
                print(f"skipped: {error}", flush=True)
                continue
            except UserError:  # has no form for this norm
                continue
            yield ask(worker, spec, ids, options.backend or backends.names()[1:])


def plan(
    name: str, images: ImageSet, threat: ThreatModel, attack: str, count: int, backend: str = backends.NATIVE
) -> tuple[EvalSpec, NDArray[np.int64]]:
    """Return the question as `robench eval` would put it, and the examples' positions."""
    examples, ids = select_examples(images, dataset=name, split="test", count=count)
    identity = ModelIdentity(id=name, weights_sha256="0" * 64, architecture=Configured(name=name))
    (spec,) = planning.plan(planning.Request(identity, examples, [threat], [attack], backend=backend))
    return spec, ids


def ask(worker: Worker, spec: EvalSpec, ids: NDArray[np.int64], libraries: Sequence[str]) -> tuple[Question, list[Row]]:
    """Let robench and every library that offers it answer a question; return it with the disagreements."""
    minimum_norm, column = planning.is_minimum_norm(spec), spec.threat.norm.lower()
    native = worker(Shard(spec, ids))
    if native.error:
        raise RuntimeError(f"{spec.attack.title}: {native.error.message}")
    reached = reached_of(native.rows, column, minimum_norm=minimum_norm)
    question = Question(
        model=spec.model.id,
        threat=str(spec.threat),
        attack=spec.attack.name,
        examples=len(ids),
        minimum_norm=minimum_norm,
        native=answer_of(native, reached, minimum_norm, "this checkout"),
        others={},
        failures={},
        measured={
            "device": device_name(worker.device),
            "torch": torch.__version__,
            "commit": code_version(PACKAGE),
        },
    )
    rows: list[Row] = []
    for library in libraries:
        plugin, parameters = planning.attack_settings(spec.attack.name)
        try:
            backends.offered(library, plugin, parameters, spec.threat.norm)
        except UserError:
            continue
        try:
            fields = backends.identify(library, plugin, parameters, spec.threat.norm)
        except UserError as error:  # is not installed
            question.failures[library] = str(error)
            continue
        other = worker(Shard(spec.model_copy(update={"attack": spec.attack.model_copy(update=fields)}), ids))
        if other.error:
            question.failures[library] = other.error.message
            continue
        found = reached_of(other.rows, column, minimum_norm=minimum_norm)
        answer = answer_of(other, found, minimum_norm, fields["backend"].partition(" ")[2])
        stronger, weaker = found < (1 - _EQUAL) * reached, reached < (1 - _EQUAL) * found
        answer.stronger, answer.weaker = int(stronger.sum()), int(weaker.sum())
        question.others[library] = answer
        rows += [
            {
                **dict(zip(NAMES, (*question.key, library), strict=False)),
                "example_id": int(native.rows["example_id"][i]),
                "native": _word(reached[i], minimum_norm),
                "other": _word(found[i], minimum_norm),
            }
            for i in (stronger | weaker).nonzero()[0]
        ]
    return question, rows


def reached_of(rows: Any, column: str, *, minimum_norm: bool) -> NDArray[np.float64]:
    """Return per example how far its adversarial image is: infinite for none, of a fixed budget 1 for any.

    Images that are wrong without an attack count 0.
    """
    length = rows[column] if minimum_norm else np.ones(len(rows["robust"]))
    fallen = rows["broken"] if minimum_norm else rows["attacked"] & ~rows["robust"]
    return np.where(~rows["attacked"], 0.0, np.where(fallen, length, np.inf))


def answer_of(result: Any, reached: NDArray[np.float64], minimum_norm: bool, version: str) -> Answer:
    """Return what an implementation found, in numbers."""
    median = float(np.quantile(reached[result.rows["attacked"]], 0.5, method="higher")) if minimum_norm else None
    return Answer(
        version=version,
        robust=int(result.rows["robust"].sum()),
        median=median if median is not None and math.isfinite(median) else None,
        notes=sorted(result.notes),
        seconds=round(result.cost.seconds, 2),
    )


def write(question: Question, rows: list[Row], folder: Path) -> None:
    """Put a question's answer in the place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [other for other in read(folder / "parity.json") if other.key != question.key]
    everything = sorted([*kept, question], key=lambda q: q.key)
    (folder / "parity.json").write_text(json.dumps([asdict(q) for q in everything], indent=1) + "\n", encoding="utf-8")
    path = folder / "parity.csv"
    before: list[Row] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            before = [r for r in csv.DictReader(file) if (r["model"], r["threat"], r["attack"]) != question.key]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*before, *rows], key=lambda r: (*(r[n] for n in NAMES[:4]), int(r["example_id"]))))


def read(path: Path) -> list[Question]:
    """Return what was measured before."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    for one in found:
        one["native"] = Answer(**one["native"])
        one["others"] = {name: Answer(**other) for name, other in one["others"].items()}
    return [Question(**one) for one in found]


def line_of(question: Question) -> str:
    """Return one line for the impatient."""
    found = {"native": question.native, **question.others}
    answers = ", ".join(f"{name} {_shown(a, question)}" for name, a in found.items())
    failures = "".join(f"; {name} failed: {why}" for name, why in question.failures.items())
    return f"{' '.join(question.key)}, {question.examples} examples: {answers}{failures}"


def table(all_of: Sequence[Question]) -> str:
    """Return everything as a Markdown table."""
    lines = [
        "| model | ball | attack | examples | robench | others (examples where stronger / weaker than robench) | |",
        "|---|---|---|---|---|---|---|",
    ]
    for q in all_of:
        others = "; ".join(f"{n} {_shown(a, q)} ({a.stronger} / {a.weaker})" for n, a in q.others.items())
        others += "".join(f"; {name} failed" for name in q.failures)
        verdict = {True: "kept", False: "missed", None: "-"}[q.kept]
        cells = [q.model, q.threat, q.attack, str(q.examples), _shown(q.native, q), others or "-", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(answer: Answer, question: Question) -> str:
    if question.minimum_norm:
        return "infinite" if answer.median is None else f"{answer.median:.4g}"
    return f"{100 * answer.robust / question.examples:.1f} %"


def _length(median: float | None) -> float:
    return math.inf if median is None else median


def _word(reached: float, minimum_norm: bool) -> str:
    if minimum_norm:
        return f"{reached:.6g}"
    return "broken" if math.isfinite(reached) else "robust"


if __name__ == "__main__":
    main()

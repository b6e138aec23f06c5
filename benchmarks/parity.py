"""Are robench's attacks as strong as the other libraries'? Every example of full-size questions, by robench's engine.

python -m benchmarks.parity [--model NAME ...] [--attack NAME ...] [--examples N] [--seeds N] [--out FOLDER]

An attack that begins at random points leaves more or fewer images standing by luck, by four of 200 images between two
seeds of PGD in L2. With several seeds the means are compared, and a difference within their standard error is called
luck. What was measured is written after every question, and replaces only the same question's earlier answer. Every
hundred examples that an implementation answered with a seed are kept under `--cache`, so that an interrupted run goes
on, and one with more examples or seeds adds to what is known. `parity.json` has the counts, `parity.csv` every example
on which a library is stronger than robench, or robench than a library.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.problems import SETTINGS, Choice, empty, trained
from benchmarks.standings import FACTOR, POINTS
from robench import backends, planning
from robench.checkpoints import load_model, state_sha256
from robench.classifier import Classifier, keep_large_buffers
from robench.datasets import ImageSet, fixed_shuffle, open_split, select_examples
from robench.errors import UnknownName, UserError
from robench.evaluation.shards import Rows, Shard
from robench.evaluation.worker import Worker
from robench.provenance import PACKAGE, code_version, device_name
from robench.records import Configured, EvalSpec, ModelIdentity, canonical_hash
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
#: Examples that are asked and kept at a time. The other libraries' random numbers belong to the batch.
PIECE = 100


@dataclass
class Answer:
    """What one implementation found."""

    version: str
    robust: list[int]
    """Examples that stand, of all, by seed."""
    medians: list[float | None]
    """Of a minimum-norm attack, of the attacked examples, by seed; None: infinite. Empty for a fixed budget."""
    stronger: int = 0
    """Examples that it breaks and robench does not, or breaks at less than 0.99 of robench's distance."""
    weaker: int = 0
    """The other way round."""
    notes: list[str] = field(default_factory=list)
    """Of the first seed, as `weaker`."""
    seconds: float = 0.0

    @property
    def standing(self) -> float:
        """Return how many examples stand, on average over the seeds."""
        return statistics.fmean(self.robust)

    @property
    def length(self) -> float:
        """Return the median distance, on average over the seeds."""
        return statistics.fmean(math.inf if median is None else median for median in self.medians)

    @property
    def variance(self) -> float:
        """Return the variance of what is compared, as a mean over the seeds; 0 where there is one seed."""
        found = self.medians or self.robust
        if len(found) == 1 or None in found:
            return 0.0
        return statistics.variance([float(value) for value in found if value is not None]) / len(found)


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
    def verdict(self) -> Literal["kept", "luck", "missed", "-"]:
        """Tell whether robench is as strong as the strongest, up to the tolerance; `luck` where it is weaker by no more
        than two standard errors of the seeds beyond it, `-` where nobody else answered.
        """
        if not self.others:
            return "-"
        if self.minimum_norm:
            best = min(self.others.values(), key=lambda answer: answer.length)
            excess = self.native.length - FACTOR * best.length if math.isfinite(best.length) else 0.0
        else:
            best = min(self.others.values(), key=lambda answer: answer.standing)
            excess = self.native.standing - best.standing - POINTS * self.examples
        if excess <= 0:
            return "kept"
        return "luck" if excess <= 2 * math.sqrt(self.native.variance + best.variance) else "missed"


Row = dict[str, Any]


class Broke(RuntimeError):
    """An attack has no answer."""


@dataclass(frozen=True)
class Found:
    """What an implementation found with one seed."""

    rows: Rows
    notes: frozenset[str]
    seconds: float
    commits: frozenset[str]
    """Of robench, when it was asked."""


@dataclass(frozen=True)
class Pieces:
    """Asks for `PIECE` examples at a time, and keeps what was found in a folder; without one it asks again."""

    folder: Path | None = None

    def ask(self, worker: Worker, spec: EvalSpec, ids: NDArray[np.int64]) -> Found:
        """Return the answer about all examples; raise Broke where there is none."""
        parts = [self._part(worker, spec, ids[i : i + PIECE]) for i in range(0, len(ids), PIECE)]
        return Found(
            rows={name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows},
            notes=frozenset().union(*(part.notes for part in parts)),
            seconds=sum(part.seconds for part in parts),
            commits=frozenset().union(*(part.commits for part in parts)),
        )

    def _part(self, worker: Worker, spec: EvalSpec, ids: NDArray[np.int64]) -> Found:
        asked = spec.model_dump(mode="json", exclude={"examples": {"count", "ids_sha256"}})
        place = [asked, np.sort(ids).tolist(), device_name(worker.device), torch.__version__]
        path = self.folder / f"{canonical_hash(place)}.npz" if self.folder else None
        if path and path.is_file():
            with np.load(path) as kept:
                rows = {name: kept[name] for name in kept.files}
            told = json.loads(str(rows.pop("told")))
            return Found(rows, frozenset(told["notes"]), told["seconds"], frozenset(told["commits"]))
        result = worker(Shard(spec, np.sort(ids)))
        if result.error:
            raise Broke(result.error.message)
        found = Found(result.rows, result.notes, result.cost.seconds, frozenset({code_version(PACKAGE)}))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            told = {"notes": sorted(found.notes), "seconds": found.seconds, "commits": sorted(found.commits)}
            unfinished = path.with_suffix(".part.npz")
            np.savez_compressed(unfinished, told=np.array(json.dumps(told)), **found.rows)
            unfinished.replace(path)
        return found


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
    parser.add_argument("--seeds", type=int, default=1, help="of attacks that draw random numbers (default 1)")
    parser.add_argument("--backend", action="append", choices=backends.names()[1:], help="repeatable; default all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of parity.json and parity.csv")
    parser.add_argument("--data-root", type=Path, help="default ROBENCH_DATA")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of the weights made here, and of the answers so far"
    )
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
    weights = state_sha256(model.network)
    for text in MODELS[name]:
        threat = ThreatModel.parse(text)
        for attack in options.attack or ATTACKS:
            try:
                spec, ids = plan(name, images, threat, attack, options.examples, weights=weights)
            except UnknownName as error:
                print(f"skipped: {error}", flush=True)
                continue
            except UserError:  # has no form for this norm
                continue
            specs = [spec.model_copy(update={"seed": seed}) for seed in range(options.seeds)]
            pieces = Pieces(options.cache / "parity")
            yield ask(worker, specs, ids, options.backend or backends.names()[1:], pieces)


def plan(
    name: str, images: ImageSet, threat: ThreatModel, attack: str, count: int, *, weights: str = "0" * 64
) -> tuple[EvalSpec, NDArray[np.int64]]:
    """Return the question as `robench eval` would put it, and the examples' positions in the order of the shuffle."""
    examples, _ = select_examples(images, dataset=name, split="test", count=count)
    identity = ModelIdentity(id=name, weights_sha256=weights, architecture=Configured(name=name))
    (spec,) = planning.plan(planning.Request(identity, examples, [threat], [attack]))
    return spec, fixed_shuffle(len(images))[:count]


def ask(
    worker: Worker,
    specs: Sequence[EvalSpec],
    ids: NDArray[np.int64],
    libraries: Sequence[str],
    pieces: Pieces | None = None,
) -> tuple[Question, list[Row]]:
    """Let robench and every library that offers it answer a question, once per seed; return it with the disagreements
    of the first.
    """
    spec = specs[0]
    minimum_norm, column = planning.is_minimum_norm(spec), spec.threat.norm.lower()
    pieces = pieces or Pieces()
    try:
        natives = [pieces.ask(worker, one, ids) for one in specs]
    except Broke as error:
        raise RuntimeError(f"{spec.attack.title}: {error}") from None
    commits = {commit for native in natives for commit in native.commits}
    reached = reached_of(natives[0].rows, column, minimum_norm=minimum_norm)
    question = Question(
        model=spec.model.id,
        threat=str(spec.threat),
        attack=spec.attack.name,
        examples=len(ids),
        minimum_norm=minimum_norm,
        native=answer_of(natives, column, minimum_norm, "this checkout"),
        others={},
        failures={},
        measured={
            "device": device_name(worker.device),
            "torch": torch.__version__,
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
        attack = spec.attack.model_copy(update=fields)
        try:
            others = [pieces.ask(worker, one.model_copy(update={"attack": attack}), ids) for one in specs]
        except Broke as error:
            question.failures[library] = str(error)
            continue
        commits |= {commit for other in others for commit in other.commits}
        found = reached_of(others[0].rows, column, minimum_norm=minimum_norm)
        answer = answer_of(others, column, minimum_norm, fields["backend"].partition(" ")[2])
        stronger, weaker = found < (1 - _EQUAL) * reached, reached < (1 - _EQUAL) * found
        answer.stronger, answer.weaker = int(stronger.sum()), int(weaker.sum())
        question.others[library] = answer
        rows += [
            {
                **dict(zip(NAMES, (*question.key, library), strict=False)),
                "example_id": int(natives[0].rows["example_id"][i]),
                "native": _word(reached[i], minimum_norm),
                "other": _word(found[i], minimum_norm),
            }
            for i in (stronger | weaker).nonzero()[0]
        ]
    question.measured["commit"] = ", ".join(sorted(commits))
    return question, rows


def reached_of(rows: Any, column: str, *, minimum_norm: bool) -> NDArray[np.float64]:
    """Return per example how far its adversarial image is: infinite for none, of a fixed budget 1 for any.

    Images that are wrong without an attack count 0.
    """
    length = rows[column] if minimum_norm else np.ones(len(rows["robust"]))
    fallen = rows["broken"] if minimum_norm else rows["attacked"] & ~rows["robust"]
    return np.where(~rows["attacked"], 0.0, np.where(fallen, length, np.inf))


def answer_of(results: Sequence[Found], column: str, minimum_norm: bool, version: str) -> Answer:
    """Return what an implementation found with each seed, in numbers."""
    return Answer(
        version=version,
        robust=[int(result.rows["robust"].sum()) for result in results],
        medians=[_median(result.rows, column) for result in results] if minimum_norm else [],
        notes=sorted({note for result in results for note in result.notes}),
        seconds=round(sum(result.seconds for result in results), 2),
    )


def _median(rows: Any, column: str) -> float | None:
    reached = reached_of(rows, column, minimum_norm=True)
    median = float(np.quantile(reached[rows["attacked"]], 0.5, method="higher"))
    return median if math.isfinite(median) else None


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
    seeds = len(question.native.robust)
    return f"{' '.join(question.key)}, {question.examples} examples, {seeds} seeds: {answers}{failures}"


def table(all_of: Sequence[Question]) -> str:
    """Return everything as a Markdown table."""
    lines = [
        "| model | ball | attack | examples x seeds | robench | others (images where stronger / weaker than it) | |",
        "|---|---|---|---|---|---|---|",
    ]
    for q in all_of:
        others = "; ".join(f"{n} {_shown(a, q)} ({a.stronger} / {a.weaker})" for n, a in q.others.items())
        others += "".join(f"; {name} failed" for name in q.failures)
        size = f"{q.examples} x {len(q.native.robust)}"
        cells = [q.model, q.threat, q.attack, size, _shown(q.native, q), others or "-", q.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(answer: Answer, question: Question) -> str:
    error = math.sqrt(answer.variance)
    if question.minimum_norm:
        return f"{answer.length:.4g}" if math.isfinite(answer.length) else "infinite"
    share = f"{100 * answer.standing / question.examples:.1f}"
    return f"{share} ± {100 * error / question.examples:.1f} %" if error else f"{share} %"


def _word(reached: float, minimum_norm: bool) -> str:
    if minimum_norm:
        return f"{reached:.6g}"
    return "broken" if math.isfinite(reached) else "robust"


if __name__ == "__main__":
    main()

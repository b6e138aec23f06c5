"""`robench check`: did robustness get worse? `robench baseline`: compared with what?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robench.cli.options import DataRootOption, DeviceOption, WorkspaceOption, print_table
from robench.errors import StorageError, UnknownName, UserError, suggestion
from robench.store import Store, publish
from robench.workspace import Workspace

if TYPE_CHECKING:
    from robench.gate.baseline import Answer, Baseline
    from robench.gate.verdicts import Check, Rules

#: The exit status of a check that does not pass.
FAILED = 1

_SUFFIXES = {".md": "markdown", ".xml": "junit", ".json": "json"}

BaselineOption = Annotated[
    Path | None, typer.Option("--baseline", help="The baseline's file (default: reports/baseline.toml).")
]

baseline_app = typer.Typer(help="What `robench check` compares against.", no_args_is_help=True)


def check(
    baseline: BaselineOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Of the baseline's, or NEW=OLD: NEW stands for OLD. Repeatable. Default: all."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="A change up to so many points (lengths: percent) is none. [1; --engine: 0]"),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Probability at most of failing where nothing changed.")] = 0.01,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="The models are frozen references: did robench itself change? Needs new answers."
        ),
    ] = False,
    candidate: Annotated[
        Path | None,
        typer.Option(
            "--candidate", metavar="REPORTS", help="The reports folder of the new answers (default: reports/)."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Ask the baseline's questions first, as far as they are not answered.")
    ] = False,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Attack randomly drawn examples until it is clear; clean and robust accuracy only."
        ),
    ] = False,
    examples: Annotated[
        int | None,
        typer.Option("--examples", min=1, help="With --fast: draw so many at most. Default: the baseline's."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="text, markdown, junit, json or github.")] = "text",  # noqa: A002
    write: Annotated[
        list[Path] | None,
        typer.Option("--write", metavar="FILE", help="Write FILE.md, .xml (JUnit), .json or .html, too. Repeatable."),
    ] = None,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
) -> int:
    """Compare answers with a baseline; the exit status is 1 where robustness got worse, or an answer is not there.

    Example: robench check --baseline reports/baseline.toml --format markdown
    """
    from robench.gate import rendering
    from robench.gate.verdicts import Rules

    _refuse(engine=engine, measure=measure, candidate=candidate, fast=fast, examples=examples, tolerance=tolerance)
    if format not in (formats := ("text", *rendering.FORMATS)):
        raise UserError(f"--format {format!r} is unknown; write {', '.join(formats)}")
    for target in write or ():
        if target.suffix not in {*_SUFFIXES, ".html"}:
            raise UserError(f"--write {target}: the ending says what is written; write .md, .xml, .json or .html")
    if not 0 < alpha < 1:
        raise UserError(f"--alpha {alpha:g} is no probability; give one between 0 and 1, such as 0.01")
    place = Workspace.locate(workspace, data_root)
    asked = Asked(
        path=_baseline_path(baseline, place),
        place=place,
        store=Store(candidate or place.reports),
        models=model,
        rules=Rules(
            gate="engine" if engine else "model",
            tolerance=(0.0 if engine else 1.0) if tolerance is None else tolerance,
            alpha=alpha,
            fast=fast,
        ),
        device=device,
    )
    found = _raced(asked, examples) if fast else _compared(asked, measure=measure, fresh=engine and candidate is None)
    if format == "text":
        _print(found)
    else:
        print(rendering.FORMATS[format](found), end="")
    for target in write or ():
        _publish(target, _rendered(found, target, place), option="--write")
    return 0 if found.passes else FAILED


def _refuse(
    *, engine: bool, measure: bool, candidate: Path | None, fast: bool, examples: int | None, tolerance: float | None
) -> None:
    """Raise UserError for options that exclude each other, and for new answers that are nowhere."""
    if measure and fast:
        raise UserError(
            "--measure asks all of the baseline's questions, --fast only until it is clear; give one of them"
        )
    if engine and not (measure or fast or candidate):
        raise UserError(
            "--engine compares new answers of frozen models; add --measure, or --candidate with their folder"
        )
    if candidate and candidate.exists() and not candidate.is_dir():
        raise UserError(f"--candidate {candidate} is a file; give the reports folder of the new answers")
    if candidate and not (candidate.exists() or measure or fast):
        raise UserError(
            f"--candidate {candidate}: there is no such folder; give the reports folder of the new answers, "
            "or add --measure to make them there"
        )
    if candidate and (candidate / "reports").is_dir() and not _has_answers(candidate):
        raise UserError(
            f"--candidate {candidate} is a workspace; give its reports folder: --candidate {candidate / 'reports'}"
        )
    if examples and not fast:
        raise UserError(f"--examples {examples} is the budget of --fast; add it, or leave out --examples")
    if fast and (engine or tolerance == 0):
        raise UserError(f"--fast cannot decide {'--engine' if engine else '--tolerance 0'}; leave one of them out")


@dataclass(frozen=True)
class Asked:
    """What is to be checked, and how."""

    path: Path
    """The baseline's."""
    place: Workspace
    store: Store
    """Of the new answers."""
    models: Sequence[str] | None
    rules: Rules
    device: str


def _compared(asked: Asked, *, measure: bool, fresh: bool) -> Check:
    """Compare what is on record, after asking for what is missing if that is wanted."""
    from robench.gate import baseline as baselines
    from robench.gate.verdicts import Candidates
    from robench.gate.verdicts import check as compare

    known = baselines.read(asked.path)
    names = _names(asked, known)
    if not measure:
        return compare(known, asked.path, Candidates(asked.store, asked.place, names, {}, {}), asked.rules)
    from robench.cli.measuring import Measuring

    with tempfile.TemporaryDirectory(prefix="robench-check-") as empty:
        # Frozen models are asked again although their answers are known.
        store = Store(Path(empty)) if fresh else asked.store
        identities, problems = Measuring(asked.place, store, device=asked.device).answer(
            known, asked.path.parent, names
        )
        return compare(known, asked.path, Candidates(store, asked.place, names, identities, problems), asked.rules)


def _raced(asked: Asked, budget: int | None) -> Check:
    """Attack examples in random order until it is clear."""
    from robench.cli.measuring import Measuring
    from robench.cli.racing import race
    from robench.gate import baseline as baselines

    known = baselines.read(asked.path)
    names = _names(asked, known)
    measuring = Measuring(asked.place, asked.store, device=asked.device)
    return race(known, asked.path, names, asked.rules, measuring=measuring, budget=budget)


def _publish(path: Path, text: str, *, option: str) -> None:
    """Write a file that an option names; where it cannot be written that option helps, not --workspace."""
    try:
        publish(path.absolute(), text.encode())
    except StorageError as error:
        elsewhere = str(error).replace("choose another folder with --workspace", "name a file in another folder")
        raise StorageError(f"{option} {path}: {elsewhere}") from error


def _baseline_path(given: Path | None, place: Workspace) -> Path:
    return given or place.reports / "baseline.toml"


def _names(asked: Asked, known: Baseline) -> dict[str, str]:
    """Return which model stands for each of the baseline's that is checked; raise UserError for one that is unknown."""
    from robench.registry import find_card, is_reference

    models = dict.fromkeys(entry.model for entry in known.entries)
    names = {}
    for text in asked.models or models:
        new, _, old = text.rpartition("=") if asked.models else ("", "", text)
        if old not in models:
            raise UserError(f"--model {old!r} is not in {asked.path}; {suggestion(old, models)}")
        if new and not is_reference(new):
            find_card(new, asked.place)
        names[old] = new or old
    return names


def _rendered(found: Check, target: Path, place: Workspace) -> str:
    from robench.gate import rendering

    if target.suffix == ".html":
        from robench.gate.page import page

        return page(found, place)
    return rendering.FORMATS[_SUFFIXES[target.suffix]](found)


def _print(found: Check) -> None:
    from robench.gate import rendering

    print_table(rendering.COLUMNS, [rendering.cells(verdict) for verdict in found.verdicts])
    for verdict in rendering.notable(found):
        print(rendering.line(verdict))
    print(rendering.rule(found))
    print(f"robench check {rendering.headline(found)}")


@baseline_app.command("set")
def set_baseline(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Repeatable. Default: every model that has a complete answer.")
    ] = None,
    record: Annotated[
        list[str] | None,
        typer.Option(
            "--record", metavar="IDENTITY", help="Only these answers. Repeatable. Default: all of the models'."
        ),
    ] = None,
    baseline: BaselineOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Make the answers that are on record for the models' current weights the baseline.

    A reports folder's own baseline, beside its records/, is made of them; one that stands elsewhere is made of the
    workspace's reports/.

    Example: robench baseline set --model mnist-pgd
    """
    place = Workspace.locate(workspace)
    path = _baseline_path(baseline, place)
    made = _current(model, record, path, place)
    if baseline:
        _publish(path, made.to_toml(), option="--baseline")
    else:
        publish(path.absolute(), made.to_toml().encode())
    models = dict.fromkeys(entry.model for entry in made.entries)
    print(f"{path}: {len(made.entries)} answers of {', '.join(models)}, from {_reports_of(path, place)}")


def _reports_of(path: Path, place: Workspace) -> Path:
    """Return the reports folder whose answers make a baseline: the one it stands in, else the workspace's."""
    return path.parent if _has_answers(path.parent) else place.reports


def _has_answers(folder: Path) -> bool:
    """Tell whether a folder is a reports folder with answers."""
    return any((folder / kind).is_dir() for kind in ("records", "certificates"))


def _current(models: Sequence[str] | None, identities: Sequence[str] | None, path: Path, place: Workspace) -> Baseline:
    """Return the baseline at `path` that the records on hand make now."""
    from robench.gate import baseline as baselines
    from robench.registry import cards, is_reference

    store = Store(_reports_of(path, place))
    weights = {name: stored.card.weights.sha256 for name, stored in cards(place).items()}
    found: list[Answer] = [s.record for s in store.records()]
    found += [s.record for s in store.certificates()]
    usable = [r for r in found if r.status == "complete" and getattr(r.spec, "until", None) is None]
    if not usable:
        raise UserError(f"there are no complete records in {store.root}; robench eval makes them")
    answered = dict.fromkeys(r.spec.model.id for r in usable)
    wanted = dict.fromkeys(models or answered)
    chosen = []
    for name in wanted:
        if not (name in answered or name in weights or is_reference(name)):
            raise UnknownName("model", name, {*answered, *weights})
        own = [r for r in usable if r.spec.model.id == name]
        newest = max(own, key=lambda r: r.provenance.finished).spec.model.weights_sha256 if own else ""
        own = [r for r in own if r.spec.model.weights_sha256 == weights.get(name, newest)]
        if not own:
            raise UserError(
                f"{name} has no complete answer of its current weights in {store.root}; "
                f"run robench eval --model {name} first"
            )
        chosen += own
    if identities:
        known = {r.spec.identity for r in chosen}
        if unknown := [i for i in identities if i not in known]:
            raise UserError(f"--record {unknown[0]} is no complete answer of {', '.join(wanted)} in {store.root}")
        chosen = [r for r in chosen if r.spec.identity in set(identities)]
    return baselines.made_of(chosen, store, path.parent)


@baseline_app.command("show")
def show_baseline(baseline: BaselineOption = None, workspace: WorkspaceOption = None) -> None:
    """Print the baseline, after comparing it with its records.

    Example: robench baseline show
    """
    from robench.gate import baseline as baselines

    path = _baseline_path(baseline, Workspace.locate(workspace))
    rows = []
    for entry in baselines.read(path).entries:
        baselines.load(entry, path.parent)
        facts = (entry.model, entry.weights_sha256[:8], entry.question)
        rows += [[*facts, name, f"{value:.4g}"] for name, value in entry.values.items()]
    print_table(["model", "weights", "question", "metric", "value"], rows)


@baseline_app.command("diff")
def diff_baseline(
    other: Annotated[
        Path | None, typer.Argument(help="Another baseline (default: what `set` would write now).")
    ] = None,
    baseline: BaselineOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Print in which numbers a baseline differs from another one, or from what `set` would write now.

    Example: robench baseline diff
    """
    from robench.gate import baseline as baselines

    place = Workspace.locate(workspace)
    path = _baseline_path(baseline, place)
    old = baselines.read(path)
    models = list(dict.fromkeys(entry.model for entry in old.entries))
    new = baselines.read(other) if other else _current(models, None, path, place)
    before, after = (
        {
            (e.model, e.question, name): (value, e.weights_sha256[:8])
            for e in side.entries
            for name, value in e.values.items()
        }
        for side in (old, new)
    )
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        print("no difference")
        return
    rows = [[*key, *(f"{side[key][0]:.6g} ({side[key][1]})" if key in side else "-" for side in (before, after))]
            for key in changed]  # fmt: skip
    print_table(
        ["model", "question", "metric", "baseline (weights)", "other (weights)" if other else "now (weights)"], rows
    )

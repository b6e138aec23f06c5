"""`robench eval`: attack a model, write records."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from robench import planning
from robench.backends import NATIVE
from robench.cli import answering, certifying
from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    percent,
    print_json,
    print_table,
)
from robench.errors import Unfinished, UserError
from robench.evaluation.deadline import Deadline
from robench.records import (
    CertificateRecord,
    Decision,
    EvalRecord,
    EvalSpec,
    Examples,
    Precision,
)
from robench.threat_model import ThreatModel, exact_fraction
from robench.workspace import Workspace

if TYPE_CHECKING:
    from robench.cli.progress import Outlook
    from robench.datasets import Split
    from robench.store import Store


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            help="A registered name, torchvision:NAME, timm:NAME, FILE.py:FACTORY or MODULE:FACTORY. Repeatable.",
        ),
    ],
    suite: Annotated[str | None, typer.Option(help="A named list of attacks.")] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help="NAME or NAME:key=value,key=value. Repeatable.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Whose attacks: native, foolbox, art or autoattack (`robench show foolbox`).")
    ] = NATIVE,
    certificate: Annotated[
        list[str] | None,
        typer.Option("--certificate", help="cohen, anytime, l-bound, effective-margin, ... as --attack. Repeatable."),
    ] = None,
    threat: Annotated[
        list[str] | None,
        typer.Option("--threat", help="Linf@8/255, L2@0.5, ... Repeatable. Default: the model's, else the data set's."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set's name, folder:PATH or npz:PATH. Default: the one the model was trained on."),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            help=f"How many test examples (default {answering.DEFAULT_EXAMPLES:,}): a prefix of a fixed shuffle.",
        ),
    ] = None,
    all_examples: Annotated[bool, typer.Option("--all", help="The whole test split.")] = False,
    split: Annotated[
        str,
        typer.Option(help="test, validation, or train: of the last two no number is one to publish as robustness."),
    ] = "test",
    until: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTH",
            help="1% or 0.01: draw the examples in random order and stop when the 95 % interval of the robust accuracy "
            "on all of them, valid at any stopping, is no wider than this from end to end.",
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Stop after so long, counted from the first attack on; unfinished questions get partial records that "
            "never rank, and the exit status is 4. The same command goes on."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the attacks' random numbers, and of the order of --until.")] = 0,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Right where the label is among so many.")] = 1,
    votes: Annotated[
        int, typer.Option(min=1, help="Forward passes that vote for one prediction: for models that are random.")
    ] = 1,
    sigma: Annotated[
        float,
        typer.Option(
            min=0,
            help="Noise (standard deviation) that smooths the model: added before each vote, certified with, and taken "
            "over by attacks on smoothed models that do not say their own.",
        ),
    ] = 0.0,
    repeats: Annotated[
        int, typer.Option(min=1, max=62, help="Decisions on each adversarial image: the model's own randomness.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; compute nothing.")] = False,
    save_adversarials: Annotated[
        bool, typer.Option("--save-adversarials", help="Keep the adversarial images (reports/adversarials/).")
    ] = False,
    device: DeviceOption = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the search: fp32, tf32, bf16 or fp64. Success is judged in fp32 or fp64.")
    ] = "fp32",
    compile_search: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Search, and sample certificates, through torch.compile. Made for CUDA; on a CPU it does not pay "
            "(ResNet-18 0.9 times as fast, LeNet-5 half as fast, and half a minute "
            "and more to compile). Rounds differently, as another device does.",
        ),
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: found by trial. Changes no answer.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Examples between two savings of progress. Changes no answer.")
    ] = None,
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Attack or certify a model and write one record per answer; what is known already is not computed again.

    Example: robench eval --model mnist-pgd --suite baseline --all
    """
    from robench.store import Store

    place = Workspace.locate(workspace, data_root)
    if examples is not None and all_examples:
        raise UserError("--examples and --all exclude each other; give one of them")
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"--max-seconds {max_seconds:g} leaves no time; give a number above 0")
    if precision not in get_args(Precision):
        raise UserError(f"--precision {precision!r} is unknown; write {', '.join(get_args(Precision))}")
    splits = get_args(Examples.model_fields["split"].annotation)
    if split not in splits:
        raise UserError(f"--split {split!r} is unknown; write {', '.join(splits)}")
    threats = [ThreatModel.parse(text) for text in threat or ()]
    attacks = list(attack or ())
    asked = attacks or certificate
    chosen = planning.load_suite(suite or planning.DEFAULT_SUITE) if suite or not asked else None
    certificates = [*(chosen.certificates if chosen else ()), *(certificate or ())]
    only = not attacks and not (chosen and chosen.has_attacks)
    idle = {
        "--threat": bool(threats),
        "--compile": compile_search and not any(map(certifying.takes_noise, certificates)),
        "--until": until is not None,
        "--max-seconds": max_seconds is not None,
        "--save-adversarials": save_adversarials,
        "--top-k": top_k > 1,
        "--votes": votes > 1,
        "--repeats": repeats > 1,
        "--backend": backend != NATIVE,
    }
    certifying.check(certificates, sigma=sigma, idle=idle if only else {})
    for text in attacks:
        planning.attack_settings(text)
    by_default = examples is None and not all_examples
    options = answering.Options(
        workspace=place,
        dataset=dataset,
        examples=answering.DEFAULT_EXAMPLES if by_default else examples,
        examples_by_default=by_default,
        split=cast("Split", split),
        threats=threats,
        attacks=attacks,
        seed=seed,
        precision=cast(Precision, precision),
        device=device,
        decision=Decision(top_k=top_k, votes=votes, sigma=sigma, repeats=repeats),
        until=None if until is None else interval_width(until),
        suite=chosen,
        backend=backend,
    )
    jobs = [answering.prepare(name, options) for name in model]
    store = Store(place.reports)
    questions = planned(jobs, store, device, save_adversarials=save_adversarials)
    guarantees = [(job, certifying.questions(job, certificates, options, sigma=sigma)) for job in jobs]
    _warn_of_single_copies(questions)
    if dry_run:
        _print_plan(questions, certifying.plan_rows(guarantees, store), json_output=json_output)
        return
    how = answering.Manner(
        batch_size=batch_size,
        shard_size=shard_size,
        save_adversarials=save_adversarials,
        quiet=json_output,
        deadline=Deadline(max_seconds) if max_seconds else None,
        outlook=_outlook(questions),
        compile_search=compile_search,
    )
    records = [r for job in jobs for r in answering.run(job, options, store, how)]
    certified = [r for job, specs in guarantees for r in certifying.run(job, specs, options, store, how)]
    _print_records(records, certified, json_output=json_output)
    unfinished = len(questions) - sum(r.status == "complete" for r in records)
    if unfinished and how.deadline:
        told = f"the {max_seconds:g} seconds are over and {unfinished} of {len(questions)} evaluations unfinished; "
        told += _without_progress(questions, records, how.deadline) or "the same command goes on from there"
        raise Unfinished(told)


def _without_progress(questions: Sequence[Planned], records: Sequence[EvalRecord], deadline: Deadline) -> str | None:
    """Return what to do where the whole time was too short for a single image, so that asking again would not help."""
    if deadline.answered:
        return None
    complete = {record.spec.identity for record in records if record.status == "complete"}
    first = next(q for q in questions if q.spec.identity not in complete)
    least = 2 * deadline.seconds
    expected = ""
    if deadline.passes:
        least = max(deadline.seconds, deadline.seconds / deadline.passes * first.calls_per_example)
        expected = f", about {least:.3g} s at most by its passes"
    return (
        f"not one image was answered, because {first.spec.attack.title} on {first.spec.model.id} takes longer for one "
        f"than all of the time{expected}; give --max-seconds {math.ceil(1.25 * least)} or more"
    )


def _warn_of_single_copies(questions: Sequence[Planned]) -> None:
    for attack in {q.spec.attack.name: q.spec.attack for q in questions}.values():
        if planning.is_weak_estimate(attack):
            print(
                f"robench: {attack.name} follows one noisy copy of each image, a weak estimate of what the smoothed "
                f"model does; write {attack.entry}:copies=25 and --votes",
                file=sys.stderr,
            )


def interval_width(text: str) -> float:
    """Read a width, `1%` or `0.01`, as a share; raise UserError unless it is above 0 and below 1."""
    try:
        share = exact_fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--until {text!r} is no width; write 1% or 0.01") from None
    if not 0 < share < 1:
        raise UserError(f"--until {text!r}: a width lies between 0 and 100 %; write 1% or 0.01")
    return float(share)


@dataclass(frozen=True)
class Planned:
    """A question, what there is of its answer, and the most that the rest will cost."""

    spec: EvalSpec
    status: str
    """`known`, `follows from IDENTITY`, `new` or `begun (EXAMPLES)`."""
    cost: planning.Estimate
    passes_per_example: float
    """At most, forward and backward passes counted alike."""
    calls_per_example: float
    """At most, of the model: a gradient is one."""


def planned(
    jobs: Sequence[answering.Job], store: Store, device: str, *, save_adversarials: bool = False
) -> list[Planned]:
    """Return all questions with their costs, going by what was measured on this kind of device before.

    With `save_adversarials` an answer counts as known only if its images are there, too.
    """
    try:
        earlier = [stored.record for stored in store.records()]
    except UserError:
        earlier = []  # a damaged record is named where it counts; here it would only have informed a guess
    devices = {
        record.provenance.device
        for record in earlier
        if ("cuda" in device) == ("cuda" in record.provenance.device.lower())
    }
    found = []
    for classes, spec in [(len(job.images.classes), spec) for job in jobs for spec in job.specs]:
        status, done = _status(spec, store, images=save_adversarials)
        costs = [planning.estimate(spec, earlier, name, classes=classes, done=done) for name in [*sorted(devices), ""]]
        cost = next((c for c in costs if c.seconds is not None), costs[-1])
        whole = planning.estimate(spec, [], "", classes=classes)
        calls = (whole.gradient_passes + whole.queries) / spec.examples.count
        passes = calls + whole.gradient_passes / spec.examples.count
        found.append(Planned(spec, status, cost, passes, calls))
    return found


def _status(spec: EvalSpec, store: Store, *, images: bool) -> tuple[str, int]:
    """Return what there is of an answer (with its `images`, if they are wanted), and to how many examples it is one."""
    from robench.evaluation.deriving import origin_of

    if not images or answering.is_saved(spec, store, misclassified=False):
        if store.find(spec) is not None:
            return "known", spec.examples.count
        if origin := origin_of(spec, store):
            return f"follows from {origin.spec.identity}", spec.examples.count
    begun = store.journal_size(planning.journal_key(spec))
    return (f"begun ({begun})" if begun else "new"), begun


def _outlook(questions: Sequence[Planned]) -> Outlook:
    """Return what is to be computed, with a line that says so."""
    from robench.cli.progress import Outlook
    from robench.findings import probe_work
    from robench.reporting.formatting import duration

    rest = [q for q in questions if q.status.startswith(("new", "begun"))]
    parts = [
        f"{len(rest)} evaluation{'' if len(rest) == 1 else 's'} to compute",
        f"at most {sum(q.cost.gradient_passes for q in rest):,} gradient passes",
    ]
    if queries := sum(q.cost.queries for q in rest):
        parts.append(f"{queries:,} queries")
    work = {key: (gradients, asked) for key, gradients, asked in (probe_work(q.spec) for q in rest)}
    if work:
        parts.append(f"{sum(gradients for gradients, _ in work.values()):,} more for the diagnostics")
    probes = {key: 2.0 * gradients + asked for key, (gradients, asked) in work.items()}
    seconds = [q.cost.seconds for q in rest if q.cost.seconds is not None]
    if rest and len(seconds) == len(rest):
        passes = sum(2 * q.cost.gradient_passes + q.cost.queries for q in rest)
        share = 1 + sum(probes.values()) / passes if passes else 1.0
        parts.append(f"{duration(share * sum(seconds))} (going by earlier ones)")
    return Outlook(((q.spec, q.passes_per_example) for q in rest), ", ".join(parts), probes=probes)


def _print_plan(questions: Sequence[Planned], guarantees: Sequence[Mapping[str, Any]], *, json_output: bool) -> None:
    rows = [
        {
            "identity": q.spec.identity,
            "model": q.spec.model.id,
            "dataset": q.spec.examples.dataset,
            "examples": q.spec.examples.count,
            "until": q.spec.until,
            "threat": str(q.spec.threat),
            "attack": q.spec.attack.title,
            "decision": q.spec.decision.model_dump(mode="json"),
            "backend": q.spec.attack.backend,
            "parameters": q.spec.attack.parameters,
            "seed": q.spec.seed,
            "precision": q.spec.precision,
            "status": q.status,
            "gradient passes at most": q.cost.gradient_passes,
            "queries at most": q.cost.queries,
            "seconds at most": q.cost.seconds if q.status.startswith(("new", "begun")) else 0.0,
        }
        for q in questions
    ]
    if json_output:
        print_json([*rows, *guarantees])
        return
    certifying.print_plan(guarantees)
    if not rows:
        return
    wanted = ("model", "dataset", "examples", "until", "threat", "attack", "status")
    shown = [name for name in wanted if name != "until" or any(row["until"] for row in rows)]
    shown += ["gradient passes at most", *(["queries at most"] if any(row["queries at most"] for row in rows) else [])]
    shown.append("seconds at most")
    cells = [[_cell(row[c]) for c in shown] for row in rows]
    for line, q in zip(cells, questions, strict=True):
        line[shown.index("attack")] = _asked(q.spec)
        if "until" in shown:
            line[shown.index("until")] = "-" if q.spec.until is None else f"{100 * q.spec.until:g} %"
    print_table(shown, cells, title="Plan (nothing was computed)")


def _cell(value: Any) -> str:
    if value is None:
        return "unknown until measured"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _asked(spec: EvalSpec) -> str:
    """Return the attack with the rule of deciding, where that is not one pass and the largest logit."""
    from robench.leaderboards.robustness import rule

    return ", ".join([spec.attack.title, *(part.replace("-", " ") for part in rule(spec.decision))])


def _robust(record: EvalRecord) -> str:
    """Return the robust accuracy with the interval that holds: of a sequential evaluation that of its sequence."""
    if record.sequence is None:
        return percent(record.robust)
    low, high = record.sequence.low, record.sequence.high
    return f"{100 * record.robust.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _print_records(records: Sequence[EvalRecord], certified: Sequence[CertificateRecord], *, json_output: bool) -> None:
    if json_output:
        answers: list[EvalRecord | CertificateRecord] = [*records, *certified]
        print_json([{"identity": r.spec.identity, **r.model_dump(mode="json")} for r in answers])
        return
    certifying.print_records(certified)
    if not records:
        return
    columns = ["model", "threat", "attack", f"{records[0].spec.examples.split} examples", "clean", "robust", "record"]
    rows = []
    for record in records:
        spec = record.spec
        of = f"{spec.examples.count:,} of {spec.examples.split_size:,}"
        if record.robust.n < spec.examples.count:
            of = f"{record.robust.n:,} {'drawn' if record.status == 'complete' else 'answered'} of {of}"
        shares = [percent(record.clean), _robust(record)]
        rows.append([spec.model.id, str(spec.threat), _asked(spec), of, *shares, spec.identity])
    if any(record.clean_top5 for record in records):
        columns.insert(5, "clean top-5")
        for row, record in zip(rows, records, strict=True):
            row.insert(5, percent(record.clean_top5) if record.clean_top5 else "-")
    print_table(columns, rows)
    partial = [r for r in records if r.spec.examples.count < r.spec.examples.split_size]
    if partial:
        print(f"not the whole {partial[0].spec.examples.split} split: add --all for the number to publish")

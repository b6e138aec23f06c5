"""`robench eval`: attack a model, write records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from robench import planning
from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    command_line,
    percent,
    print_json,
    print_table,
    resolve_device,
)
from robench.errors import UserError
from robench.records import PLAIN, Decision, EvalRecord, EvalSpec, ModelCard, ModelIdentity, Precision
from robench.registry import find_card, identity_of, is_reference
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

if TYPE_CHECKING:
    from robench.checkpoints import LoadedModel
    from robench.datasets import ImageSet
    from robench.store import Store

#: Without --examples or --all: enough for a two-digit answer, said in the output and in every record.
_DEFAULT_EXAMPLES = 1000

#: What models from these places classify unless --dataset says otherwise.
_EXPECTED_DATA = {"torchvision": "imagenet", "timm": "imagenet"}


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
            help=f"How many test examples (default {_DEFAULT_EXAMPLES:,}): a prefix of a fixed shuffle.",
        ),
    ] = None,
    all_examples: Annotated[bool, typer.Option("--all", help="The whole test split.")] = False,
    seed: Annotated[int, typer.Option(help="Of the attacks' random numbers.")] = 0,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Right where the label is among so many.")] = 1,
    votes: Annotated[
        int, typer.Option(min=1, help="Forward passes that vote for one prediction: for models that are random.")
    ] = 1,
    sigma: Annotated[
        float, typer.Option(min=0, help="Noise (standard deviation) that is added before each vote: smoothed models.")
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
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: found by trial. Changes no answer.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Examples between two savings of progress. Changes no answer.")
    ] = None,
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Attack a model and write one record per attack; what is known already is not computed again.

    Example: robench eval --model mnist-pgd --suite baseline --all
    """
    from robench.store import Store

    place = Workspace.locate(workspace, data_root)
    if examples is not None and all_examples:
        raise UserError("--examples and --all exclude each other; give one of them")
    if precision not in get_args(Precision):
        raise UserError(f"--precision {precision!r} is unknown; write {', '.join(get_args(Precision))}")
    threats = [ThreatModel.parse(text) for text in threat or ()]
    attacks = list(attack or ())
    if suite or not attacks:
        attacks = [*planning.load_suite(suite or planning.DEFAULT_SUITE).attacks, *attacks]
    for text in attacks:
        planning.attack_settings(text)
    by_default = examples is None and not all_examples
    options = Options(
        workspace=place,
        dataset=dataset,
        examples=_DEFAULT_EXAMPLES if by_default else examples,
        examples_by_default=by_default,
        threats=threats,
        attacks=attacks,
        seed=seed,
        precision=cast(Precision, precision),
        device=device,
        decision=Decision(top_k=top_k, votes=votes, sigma=sigma, repeats=repeats),
    )
    jobs = [prepare(name, options) for name in model]
    store = Store(place.reports)
    if dry_run:
        _print_plan(jobs, store, device, json_output=json_output)
        return
    records = [
        r
        for job in jobs
        for r in run(
            job,
            options,
            store,
            batch_size=batch_size,
            shard_size=shard_size,
            save_adversarials=save_adversarials,
            quiet=json_output,
        )
    ]
    _print_records(records, json_output=json_output)


@dataclass(frozen=True)
class Options:
    """What was asked, checked, before any model is looked at."""

    workspace: Workspace
    dataset: str | None
    examples: int | None
    examples_by_default: bool
    threats: Sequence[ThreatModel]
    attacks: Sequence[str]
    seed: int
    precision: Precision
    device: str
    decision: Decision = PLAIN


@dataclass(frozen=True)
class Job:
    """The questions about one model."""

    identity: ModelIdentity
    card: ModelCard | None
    dataset: str
    """As it was typed, so that other splits can be opened."""
    images: ImageSet
    ids: Any
    specs: list[EvalSpec]
    loaded: LoadedModel | None
    """Models that are not in the registry are loaded to know their identity."""


def prepare(name: str, options: Options) -> Job:
    """Find the model and the data, and plan; registered models cost no torch here."""
    from robench.datasets import dataset_facts, open_split, select_examples

    card = None if is_reference(name) else find_card(name, options.workspace)[1]
    dataset = options.dataset or (card.dataset if card else _EXPECTED_DATA.get(name.partition(":")[0]))
    if dataset is None:
        raise UserError(f"--model {name} says not what it classifies; add --dataset NAME, folder:PATH or npz:PATH")
    facts = dataset_facts(dataset, options.workspace)
    images = open_split(dataset, "test", options.workspace)
    loaded: LoadedModel | None = None
    if card is None:
        loaded = _load(name, images, options)
    count = options.examples
    if options.examples_by_default and count is not None:
        count = min(count, len(images))
    chosen, ids = select_examples(images, dataset=dataset, split="test", count=count)
    threats = list(options.threats) or [card.threat if card and card.threat else ThreatModel.parse(facts.threats[0])]
    identity = identity_of(card) if card else loaded.identity  # type: ignore[union-attr]
    request = planning.Request(
        identity, chosen, threats, options.attacks, options.seed, options.precision, options.decision
    )
    return Job(identity, card, dataset, images, ids, planning.plan(request), loaded)


def _load(name: str, images: ImageSet, options: Options) -> LoadedModel:
    from robench.checkpoints import load_model

    return load_model(
        name,
        options.workspace,
        device=resolve_device(options.device),
        input_shape=images.image_shape,
        num_classes=len(images.classes),
    )


def run(
    job: Job,
    options: Options,
    store: Store,
    *,
    batch_size: int | None = None,
    shard_size: int | None = None,
    save_adversarials: bool = False,
    quiet: bool = False,
) -> list[EvalRecord]:
    """Answer a job's questions; torch is imported only if something is to be computed."""
    known = [store.find(spec) for spec in job.specs]
    if all(known) and not save_adversarials:
        return [record for record in known if record is not None]
    import torch

    from robench.cli.progress import Bars, EvaluationBar
    from robench.datasets import open_split
    from robench.evaluation.campaign import Campaign, Execution
    from robench.preflight import preflight
    from robench.provenance import provenance

    device = resolve_device(options.device)
    store.check_writable()
    loaded = job.loaded or _load(job.identity.id, job.images, options)
    first = job.ids[:256]
    images = torch.from_numpy(job.images.read(first)).to(device).float() / 255
    labels = torch.from_numpy(job.images.labels[first]).to(device)
    preflight(
        loaded.model,
        images,
        labels,
        card_accuracy=job.card.clean_accuracy if job.card else None,
        losses={str(spec.attack.parameters["loss"]) for spec in job.specs if "loss" in spec.attack.parameters},
        decision=job.specs[0].decision,
    )
    execution = Execution(
        device=device,
        provenance=lambda: provenance(device, command_line()),
        batch_size=batch_size,
        shard_size=shard_size,
        save_adversarials=save_adversarials,
        training=lambda: open_split(job.dataset, "train", options.workspace),
    )
    with Bars(quiet=quiet) as bars:
        campaign = Campaign(loaded.model, job.images, store=store, execution=execution, progress=EvaluationBar(bars))
        return campaign.answer(job.specs, job.ids)


def _print_plan(jobs: Sequence[Job], store: Store, device: str, *, json_output: bool) -> None:
    earlier = [stored.record for stored in store.records()]
    devices = {
        record.provenance.device
        for record in earlier
        if ("cuda" in device) == ("cuda" in record.provenance.device.lower())
    }
    rows = []
    for spec in (spec for job in jobs for spec in job.specs):
        costs = [planning.estimate(spec, earlier, name) for name in sorted(devices)] or [
            planning.estimate(spec, [], "")
        ]
        seconds = next((c.seconds for c in costs if c.seconds is not None), None)
        known, begun = store.find(spec) is not None, store.journal_size(planning.journal_key(spec))
        rows.append(
            {
                "identity": spec.identity,
                "model": spec.model.id,
                "dataset": spec.examples.dataset,
                "examples": spec.examples.count,
                "threat": str(spec.threat),
                "attack": spec.attack.name,
                "parameters": spec.attack.parameters,
                "seed": spec.seed,
                "precision": spec.precision,
                "status": "known" if known else f"begun ({begun})" if begun else "new",
                "gradient passes at most": 0 if known else costs[0].gradient_passes,
                "seconds at most": 0.0 if known else seconds,
            }
        )
    if json_output:
        print_json(rows)
        return
    shown = [
        "model",
        "dataset",
        "examples",
        "threat",
        "attack",
        "status",
        "gradient passes at most",
        "seconds at most",
    ]
    cells = [[_cell(row[c]) for c in shown] for row in rows]
    print_table(shown, cells, title="Plan (nothing was computed)")


def _cell(value: Any) -> str:
    if value is None:
        return "unknown until measured"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _print_records(records: Sequence[EvalRecord], *, json_output: bool) -> None:
    if json_output:
        print_json([{"identity": r.spec.identity, **r.model_dump(mode="json")} for r in records])
        return
    columns = ["model", "threat", "attack", "test examples", "clean", "robust", "record"]
    rows = []
    for record in records:
        spec = record.spec
        of = f"{spec.examples.count:,} of {spec.examples.split_size:,}"
        shares = [percent(record.clean), percent(record.robust)]
        rows.append([spec.model.id, str(spec.threat), spec.attack.name, of, *shares, spec.identity])
    if any(record.clean_top5 for record in records):
        columns.insert(5, "clean top-5")
        for row, record in zip(rows, records, strict=True):
            row.insert(5, percent(record.clean_top5) if record.clean_top5 else "-")
    print_table(columns, rows)
    partial = [r for r in records if r.spec.examples.count < r.spec.examples.split_size]
    if partial:
        print("not the whole test split: add --all for the number to publish")

"""`robench transfer`: images that fool one model, shown to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from robench import planning
from robench.cli import answering, ranking
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
from robench.records import EvalRecord, EvalSpec, ModelIdentity, Precision, TransferRecord, TransferSpec
from robench.store import Store
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

if TYPE_CHECKING:
    from robench.classifier import Classifier

#: It walks all steps: an image that only just fools its source rarely fools another model.
_DEFAULT_ATTACK = "pgd-40:stop_when_broken=false"

#: How a source makes its images: other models are shown those of examples that it misclassifies, too.
MAKING = answering.Manner(save_adversarials=True, attack_misclassified=True)


def transfer(
    model: Annotated[
        list[str],
        typer.Option("--model", help="Makes images and classifies those of all others; as in robench eval. Repeat it."),
    ],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Makes images and classifies none: a twin trained with another seed, say. Repeatable.",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", help=f"One matrix for each. Default: {_DEFAULT_ATTACK}, which walks all its steps."),
    ] = None,
    threat: Annotated[
        list[str] | None,
        typer.Option("--threat", help="Linf@8/255, L2@0.5, ... One matrix for each. Default: the data set's."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set's name, folder:PATH or npz:PATH. Default: the first model's."),
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", help="How many test examples (default 1,000), as in robench eval.")
    ] = None,
    all_examples: Annotated[bool, typer.Option("--all", help="The whole test split.")] = False,
    seed: Annotated[int, typer.Option(help="Of the attacks' random numbers.")] = 0,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="Of the search: fp32, tf32, bf16 or fp64.")] = "fp32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: found by trial. Changes no answer.")] = None,
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make adversarial images on every model, let every model classify them, write table and heat map.

    What is known is not computed again, so a model can be added later. Off the diagonal the attack has not seen the
    model that it is to fool. Example: robench transfer --model mnist-standard --model mnist-pgd --examples 1000
    """
    if precision not in get_args(Precision):
        raise UserError(f"--precision {precision!r} is unknown; write {', '.join(get_args(Precision))}")
    if examples is not None and all_examples:
        raise UserError("--examples and --all exclude each other; give one of them")
    attacks = list(attack or [_DEFAULT_ATTACK])
    for text in attacks:
        planning.attack_settings(text)
    options = answering.Options(
        workspace=Workspace.locate(workspace, data_root),
        dataset=dataset,
        examples=answering.DEFAULT_EXAMPLES if examples is None and not all_examples else examples,
        examples_by_default=examples is None and not all_examples,
        threats=[ThreatModel.parse(text) for text in threat or ()],
        attacks=attacks,
        seed=seed,
        precision=cast(Precision, precision),
        device=device,
    )
    names = list(dict.fromkeys([*model, *(source or ())]))
    jobs = answering.prepare_together(names, options)
    store = Store(options.workspace.reports)
    targets = jobs[: len(dict.fromkeys(model))]
    pairs = [(target.identity.id, job.identity.id) for target in targets for job in jobs]
    entries = fill(
        {job.identity.id: job for job in jobs},
        pairs,
        options=options,
        store=store,
        batch_size=batch_size,
        quiet=json_output,
    )
    found = [record for entry in entries if (record := store.find_transfer(entry))]
    if json_output:
        print_json([{"identity": r.spec.identity, **r.model_dump(mode="json")} for r in found])
        return
    _print_matrices(found)
    _print_hints([spec for job in jobs for spec in job.specs])
    ranking.leaderboard(None, workspace=options.workspace.root)


def fill(
    jobs: Mapping[str, answering.Job],
    pairs: Sequence[tuple[str, str]],
    *,
    options: answering.Options,
    store: Store,
    batch_size: int | None = None,
    quiet: bool = False,
) -> list[TransferSpec]:
    """Make and classify what is missing of these pairs (target, source); return the questions of all of them.

    `jobs` are the models by name, all planned with the same `options`.
    """
    entries = questions(jobs, pairs)
    missing = [entry for entry in entries if not is_answered(entry, store)]
    if not missing:
        return entries
    how = replace(MAKING, batch_size=batch_size, quiet=quiet)
    needed = [job for job in jobs.values() if any(entry.source in job.specs for entry in missing)]
    made = [record for job in needed for record in answering.run(job, options, store, how)]
    targets = [job for job in jobs.values() if any(entry.target == job.identity for entry in missing)]
    _classify(targets, list(jobs.values()), made, options=options, store=store)
    return entries


def questions(jobs: Mapping[str, answering.Job], pairs: Sequence[tuple[str, str]]) -> list[TransferSpec]:
    """Return the questions of these pairs (target, source) of models that are planned."""
    return [
        TransferSpec(source=spec, target=jobs[target].identity)
        for target, source in pairs
        for spec in jobs[source].specs
    ]


def is_answered(entry: TransferSpec, store: Store) -> bool:
    """Tell whether :func:`fill` computes nothing for a question."""
    return store.find_transfer(entry) is not None


def _classify(
    targets: Sequence[answering.Job],
    jobs: Sequence[answering.Job],
    made: Sequence[EvalRecord],
    *,
    options: answering.Options,
    store: Store,
) -> None:
    """Let every target classify the images of the records that were made, and store what it answers."""
    from robench.evaluation.second_look import Bench
    from robench.evaluation.transfer import fill_matrix
    from robench.provenance import provenance

    device = resolve_device(options.device)

    def load(identity: ModelIdentity) -> Classifier:
        return answering.loaded_model(next(job for job in jobs if job.identity == identity), options)

    entries = fill_matrix(
        made,
        [job.identity for job in targets],
        bench=Bench(load, device),
        images=jobs[0].images,
        store=store,
        provenance=lambda: provenance(device, command_line()),
    )
    for _ in entries:  # each is stored when it is made
        continue


def _print_matrices(found: Sequence[TransferRecord]) -> None:
    """Print one table per attack and threat model: targets below each other, sources side by side."""
    questions = {(r.spec.source.attack.title, str(r.spec.source.threat)): r.spec.source.examples for r in found}
    for (attack, threat), examples in questions.items():
        own = [r for r in found if (r.spec.source.attack.title, str(r.spec.source.threat)) == (attack, threat)]
        sources = list(dict.fromkeys(r.spec.source.model.id for r in own))
        entries = {(r.spec.target.id, r.spec.source.model.id): r for r in own}
        rows = []
        for target in dict.fromkeys(r.spec.target.id for r in own):
            shares = [entries[target, source].robust for source in sources]
            rows.append([target, percent(entries[target, sources[0]].clean), *map(percent, shares)])
        print_table(
            ["accuracy of", "clean", *(f"on images of {source}" for source in sources)],
            rows,
            title=f"{examples.dataset}, {examples.count:,} of {examples.split_size:,} test images, {attack}, {threat}",
        )


def _print_hints(sources: Sequence[EvalSpec]) -> None:
    """Say what makes a matrix weaker than it could be."""
    early = {spec.attack.title for spec in sources if spec.attack.parameters.get("stop_when_broken")}
    for name in sorted(early):
        print(
            f"{name} stops at the first image that fools its source, which rarely fools another model; "
            "add stop_when_broken=false for stronger transfer"
        )
    if any(spec.examples.count < spec.examples.split_size for spec in sources):
        print("not the whole test split: add --all for the number to publish")

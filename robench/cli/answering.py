"""Questions about models, prepared and answered: what every command that evaluates is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from robench import planning
from robench.backends import NATIVE
from robench.cli.options import command_line, resolve_device
from robench.errors import UserError
from robench.evaluation.deadline import Deadline
from robench.records import PLAIN, Decision, EvalRecord, EvalSpec, Examples, ModelCard, ModelIdentity, Precision
from robench.registry import find_card, identity_of, is_reference
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

if TYPE_CHECKING:
    from robench.checkpoints import LoadedModel
    from robench.classifier import Classifier
    from robench.cli.progress import Outlook
    from robench.datasets import ImageSet, Split
    from robench.store import Store

#: Without --examples or --all: enough for a two-digit answer, said in the output and in every record.
DEFAULT_EXAMPLES = 1000

#: What models from these places classify unless --dataset says otherwise.
_EXPECTED_DATA = {"torchvision": "imagenet", "timm": "imagenet"}


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
    split: Split = "test"
    decision: Decision = PLAIN
    until: float | None = None
    suite: planning.Suite | None = None
    backend: str = NATIVE


@dataclass(frozen=True)
class Manner:
    """How it is to be computed; nothing in here changes an answer by more than rounding does."""

    batch_size: int | None = None
    shard_size: int | None = None
    save_adversarials: bool = False
    attack_misclassified: bool = False
    """Save for examples that are wrong without an attack, too, what the attack makes of them."""
    quiet: bool = False
    deadline: Deadline | None = None
    outlook: Outlook | None = None
    compile_search: bool = False


@dataclass(frozen=True)
class Job:
    """The questions about one model."""

    identity: ModelIdentity
    card: ModelCard | None
    dataset: str
    """As it was typed, so that other splits can be opened."""
    images: ImageSet
    examples: Examples
    ids: Any
    specs: list[EvalSpec]
    loaded: LoadedModel | None
    """Models that are not in the registry are loaded to know their identity."""


def prepare(name: str, options: Options) -> Job:
    """Find the model and the data, and plan; registered models cost no torch here."""
    from robench.datasets import dataset_facts, open_split, select_examples

    card, dataset = _card_and_dataset(name, options)
    facts = dataset_facts(dataset, options.workspace)
    threats = list(options.threats) or [card.threat if card and card.threat else ThreatModel.parse(facts.threats[0])]
    for threat in threats:
        for text in options.attacks:  # before anything is loaded
            planning.identify_attack(text, threat, options.decision, backend=options.backend)
    images = open_split(dataset, options.split, options.workspace)
    if options.decision.top_k >= len(images.classes):
        raise UserError(
            f"--top-k {options.decision.top_k}: of the {len(images.classes)} classes of {dataset} none would be wrong; "
            f"write {len(images.classes) - 1} at most"
        )
    loaded: LoadedModel | None = None
    if card is None:
        loaded = _load(name, images, options)
    count = options.examples
    if options.examples_by_default and count is not None:
        count = min(count, len(images))
    chosen, ids = select_examples(images, dataset=dataset, split=options.split, count=count)
    identity = identity_of(card) if card else loaded.identity  # type: ignore[union-attr]
    request = planning.Request(
        model=identity,
        examples=chosen,
        threats=threats,
        attacks=options.attacks,
        seed=options.seed,
        precision=options.precision,
        decision=options.decision,
        until=options.until,
        suite=options.suite,
        backend=options.backend,
    )
    return Job(identity, card, dataset, images, chosen, ids, planning.plan(request), loaded)


def prepare_together(names: Sequence[str], options: Options) -> list[Job]:
    """Plan the same questions for several models: without --dataset and --threat those of the first model's data.

    Raises UserError for models that were trained on other data than the first.
    """
    from robench.datasets import dataset_facts

    dataset = _card_and_dataset(names[0], options)[1]
    for name in names[1:]:
        if (other := _card_and_dataset(name, options)[1]) != dataset:
            raise UserError(f"--model {name} classifies {other}, {names[0]} {dataset}; name models of the same data")
    facts = dataset_facts(dataset, options.workspace)
    threats = list(options.threats) or [ThreatModel.parse(facts.threats[0])]
    return [prepare(name, replace(options, dataset=dataset, threats=threats)) for name in names]


def _card_and_dataset(name: str, options: Options) -> tuple[ModelCard | None, str]:
    """Return a model's card, None for models from elsewhere, and the data set that it is evaluated on."""
    card = None if is_reference(name) else find_card(name, options.workspace)[1]
    dataset = options.dataset or (card.dataset if card else _EXPECTED_DATA.get(name.partition(":")[0]))
    if dataset is None:
        raise UserError(f"--model {name} says not what it classifies; add --dataset NAME, folder:PATH or npz:PATH")
    return card, dataset


def loaded_model(job: Job, options: Options) -> Classifier:
    """Return a job's model on the device."""
    return (job.loaded or _load(job.identity.id, job.images, options)).model


def _load(name: str, images: ImageSet, options: Options) -> LoadedModel:
    from robench.checkpoints import load_model

    return load_model(
        name,
        options.workspace,
        device=resolve_device(options.device),
        input_shape=images.image_shape,
        num_classes=len(images.classes),
    )


def run(job: Job, options: Options, store: Store, how: Manner = Manner()) -> list[EvalRecord]:
    """Answer a job's questions; torch is imported only if something is to be computed."""
    known = [_known(spec, job, store, how) for spec in job.specs]
    out_of_time = how.deadline is not None and how.deadline.passed
    if (all(known) and all(_has_images(spec, store, how) for spec in job.specs)) or out_of_time:
        return [record for record in known if record is not None]
    from robench.cli.progress import Bars, EvaluationBar
    from robench.datasets import open_split
    from robench.evaluation.campaign import Campaign, Execution
    from robench.provenance import provenance

    device = resolve_device(options.device)
    store.check_writable()
    model = checked_model(job, options)
    execution = Execution(
        device=device,
        provenance=lambda: provenance(device, command_line(), compiled=how.compile_search),
        batch_size=how.batch_size,
        shard_size=how.shard_size,
        save_adversarials=how.save_adversarials,
        attack_misclassified=how.attack_misclassified,
        training=lambda: open_split(job.dataset, "train", options.workspace),
        deadline=how.deadline,
        compile_search=how.compile_search,
    )
    if how.deadline:
        how.deadline.start()
    with Bars(quiet=how.quiet) as bars:
        progress = EvaluationBar(bars, how.outlook)
        campaign = Campaign(model, job.images, store=store, execution=execution, progress=progress)
        return campaign.answer(job.specs, job.ids)


def checked_model(job: Job, options: Options) -> Classifier:
    """Return a job's model on the device, after the preflight."""
    import torch

    from robench.preflight import preflight

    model = loaded_model(job, options)
    device, first = resolve_device(options.device), job.ids[:256]
    preflight(
        model,
        torch.from_numpy(job.images.read(first)).to(device).float() / 255,
        torch.from_numpy(job.images.labels[first]).to(device),
        card_accuracy=job.card.clean_accuracy if job.card else None,
        losses={str(spec.attack.parameters["loss"]) for spec in job.specs if "loss" in spec.attack.parameters},
        decision=options.decision,
    )
    return model


def is_answered(spec: EvalSpec, store: Store, how: Manner = Manner()) -> bool:
    """Tell whether :func:`run` computes nothing for a question; raise UnsafeFile where it would."""
    return answer_of(spec, store, how) is not None and _has_images(spec, store, how)


def answer_of(spec: EvalSpec, store: Store, how: Manner = Manner()) -> EvalRecord | None:
    """Return the record that answers a question: its own, or one at another epsilon that implies the answer.

    The latter has no images, so it is none where they are to be saved. Raises UnsafeFile for a record whose rows are
    gone, or say something else.
    """
    from robench.evaluation.deriving import origin_of

    record = store.find(spec)
    if record is not None:
        store.check(record)
        return record
    return None if how.save_adversarials else origin_of(spec, store)


def _known(spec: EvalSpec, job: Job, store: Store, how: Manner) -> EvalRecord | None:
    """Return a question's own record if it needs no search; one that another implies is stored."""
    record = answer_of(spec, store, how)
    return record if record is None or record.spec == spec else _derived(spec, job, store)


def is_saved(spec: EvalSpec, store: Store, *, misclassified: bool) -> bool:
    """Tell whether the adversarial images of an answer are there and whole."""
    from robench.evaluation.adversarials import AdversarialFiles

    return AdversarialFiles(store.root).has(spec, "attacked" if misclassified else "left")


def _has_images(spec: EvalSpec, store: Store, how: Manner) -> bool:
    """Tell whether the images of an answer are there, if they are to be."""
    return not how.save_adversarials or is_saved(spec, store, misclassified=how.attack_misclassified)


def _derived(spec: EvalSpec, job: Job, store: Store) -> EvalRecord | None:
    """Return the answer that a known one at another epsilon implies (minimum-norm attacks)."""
    from robench.evaluation.deriving import Occasion, derive

    def occasion() -> Occasion:
        return Occasion(command=command_line(), finished=datetime.now(UTC).isoformat(timespec="seconds"))

    return derive(spec, store, num_classes=len(job.images.classes), occasion=occasion)

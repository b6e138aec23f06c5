"""`robench time`: how long one image takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from robench import catalog
from robench.cli.options import (
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    command_line,
    print_json,
    print_table,
    resolve_device,
)
from robench.errors import UnknownName, UserError
from robench.workspace import Workspace

if TYPE_CHECKING:
    from robench.classifier import Classifier
    from robench.records import Configured

#: The smallest number of values whose median has a 95 % interval.
_FEWEST = 6


def time_subject(
    subject: Annotated[str, typer.Argument(help="A registered model, or an architecture: robench list architectures.")],
    copies: Annotated[int, typer.Option("--copies", help="Noisy copies that vote, beside one plain pass.")] = 100,
    sigma: Annotated[float, typer.Option("--sigma", help="Of their noise.")] = 0.25,
    queries: Annotated[int, typer.Option("--queries", help="Images, one after the other.")] = 100,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure the time to classify one image: by one forward pass, and by a vote of noisy copies.

    Example: robench time mnist-gaussian --copies 100
    """
    if copies < 2:
        raise UserError(f"--copies {copies}: a vote takes at least 2; one plain pass is measured anyway")
    if not 0 < sigma < float("inf"):
        raise UserError(f"--sigma {sigma:g}: the copies need noise; write --sigma 0.25")
    if queries < _FEWEST:
        raise UserError(f"--queries {queries}: below {_FEWEST} a median has no 95 % interval; write --queries 100")
    place = Workspace.locate(workspace)
    target = resolve_device(device)

    import numpy as np
    import torch

    from robench.checkpoints import load_card_model
    from robench.provenance import device_name, provenance
    from robench.records import TimingRecord, TimingSpec
    from robench.registry import cards
    from robench.reporting.formatting import duration
    from robench.store import Store
    from robench.timing import median_interval, time_queries

    known = cards(place)
    if subject in known:
        stored = known[subject]
        model, architecture = load_card_model(stored.card, stored.folder), stored.card.architecture
    elif subject in catalog.plugins("architectures"):
        model, architecture = _untrained(subject)
    else:
        raise UnknownName("model or architecture", subject, [*known, *catalog.plugins("architectures")])

    store = Store(place.reports)
    store.check_writable()
    taken = time_queries(model, copies=copies, sigma=sigma, queries=queries, device=target)
    records = []
    for count, seconds in taken.items():
        spec = TimingSpec(
            subject=subject,
            architecture=architecture,
            input_shape=model.input_shape,
            num_classes=model.num_classes,
            copies=count,
            sigma=sigma if count > 1 else 0.0,
            device=device_name(target),
            threads=torch.get_num_threads(),
        )
        median, low, high = median_interval(seconds)
        first, third = np.quantile(seconds, [0.25, 0.75])
        record = TimingRecord(
            spec=spec,
            queries=queries,
            median=median,
            low=low,
            high=high,
            quartiles=(float(first), float(third)),
            provenance=provenance(target, command_line()),
        )
        store.write_timing(record)
        records.append(record)
    if json_output:
        print_json([record.model_dump(mode="json") for record in records])
        return
    rows = [
        [
            "one pass" if r.spec.copies == 1 else f"vote of {r.spec.copies} noisy copies",
            duration(r.median),
            f"{duration(r.low)} to {duration(r.high)}",
            f"{duration(r.quartiles[0])} to {duration(r.quartiles[1])}",
            f"{r.median / records[0].median:.1f}x",
        ]
        for r in records
    ]
    title = (
        f"{subject}: {queries} images one after the other, {records[0].spec.device}, {records[0].spec.threads} threads"
    )
    print_table(["how", "median", "95 % interval", "quartiles", "of one pass"], rows, title=title)


def _untrained(name: str) -> tuple[Classifier, Configured]:
    """Return an architecture's network for the images of its publication, with random weights."""
    import torch

    from robench.checkpoints import build_classifier
    from robench.records import Configured

    plugin = catalog.find("architectures", name)
    facts = plugin.facts
    shape = facts.get("preset_shapes", {}).get(name, facts["input_shape"])
    architecture = Configured(name=name, parameters=plugin.settings())
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(architecture, num_classes=facts["num_classes"], input_shape=tuple(shape))
    return model, architecture

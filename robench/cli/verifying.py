"""`robench verify`: do saved adversarial images still do what their records say?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    print_json,
    print_table,
    resolve_device,
)
from robench.errors import UnknownName, UserError
from robench.records import EvalRecord
from robench.store import Store
from robench.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from robench.evaluation.second_look import Agreement


def verify(
    identity: Annotated[
        list[str] | None,
        typer.Argument(help="Identities of records, or their first digits. Default: all with saved images."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the record's model is, if its name alone does not say.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Where its data are: folder:PATH or npz:PATH. Default: what the record names.")
    ] = None,
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Classify saved adversarial images (robench eval --save-adversarials) again and compare with their records.

    Each image must be finite, in the box, in the ball, and misclassified exactly where the record says so.
    Example: robench verify 05806464eb94b963
    """
    from robench.evaluation.adversarials import AdversarialFiles

    place = Workspace.locate(workspace, data_root)
    store = Store(place.reports)
    records = [stored.record for stored in store.records() if stored.record.status == "complete"]
    if identity:
        chosen = [_find(text, records) for text in identity]
    else:
        files = AdversarialFiles(store.root)
        chosen = [record for record in records if files.path(record.spec).exists()]
    if not chosen:
        raise UserError(f"no record in {place.reports} has saved images; robench eval --save-adversarials saves them")
    where = resolve_device(device)
    found = [(record, _look_again(record, store, place, where, model=model, dataset=dataset)) for record in chosen]
    if json_output:
        print_json([{"identity": r.spec.identity, **asdict(a), "borderline": a.borderline} for r, a in found])
        return
    rows = [
        [r.spec.identity, r.spec.model.id, r.spec.attack.title, str(r.spec.threat), _verdict(agreement)]
        for r, agreement in found
    ]
    print_table(["record", "model", "attack", "threat", "saved images"], rows)


def _find(text: str, records: list[EvalRecord]) -> EvalRecord:
    found = [record for record in records if record.spec.identity.startswith(text)]
    if len(found) > 1:
        raise UserError(f"{len(found)} records begin with {text!r}; write more digits")
    if not found:
        raise UnknownName("record", text, [record.spec.identity for record in records])
    return found[0]


def _look_again(
    record: EvalRecord,
    store: Store,
    place: Workspace,
    device: torch.device,
    *,
    model: str | None,
    dataset: str | None,
) -> Agreement:
    from robench.checkpoints import load_model
    from robench.datasets import open_split
    from robench.evaluation import second_look
    from robench.evaluation.adversarials import AdversarialFiles

    spec = record.spec
    saved = AdversarialFiles(store.root).open(record)
    images = open_split(dataset or spec.examples.dataset, spec.examples.split, place)
    if images.sha256 != spec.examples.split_sha256:
        raise UserError(f"record {spec.identity} is of other data than {dataset or spec.examples.dataset} is now")
    loaded = load_model(
        model or spec.model.id, place, device=device, input_shape=images.image_shape, num_classes=len(images.classes)
    )
    if loaded.identity != spec.model:
        raise UserError(
            f"record {spec.identity} is of weights {spec.model.weights_sha256[:8]}, {loaded.identity.id} has "
            f"{loaded.identity.weights_sha256[:8]} now; name the former model with --model"
        )
    bench = second_look.Bench(lambda _: loaded.model, device)
    return second_look.verify(saved, record, store.outcomes(record), images=images, bench=bench)


def _verdict(agreement: Agreement) -> str:
    line = f"agrees on {agreement.agreeing:,} of {agreement.examples:,}"
    return f"{line}; the others lie on the boundary, within rounding" if agreement.borderline else line

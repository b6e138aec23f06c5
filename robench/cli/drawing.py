"""`robench covariance`, `robench regions` and `robench lines`: what a training has made, as a drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from robench.cli import answering
from robench.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    WorkspaceOption,
    command_line,
    print_json,
    resolve_device,
)
from robench.errors import UserError
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

#: Whose lines are drawn: enough to see what is usual.
_MOST_LINES = 8
#: Images that are attacked unless told otherwise.
_FEW = 100
#: It walks all steps: an image that only just fell shows half of the way.
_TO_THE_END = "pgd-40:stop_when_broken=false"


def covariance(
    model: Annotated[str, typer.Argument(help="A registered model that was trained with sgr.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The drawing, FILE.svg (default: reports/covariances/MODEL.svg).")
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw the covariance that SGR learned: a heat map of the matrix, or the function of the displacement; and as CSV.

    Example: robench covariance digits-sgr
    """
    from robench.registry import find_card
    from robench.reporting.covariance import covariance_csv, covariance_svg, read_covariance

    if out is not None and out.suffix != ".svg":
        raise UserError(f"--out {out}: the drawing is SVG; write {out.with_suffix('.svg')}")
    place = Workspace.locate(workspace)
    folder, card = find_card(model, place)
    found = read_covariance(card, folder)
    drawing = out or place.reports / "covariances" / f"{model}.svg"
    _write({drawing: covariance_svg(found), drawing.with_suffix(".csv"): covariance_csv(found)}, json_output)


def regions(
    model: Annotated[str, typer.Argument(help="A registered model of images of two pixels (mnist-5v8-tsne).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The drawing, FILE.svg (default: reports/regions/MODEL.svg).")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Whose test images: a name, folder:PATH or npz:PATH (default: its own)."),
    ] = None,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw what a model answers everywhere in a plane, with the test images; and as CSV.

    The answers are kept in reports/regions/MODEL.json, from which a paper's page draws them.
    Example: robench regions atent-toy2d
    """
    import numpy as np

    from robench import catalog
    from robench.datasets import dataset_facts, open_split
    from robench.registry import find_card
    from robench.reporting.regions import Panel, Regions, regions_csv, regions_path, regions_svg

    if out is not None and out.suffix != ".svg":
        raise UserError(f"--out {out}: the drawing is SVG; write {out.with_suffix('.svg')}")
    place = Workspace.locate(workspace, data_root)
    _, card = find_card(model, place)
    if math.prod(card.input_shape) != 2:
        shape = " x ".join(map(str, card.input_shape))
        raise UserError(f"model {model} classifies images of {shape}; regions are drawn of images of two pixels only")
    name = dataset or card.dataset
    images = open_split(name, "test", place)
    from robench.checkpoints import load_model
    from robench.evaluation.regions import answers_everywhere
    from robench.provenance import provenance

    where = resolve_device(device)
    loaded = load_model(
        model, place, device=where, input_shape=images.image_shape, num_classes=len(images.classes)
    ).model
    known = catalog.plugins("datasets").get(name)
    title, low, high = (known.facts.get("plane") if known else None) or ("pixel", 0.0, 1.0)
    found = Regions.of(
        answers_everywhere(loaded, image_shape=images.image_shape, device=where),
        images.read(np.arange(len(images))).reshape(-1, 2),
        images.labels,
        model=model,
        weights_sha256=card.weights.sha256,
        dataset=card.dataset if dataset is None else dataset_facts(dataset, place).name,
        split_sha256=images.sha256,
        classes=images.classes,
        axes=(f"{title} 1", f"{title} 2"),
        low=low,
        high=high,
        provenance=provenance(where, command_line()),
    )
    panels = [Panel(model, found, card.threat)]
    kept = regions_path(place.reports, model)
    drawing = out or kept.with_suffix(".svg")
    _write(
        {drawing: regions_svg(panels), drawing.with_suffix(".csv"): regions_csv(panels), kept: found.to_json()},
        json_output,
    )


def lines(
    model: Annotated[str, typer.Argument(help="As --model of robench eval: a registered name, torchvision:NAME, ...")],
    attack: Annotated[
        str,
        typer.Option(
            help="As in robench eval. One that stops at the first wrong answer leads no further than the boundary."
        ),
    ] = _TO_THE_END,
    threat: Annotated[
        str | None, typer.Option(help="Linf@8/255, L2@0.5, ... Default: the model's, else the data set's.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            help="How many test examples are attacked (default 100): a prefix of a fixed shuffle, as in robench eval.",
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(min=2, max=1001, help="On each line, its two images included, equally spaced.")
    ] = 51,
    seed: Annotated[int, typer.Option(help="Of the attack's random numbers.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The drawing, FILE.svg (default: reports/lines/MODEL.svg).")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Whose test images: a name, folder:PATH or npz:PATH (default: its own)."),
    ] = None,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = None,
    data_root: DataRootOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw the softmax outputs along the straight lines from test images to their adversarial images; and as CSV.

    Of the first images that fell, as an evaluation counts it. The outputs are kept in reports/lines/MODEL.json, from
    which a paper's page draws them.
    Example: robench lines mnist-standard --threat Linf@0.1
    """
    from robench.softmax_lines import Lines, lines_path

    if out is not None and out.suffix != ".svg":
        raise UserError(f"--out {out}: the drawing is SVG; write {out.with_suffix('.svg')}")
    options = answering.Options(
        workspace=Workspace.locate(workspace, data_root),
        dataset=dataset,
        examples=_FEW if examples is None else examples,
        examples_by_default=examples is None,
        threats=[] if threat is None else [ThreatModel.parse(threat)],
        attacks=[attack],
        seed=seed,
        precision="fp32",
        device=device,
    )
    job = answering.prepare(model, options)
    (spec,) = job.specs
    from robench.datasets import open_split
    from robench.evaluation.lines import lines_of
    from robench.provenance import provenance
    from robench.reporting.lines import lines_csv, lines_svg

    where = resolve_device(device)
    answer = lines_of(
        answering.checked_model(job, options),
        job.images,
        job.ids,
        spec,
        device=where,
        training=lambda: open_split(job.dataset, "train", options.workspace),
        points=points,
        most=_MOST_LINES,
    )
    if not answer.lines:
        raise UserError(
            f"{spec.attack.title} under {spec.threat} broke none of the {answer.attacked:,} images of "
            f"{spec.examples.count:,} that {model} classifies correctly: there is no line to draw; write more "
            "--examples, a larger --threat or another --attack"
        )
    found = Lines(
        spec=spec,
        attacked=answer.attacked,
        fallen=answer.fallen,
        classes=job.images.classes,
        lines=answer.lines,
        provenance=provenance(where, command_line()),
    )
    kept = lines_path(options.workspace.reports, model)
    drawing = out or kept.with_suffix(".svg")
    _write(
        {drawing: lines_svg(found), drawing.with_suffix(".csv"): lines_csv(found), kept: found.to_json()}, json_output
    )


def _write(files: Mapping[Path, str], json_output: bool) -> None:
    from robench.store import publish

    for path, text in files.items():
        publish(path, text.encode())
    if json_output:
        print_json([str(path) for path in files])
        return
    for path in files:
        print(path)

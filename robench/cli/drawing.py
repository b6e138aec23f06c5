"""`robench covariance`: what structured gradient regularisation has learned, as a drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robench.cli.options import JsonOption, WorkspaceOption, print_json
from robench.errors import UserError
from robench.workspace import Workspace


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
    from robench.store import publish

    if out is not None and out.suffix != ".svg":
        raise UserError(f"--out {out}: the drawing is SVG; write {out.with_suffix('.svg')}")
    place = Workspace.locate(workspace)
    folder, card = find_card(model, place)
    found = read_covariance(card, folder)
    drawing = out or place.reports / "covariances" / f"{model}.svg"
    files = {drawing: covariance_svg(found), drawing.with_suffix(".csv"): covariance_csv(found)}
    for path, text in files.items():
        publish(path, text.encode())
    if json_output:
        print_json([str(path) for path in files])
        return
    for path in files:
        print(path)

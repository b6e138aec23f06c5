"""`robench demo`: the whole path on the bundled handwritten digits, in about a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robench.cli import answering, ranking
from robench.cli.options import percent, print_table
from robench.planning import load_suite
from robench.recipe import load_recipe
from robench.registry import cards
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

_RECIPES = ("digits-standard", "digits-pgd")


def demo(
    folder: Annotated[Path, typer.Option(help="Where to write; it is made.")] = Path("robench-demo"),
) -> None:
    """Train a standard and an adversarially trained model on 8x8 digits, evaluate both, write a leaderboard.

    Example: robench demo
    """
    place = Workspace.locate(folder)
    (folder / "model_zoo").mkdir(parents=True, exist_ok=True)
    known = {
        name for name, (where, _) in cards(place).items() if where.is_relative_to((folder / "model_zoo").absolute())
    }

    import torch

    torch.set_num_threads(1)  # networks of this size only wait for a second thread

    from robench.cli.progress import Bars, TrainingBar
    from robench.store import Store
    from robench.training import Run, train

    for name in _RECIPES:
        if name in known:
            print(f"{name}: trained before, kept")
            continue
        run = Run(name=name, device=torch.device("cpu"), resume=True, command=f"robench train {name}")
        with Bars() as bars:
            train(load_recipe(name), run, workspace=place, progress=TrainingBar(bars))
    threat = load_recipe(_RECIPES[-1]).threat
    options = answering.Options(
        workspace=place,
        dataset=None,
        examples=None,
        examples_by_default=False,
        threats=[threat or ThreatModel.parse("Linf@0.15")],
        attacks=(),
        seed=0,
        precision="fp32",
        device="cpu",
        suite=load_suite("baseline"),
    )
    store = Store(place.reports)
    records = [r for name in _RECIPES for r in answering.run(answering.prepare(name, options), options, store)]
    rows = [[r.spec.model.id, r.spec.attack.title, percent(r.clean), percent(r.robust)] for r in records]
    print_table(
        ["model", "attack", "clean", "robust"],
        rows,
        title=f"{records[0].robust.n} test digits, {records[0].spec.threat}",
    )
    ranking.leaderboard(None, workspace=folder)
    print(f"models: {folder / 'model_zoo'}\nrecords: {folder / 'reports' / 'records'}")

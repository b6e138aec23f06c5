"""Accuracies by epoch, from the logs that trainings leave beside their models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from robench.catalog import DrawingEntry
from robench.panels import Axis, Panel, Plot, Rule, Series
from robench.papers.definitions import model_of
from robench.papers.figures import Evidence
from robench.registry import read_training_log


def draw(evidence: Evidence, *, drops: bool = False) -> list[Panel]:
    """Return for each panel the accuracy of each line by epoch, from the column of the log that the line names.

    Args:
        drops: mark the epochs before which the learning rate of the first line's training fell to half or less.
    """
    panels: list[Panel] = []
    for panel, lines in evidence.lines():
        series: list[Series] = []
        rules: tuple[Rule, ...] = ()
        for line in lines:
            found = evidence.trained(panel, line)
            if found is None:
                continue
            path = found.card.folder / "training.csv"
            points = history(path, line.log or "") if path.is_file() else []
            if not points:
                model = found.card.card.id
                command = evidence.training_command(panel, line)
                if model != model_of(evidence.figure.asked(panel, line)):
                    commands: tuple[str, ...] = (command,)
                else:
                    # The same training would measure no more; a lost log it would write again.
                    commands = () if path.is_file() else (f"{command} --replace",)
                lost = f"the log of {model}'s training is gone; restore {path.name} beside its card, or train it again"
                reason = f"the training of {model} did not measure {line.log}" if path.is_file() else lost
                evidence.lacks(panel, line, reason, commands=commands)
                continue
            epochs, shares = zip(*points, strict=True)
            if drops and not series:
                rates = history(path, "learning_rate")
                fell = [e for (_, before), (e, now) in pairwise(rates) if now <= before / 2]
                rules = tuple(Rule(title=f"rate drops, epoch {epoch:g}", x=epoch) for epoch in fell)
            series.append(
                Series(
                    title=found.title,
                    x=epochs,
                    y=[100 * share for share in shares],
                    origin=found.origin,
                    look=found.look,
                )
            )
        if series:
            panels.append(
                Plot(
                    title=panel.title,
                    x=Axis(title="epoch"),
                    y=Axis(title="accuracy, %", low=0.0, high=100.0),
                    series=tuple(series),
                    rules=rules,
                )
            )
    return panels


def history(path: Path, column: str) -> list[tuple[float, float]]:
    """Return (epoch, value) of a column of a training log, in the order of epochs; empty where it has none.

    Raises UserError that names the file and the line for one that is no log.
    """
    columns = read_training_log(path)
    points = zip(columns["epoch"], columns.get(column, ()), strict=False)
    return sorted((epoch, value) for epoch, value in points if epoch is not None and value is not None)


ENTRY = DrawingEntry(
    name="training-history",
    draw=draw,
    summary="Accuracy by epoch, from the logs that trainings leave beside their models.",
    source="Jagatap et al., arXiv:2008.12338, figure 3; Liu and Chan, arXiv:2210.05118, figures 4 and 5",
)

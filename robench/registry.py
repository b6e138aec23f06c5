"""The registry of models, as far as it can be read without torch: `model_zoo/<id>/card.json`, the weights
beside it.

Models are looked up in the workspace's registry, then the user's own, then the one that is shipped with the
package (:attr:`Workspace.registries`); the first that has the id answers. A card whose weights are too large
to be committed is still a card: asking for its weights names the command that makes them.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path

from robench import catalog
from robench.errors import UnknownName, UserError
from robench.records import ModelCard, ModelIdentity
from robench.store import StoredCard
from robench.workspace import Workspace

CARD = "card.json"
_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


def checked_id(name: str) -> str:
    """Return `name` if it can be a model's id, which is also a folder's name; else raise UserError."""
    if not _ID.fullmatch(name):
        raise UserError(
            f"model name {name!r} has other characters than a-z, 0-9, '.', '_', '-' or does not start with "
            "a letter or digit; write it like mnist-pgd-0.3"
        )
    return name


def is_reference(name: str) -> bool:
    """Return whether `name` is a model from elsewhere (`torchvision:NAME`, `FILE.py:FACTORY`), not an id."""
    return ":" in name


def cards(workspace: Workspace) -> dict[str, StoredCard]:
    """Return the folder and the card of every model in sight, by id, in alphabetical order.

    Raises UserError that names the file for a card that cannot be read.
    """
    return read_cards(workspace.registries)


def read_cards(registries: Iterable[Path]) -> dict[str, StoredCard]:
    """Return the cards in these registries; the first that has an id answers."""
    found: dict[str, StoredCard] = {}
    for registry in registries:
        # Names with a dot in front are models that are being written.
        for path in registry.glob(f"[!.]*/{CARD}"):
            if path.parent.name not in found:
                found[path.parent.name] = StoredCard(path.parent, read_card(path))
    return dict(sorted(found.items()))


def read_card(path: Path) -> ModelCard:
    """Return the card in a file; raise UserError that names the file if it is none, or another model's."""
    remedy = "restore it from version control, or train or import the model again with --replace"
    try:
        card = ModelCard.from_json(path.read_text(encoding="utf-8"), origin=str(path), remedy=remedy)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is no UTF-8 text; {remedy}") from None
    if card.id != path.parent.name:
        raise UserError(f"{path} is the card of {card.id!r}; rename its folder to that, or correct its id")
    return card


def read_training_log(path: Path) -> dict[str, list[float | None]]:
    """Return the columns of a model's `training.csv` by name, `epoch` among them: a row per epoch, None where a field
    is empty, because nothing was measured. Raises UserError that names the file and the line for anything else.
    """
    try:
        return _columns(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is no training log ({error}); restore it from version control, or delete it: only its curves "
            "are lost"
        ) from None


def _columns(text: str) -> dict[str, list[float | None]]:
    reader = csv.reader(io.StringIO(text))
    header = next(reader, [])
    if "epoch" not in header:
        raise ValueError("line 1 names no column epoch")
    rows = []
    for row in reader:
        if len(row) != len(header):
            raise ValueError(f"line {reader.line_num} has {len(row)} values, line 1 names {len(header)}")
        try:
            rows.append([_number(value) for value in row])
        except ValueError as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def _number(text: str) -> float | None:
    """Return the number, None where nothing was measured or the number cannot be drawn."""
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def find_card(name: str, workspace: Workspace) -> tuple[Path, ModelCard]:
    """Return the folder and the card of the model `name`.

    Raises UserError with the command to run where there is a recipe of that name but no model yet, or where a model
    has lost its card, and UnknownName with the nearest names where there is neither.
    """
    if name.endswith(".py"):
        raise UserError(f"--model {name} names no factory; write {name}:FACTORY, the function that returns the model")
    checked_id(name)
    for registry in workspace.registries:
        path = registry / name / CARD
        if path.is_file():
            return path.parent, read_card(path)
    if lost := next((r / name for r in workspace.registries if (r / name).is_dir()), None):
        raise UserError(
            f"model {name!r} has no {CARD} ({lost}); restore it from version control, or train or import the model "
            "again with --replace"
        )
    if name in catalog.plugins("recipes"):
        raise UserError(f"model {name!r} is not trained yet; run: robench train {name}")
    raise UnknownName("model", name, {*cards(workspace), *catalog.plugins("recipes")})


def weights_path(card: ModelCard, folder: Path) -> Path:
    """Return the file of the selected weights; raise UserError with the command that makes it if absent."""
    path = folder / card.weights.file
    if path.is_file():
        return path
    raise UserError(f"the weights of {card.id} ({path}) are not on this machine; {how_to_make_again(card)}")


def how_to_make_again(card: ModelCard) -> str:
    """Return the remedy where a model's files are lost: the command that its card says it was made with."""
    # The card is there, so that its name is taken; an interrupted run of it is not.
    command = re.sub(r" --(replace|resume|restart)(?= |$)", "", card.provenance.command)
    return f"{'import it again' if card.recipe is None else 'run'}: {command} --replace"


def identity_of(card: ModelCard) -> ModelIdentity:
    """Return how records name a registered model."""
    return ModelIdentity(
        id=card.id,
        weights_sha256=card.weights.sha256,
        architecture=card.architecture,
        normalization=card.normalization,
    )

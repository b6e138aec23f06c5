"""The registry without torch: first match wins, and every wrong name says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from robench import catalog
from robench.errors import UnknownName, UserError
from robench.records import Configured, ModelCard, Provenance, WeightsFile
from robench.registry import cards, checked_id, find_card, identity_of, is_reference, weights_path
from robench.workspace import Workspace


def made_with(command: str) -> Provenance:
    return Provenance(
        robench="0.1.0",
        code="release 0.1.0",
        torch="2.11",
        python="3.12.0",
        device="cpu (x86_64)",
        threads=1,
        command=command,
        finished="2026-01-01T00:00:00+00:00",
    )


def write_card(registry: Path, name: str, **changes: Any) -> ModelCard:
    facts: dict[str, Any] = {
        "id": name,
        "summary": "a model",
        "architecture": Configured(name="digits_cnn"),
        "input_shape": (1, 8, 8),
        "num_classes": 10,
        "parameter_count": 5,
        "normalization": None,
        "dataset": "digits",
        "data_licence": "CC BY 4.0",
        "threat": None,
        "weights": WeightsFile(file="model.safetensors", sha256="ab" * 32, bytes=3),
        "recipe": {"name": "digits-standard"},
        "provenance": made_with("robench train digits-standard --out mine"),
    }
    card = ModelCard(**{**facts, **changes})
    (registry / name).mkdir(parents=True)
    (registry / name / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace without the package's own models and recipes; `digits-pgd` is the one recipe."""
    monkeypatch.setattr("robench.workspace.PACKAGE", tmp_path / "package")
    known = catalog.plugins
    recipes = {"digits-pgd": SimpleNamespace(name="digits-pgd")}
    monkeypatch.setattr(catalog, "plugins", lambda kind: recipes if kind == "recipes" else known(kind))
    return Workspace(root=tmp_path / "work", data_root=tmp_path / "data", user_zoo=tmp_path / "user")


def test_the_first_registry_that_has_an_id_answers(place: Workspace) -> None:
    mine = write_card(place.root / "model_zoo", "b", summary="mine")
    write_card(place.user_zoo, "b", summary="the user's")
    other = write_card(place.user_zoo, "a")
    assert cards(place) == {
        "a": (place.user_zoo / "a", other),
        "b": (place.root / "model_zoo" / "b", mine),
    }
    assert find_card("b", place) == (place.root / "model_zoo" / "b", mine)
    assert find_card("a", place) == (place.user_zoo / "a", other)


def test_checkpoints_that_are_being_written_are_not_listed(place: Workspace) -> None:
    write_card(place.user_zoo, ".a.12345678.new")
    assert cards(place) == {}


def test_unknown_models_suggest_the_nearest_models_and_recipes(place: Workspace) -> None:
    write_card(place.user_zoo, "mnist-standard")
    with pytest.raises(UnknownName, match=r"unknown model 'mnist-standart'; did you mean 'mnist-standard'\?"):
        find_card("mnist-standart", place)
    with pytest.raises(UnknownName, match="'digits-pgd'"):
        find_card("digits-pgt", place)


def test_a_recipe_without_a_model_answers_with_the_command(place: Workspace) -> None:
    with pytest.raises(UserError, match=r"not trained yet; run: robench train digits-pgd$"):
        find_card("digits-pgd", place)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "Upper", "a b", "a\nb", "ü", "a\\b"])
def test_names_that_are_no_safe_folders_are_refused(name: str, place: Workspace) -> None:
    with pytest.raises(UserError, match=r"model name .* write it like"):
        checked_id(name)
    with pytest.raises(UserError, match="model name"):
        find_card(name, place)


def test_references_are_told_from_ids() -> None:
    assert is_reference("torchvision:resnet50")
    assert is_reference("nets/mine.py:make")
    assert not is_reference(checked_id("mnist-pgd-0.3_v2"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 9}', "\x00\xff"])
def test_a_damaged_card_is_named(text: str, place: Workspace) -> None:
    write_card(place.user_zoo, "a")
    path = place.user_zoo / "a" / "card.json"
    path.write_bytes(text.encode("latin-1"))
    for look in (lambda: cards(place), lambda: find_card("a", place)):
        with pytest.raises(UserError) as caught:
            look()
        message = str(caught.value)
        assert message.startswith(f"{path} ")
        assert "\n" not in message
        if "9" not in text:  # else robench is too old for it
            assert message.endswith(
                "; restore it from version control, or train or import the model again with --replace"
            )


def test_a_model_that_lost_its_card_is_no_unknown_one(place: Workspace) -> None:
    for name in ("a", "digits-pgd"):
        write_card(place.user_zoo, name)
        (place.user_zoo / name / "card.json").unlink()
        with pytest.raises(
            UserError, match=rf"model '{name}' has no card\.json \(.*/user/{name}\); restore it .* --repl"
        ):
            find_card(name, place)


def test_a_card_in_anothers_folder_is_refused(place: Workspace) -> None:
    write_card(place.user_zoo, "a")
    (place.user_zoo / "a").rename(place.user_zoo / "b")
    with pytest.raises(UserError, match=r"b/card\.json is the card of 'a'"):
        cards(place)


def test_absent_weights_answer_with_the_command_that_makes_them(place: Workspace) -> None:
    recipe = write_card(place.user_zoo, "digits-pgd", provenance=made_with("robench train digits-pgd --set epochs=3"))
    with pytest.raises(UserError, match=r"run: robench train digits-pgd --set epochs=3 --replace$"):
        weights_path(recipe, place.user_zoo / "digits-pgd")
    again = write_card(place.user_zoo, "again", provenance=made_with("robench train x --resume --replace --out again"))
    with pytest.raises(UserError, match=r"run: robench train x --out again --replace$"):
        weights_path(again, place.user_zoo / "again")
    renamed = write_card(place.user_zoo, "mine")
    with pytest.raises(UserError, match=r"run: robench train digits-standard --out mine --replace$"):
        weights_path(renamed, place.user_zoo / "mine")
    imported = write_card(place.user_zoo, "theirs", recipe=None)
    with pytest.raises(UserError, match="import it again: robench"):
        weights_path(imported, place.user_zoo / "theirs")
    (place.user_zoo / "theirs" / "model.safetensors").write_bytes(b"abc")
    assert weights_path(imported, place.user_zoo / "theirs").read_bytes() == b"abc"


def test_the_identity_is_the_cards(place: Workspace) -> None:
    card = write_card(place.user_zoo, "a")
    identity = identity_of(card)
    assert (identity.id, identity.weights_sha256) == ("a", "ab" * 32)
    assert identity.architecture == card.architecture


def test_the_registry_does_not_import_torch() -> None:
    code = "import sys, robench.registry; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""`robench list`, `robench show` and `robench data`: what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from robench import backends, catalog
from robench.cli.options import DataRootOption, JsonOption, WorkspaceOption, percent, print_json, print_table
from robench.errors import UnknownName, UserError
from robench.records import ModelCard
from robench.registry import cards
from robench.workspace import Workspace


class Listing(StrEnum):
    """What can be listed."""

    MODELS = "models"
    RECIPES = "recipes"
    DATASETS = "datasets"
    ARCHITECTURES = "architectures"
    ATTACKS = "attacks"
    BACKENDS = "backends"
    CERTIFICATES = "certificates"
    DEFENSES = "defenses"
    SUITES = "suites"
    LEADERBOARDS = "leaderboards"
    TABLES = "tables"
    PAPERS = "papers"
    FIGURES = "figures"
    DRAWINGS = "drawings"


def list_catalog(
    kind: Annotated[Listing, typer.Argument(help="What to list.")],
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """List what there is of one kind.

    Example: robench list attacks
    """
    if kind is Listing.MODELS:
        found = [model_summary(card) for _, card in cards(Workspace.locate(workspace)).values()]
    else:
        found = [
            {"name": p.name, "summary": _summary(p), "source": str(p.facts.get("source", ""))}
            for p in catalog.plugins(kind.value).values()
        ]
    if json_output:
        print_json(found)
        return
    if not found:
        print(f"no {kind.value} yet; `robench train RECIPE` or `robench import WEIGHTS` makes one")
        return
    print_table(list(found[0]), [[str(v) for v in row.values()] for row in found])


def model_summary(card: ModelCard) -> dict[str, Any]:
    """Return the facts of a card that a listing shows."""
    clean = card.clean_accuracy
    return {
        "name": card.id,
        "dataset": card.dataset,
        "architecture": card.architecture.name,
        "trained against": str(card.threat) if card.threat else "-",
        "clean accuracy": f"{percent(clean)} ({card.clean_accuracy_split})" if clean else "-",
        "scale": card.scale or ("full" if card.recipe else "imported"),
    }


def _summary(plugin: catalog.Plugin) -> str:
    fixed = ", ".join(f"{k}={v}" for k, v in plugin.preset.items())
    return f"{plugin.facts.get('summary', '')}" + (f" ({fixed})" if fixed else "")


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A model, recipe, data set, architecture, attack, backend, certificate, defense, suite or board."
        ),
    ],
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show everything that is known of a name: parameters with defaults and meaning, source, parameter count, card.

    Example: robench show pgd-20
    """
    found = description(name, Workspace.locate(workspace))
    if json_output:
        print_json(found)
        return
    for entry in found:
        parameters = entry.pop("parameters", None)
        print_table(["", ""], [[k, _text(v)] for k, v in entry.items()], title=f"{entry['kind']} {name}")
        if parameters:
            _print_parameters(parameters)


def _print_parameters(parameters: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of them, with what is said of each where anything is said of any."""
    columns = ["parameter", "type", "value"]
    rows = [[p["name"], p["type"], _text(p["value"])] for p in parameters]
    if any(p["description"] for p in parameters):
        columns.append("what it is")
        rows = [[*row, p["description"]] for row, p in zip(rows, parameters, strict=True)]
    print_table(columns, rows)


def description(name: str, workspace: Workspace) -> list[dict[str, Any]]:
    """Return one dictionary per thing of that name; raise UnknownName with the nearest names of all kinds."""
    models = cards(workspace)
    found: list[dict[str, Any]] = []
    if name in models:
        folder, card = models[name]
        found.append({"kind": "model", "folder": folder.name, **card.model_dump(mode="json", exclude_none=True)})
    found += [_plugin(catalog.plugins(kind)[name]) for kind in catalog.KINDS if name in catalog.plugins(kind)]
    if not found:
        known = {n for kind in catalog.KINDS for n in catalog.plugins(kind)} | set(models)
        raise UnknownName("name", name, known)
    return found


def _plugin(plugin: catalog.Plugin) -> dict[str, Any]:
    kind = catalog.KINDS[plugin.kind]
    facts = {k: v for k, v in plugin.facts.items() if k not in {"name", "presets", "kind"}}
    found = {"kind": kind.singular, "file": f"robench/{kind.folder}/{plugin.path.name}", **facts}
    if presets := plugin.facts.get("presets"):
        entry = plugin.facts.get("name", plugin.name)
        found["presets"] = ", ".join(presets) if plugin.name == entry else f"{plugin.name} is one of {entry}'s"
    if plugin.kind == "architectures":
        count = found.pop("parameter_counts").get(plugin.name)
        found["input_shape"] = found.pop("preset_shapes", {}).get(plugin.name, plugin.facts["input_shape"])
        found |= {"parameter count": count if count is not None else "not published"}
    if plugin.kind == "tables":
        found["columns"] = [column["title"] for column in plugin.facts.get("columns", ())]
        rows = plugin.facts.get("rows", ())
        found["rows"] = [f"{r['title']} ({r['recipe']})" if "recipe" in r else r["title"] for r in rows]
    if plugin.kind == "figures":
        lines = [line["title"] for panel in found.pop("panels", ()) for line in panel.get("lines", ())]
        places = [place["x"] for place in found.pop("places", ())]
        found |= {"settings": found.pop("parameters", {}), "lines": list(dict.fromkeys(lines)), "places": places}
        found = {key: value for key, value in found.items() if value}
    if plugin.kind == "papers":
        found["claims"] = f"{len(plugin.facts.get('claims', ()))}, in claims.html"
    if plugin.kind == "attacks":
        found["backends"] = {name: norms for name in backends.names() if (norms := _norms(name, plugin))}
    if plugin.kind == "backends":
        found["offers"] = {attack: backends.norms(plugin.name, attack) for attack in plugin.facts["offers"]}
    if plugin.kind == "datasets":
        found["classes"] = len(plugin.facts["classes"]) or "by the folder"
    if plugin.parameters:
        fixed = plugin.preset
        found["parameters"] = [
            {
                "name": p.name,
                "type": p.annotation,
                "value": fixed.get(p.name, "required" if p.required else p.default),
                "description": p.description,
            }
            for p in plugin.parameters.values()
        ]
    return found


def _norms(backend: str, attack: catalog.Plugin) -> list[str]:
    """Return the norms for which a backend offers an attack with the parameters that it has by default."""
    if backend == backends.NATIVE:
        return list(attack.facts["norms"])
    found = []
    for norm in attack.facts["norms"]:
        with suppress(UserError):
            backends.offered(backend, attack, attack.settings(), norm)
            found.append(norm)
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        lists = {k for k, v in value.items() if isinstance(v, list | tuple)}
        return ", ".join(f"{k} ({_text(v)})" if k in lists else f"{k}={_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def data(
    name: Annotated[str, typer.Argument(help="mnist or cifar10.")],
    data_root: DataRootOption = None,
) -> None:
    """Download a data set by torchvision into the data root, and check it.

    Example: robench data mnist
    """
    from robench.datasets import Split, download, open_split

    catalog.find("datasets", name)
    workspace = Workspace.locate(None, data_root)
    download(name, workspace.data_root)
    sizes = {split: len(open_split(name, split, workspace)) for split in get_args(Split)}
    print(f"{name}: {', '.join(f'{n:,} {s}' for s, n in sizes.items())} images in {Path(workspace.data_root)}")

"""Snapshots of a running training: one safetensors file, replaced atomically. Reading one runs no code.

Tensors are named by what they belong to (`model/...`, `optimizer/...`); everything else stands as JSON in the metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robench.errors import UnsafeFile, UserError
from robench.store import storage_errors

FORMAT = 1
Tensors = dict[str, Tensor]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the former or the new content.

    Raises StorageError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts as one file, atomically."""
    plain = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, save(plain, {"robench": json.dumps({"format": FORMAT, **facts})}))


def read_snapshot(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return what :func:`write_snapshot` wrote.

    Raises UnsafeFile for a damaged file, UserError for one of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["robench"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UnsafeFile(f"{path} is no readable checkpoint ({error}); delete {path.parent} to start over") from None
    if facts.pop("format") != FORMAT:
        raise UserError(f"{path} is of another version of robench; delete {path.parent} to start over")
    return tensors, facts


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with `prefix/` put before their names."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors below `prefix/`, by the rest of their names."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}

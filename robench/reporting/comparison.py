"""Two models side by side: what a page needs to compare any two of a table, and which examples it shows as pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench.reporting.formatting import interval, shown
from robench.reporting.pictures import Album
from robench.tables import Comparison, Table

#: Of each two models, so many images that only the first gets right, and as many that only the second does; then more
#: as long as there is room.
_EACH = (8, 16, 32, 48)
#: A page stays below 1.5 MB.
_MOST_PICTURES = 240
_MOST_BYTES = 600_000


def pictured_examples(comparison: Comparison) -> list[int]:
    """Return the ids of examples that models disagree about, neighbours in the table first: those worth a picture."""
    ids, standing = np.frombuffer(comparison.ids, "<u4"), _masks(comparison)
    chosen = np.zeros(len(ids), np.bool_)
    for enough, mine, other in _neighbours_first(len(standing)):
        alone = standing[mine] & ~standing[other]
        lacking = min(enough - int((alone & chosen).sum()), _MOST_PICTURES - int(chosen.sum()))
        if lacking > 0:
            chosen[np.flatnonzero(alone & ~chosen)[:lacking]] = True
        if chosen.sum() >= _MOST_PICTURES:
            break
    return [int(i) for i in ids[chosen]]


def _neighbours_first(count: int) -> Iterator[tuple[int, int, int]]:
    """Yield how many images are enough, and two models, the nearest in the table first, either one once in front."""
    pairs = sorted(permutations(range(count), 2), key=lambda pair: (abs(pair[1] - pair[0]), min(pair), pair))
    yield from ((enough, *pair) for enough in _EACH for pair in pairs)


def _masks(comparison: Comparison) -> NDArray[np.bool_]:
    """Return which examples each model gets right, `(M, N)`."""
    data = np.frombuffer(b"".join(comparison.standing), np.uint8).reshape(len(comparison.models), -1)
    count = len(comparison.ids) // 4
    return np.unpackbits(data, axis=1, bitorder="little")[:, :count].astype(np.bool_)


def page_data(table: Table, comparison: Comparison, album: Album) -> dict[str, Any]:
    """Return what the page's script reads; bytes as base64 text."""
    ids = np.frombuffer(comparison.ids, "<u4")
    whole = np.array_equal(ids, np.arange(len(ids)))
    by_key = {column.key: column for column in table.columns}
    keys = [table.ranked_by, "clean", *comparison.attacks]
    places = [list(by_key).index(key) for key in keys]
    groups = list(table.column("group")) if "group" in by_key else []
    ranks = list(table.column("rank"))
    pictures, size = {}, 0
    for example, address in album.pictures.items():
        size += len(address)
        if size <= _MOST_BYTES:
            pictures[example] = address
    return {
        "count": len(ids),
        "ids": None if whole else _base64(comparison.ids),
        "labels": _base64(comparison.labels),
        "classes": list(album.classes),
        "columns": [by_key[key].title for key in keys],
        "models": [
            {
                "name": name,
                "note": ranks[number].note,
                "group": groups[number].value if groups else None,
                "clean": _base64(comparison.clean[number]),
                "standing": _base64(comparison.standing[number]),
                "shares": [
                    None
                    if row[p].value is None
                    else [
                        float(f"{row[p].value:.10g}"),
                        shown(row[p], table.columns[p]),
                        interval(row[p], table.columns[p]),
                    ]
                    for p in places
                ],
            }
            for number, (name, row) in enumerate(zip(comparison.models, table.rows, strict=True))
        ],
        "pictures": pictures,
        "missing": album.missing,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

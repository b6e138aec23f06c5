"""CIFAR's "python version" files, which are pickles, read without running what a pickle could ask to run.

A pickle calls whatever function it names. Here every name resolves to :class:`Inert`, which only remembers
what it was given, and names that CIFAR's files have no use for are refused. The array is then put together
from what was remembered.
"""

from __future__ import annotations

import pickle  # noqa: TID251 - the published files are pickles; find_class below lets none run code
from pathlib import Path
from typing import Any

import numpy as np

from robench.datasets._image_set import Pixels, Positions
from robench.errors import UnsafeFile

ALLOWED = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),  # how Python 3 writes bytes in the protocol of Python 2
    }
)
#: What a pickle that is cut, altered or of other content makes the unpickler or the assembly below raise.
DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    MemoryError,
    OverflowError,
    RecursionError,
)


class Inert:
    """Stands for an object that a pickle asks for: its arguments and its state, unused."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertUnpickler(pickle.Unpickler):
    """Builds numbers, texts, lists, dicts and Inert objects, nothing else."""

    def find_class(self, module: str, name: str) -> type[Inert]:
        """Return Inert for the names in ALLOWED; raise UnsafeFile for all others."""
        if (module, name) not in ALLOWED:
            raise UnsafeFile(f"asks for {module}.{name}, which could run code")
        return Inert


def read_batch(path: Path) -> tuple[Pixels, Positions]:
    """Return a file's images as (N, 3, 32, 32) uint8 and labels as (N,) int64; UnsafeFile names the file."""
    try:
        with path.open("rb") as file:
            batch = InertUnpickler(file, encoding="latin1").load()
        images = _array(batch["data"]).reshape(-1, 3, 32, 32)
        labels = np.array([int(label) for label in batch["labels"]], np.int64)
    except UnsafeFile as error:
        raise UnsafeFile(f"{path} {error}; delete it and fetch the data set again") from None
    except (*DAMAGE, OSError) as error:
        raise UnsafeFile(f"{path} is damaged or no CIFAR batch ({error!r}); fetch the data set again") from None
    return images, labels


def _array(recorded: Inert) -> Pixels:
    """Put together the array whose state (version, shape, dtype, Fortran order, bytes) was recorded."""
    _, shape, dtype, is_fortran, content = recorded.state
    if dtype.arguments[0] != "u1" or is_fortran:
        raise ValueError("not a C-ordered uint8 array")
    if isinstance(content, Inert):
        content = content.arguments[0]
    values = content if isinstance(content, bytes) else content.encode("latin1")
    return np.frombuffer(values, np.uint8).reshape(shape)

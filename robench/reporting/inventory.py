"""Which files of a folder are robench's, so that a page of what is gone goes, too, and nothing else ever does.

::

    reports/leaderboards/files.txt    the paths below the folder, sorted, one a line; itself is not among them

Every write adds its files before it writes them, so that one that is killed leaves no page that nobody knows of. A run
that wrote everything anew removes the others that are listed. What is not listed, a user's CNAME or notes, is not
touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from robench.errors import UnsafeFile, bad_byte
from robench.store import publish, storage_errors

INVENTORY = "files.txt"

#: How the names of all files end that robench writes beside the pages.
_ENDINGS = frozenset({".html", ".csv", ".json", ".tex", ".svg"})


def listed_files(folder: Path) -> frozenset[str]:
    """Return the paths that a folder's inventory lists, none where there is no inventory.

    Raises UnsafeFile where it is damaged, or lists what robench would never write: nothing is deleted by such a list.
    """
    path = folder / INVENTORY
    try:
        lines = path.read_text("utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except UnicodeDecodeError as error:
        raise UnsafeFile(f"{path} {bad_byte(error)}, or {_remedy(folder)}") from None
    except OSError as error:
        raise UnsafeFile(f"{path} cannot be read: {error.strerror}; {_remedy(folder)}") from None
    for number, line in enumerate(lines, start=1):
        if not _is_ours(line):
            raise UnsafeFile(f"{path} is no list of files in {folder} (line {number}: {line!r}); {_remedy(folder)}")
    return frozenset(lines)


def add_files(folder: Path, files: Iterable[Path]) -> None:
    """List files that are about to be written; raise UnsafeFile for a damaged inventory, StorageError as `publish`."""
    listed = listed_files(folder)
    _write(folder, listed, listed.union(_names(folder, files)))


def remove_others(folder: Path, written: Collection[Path]) -> list[Path]:
    """Remove what the inventory lists besides what was written now, and list that alone; return what was removed.

    Raises UnsafeFile for a damaged inventory and where a link leads one of the files out of the folder (then nothing is
    removed), StorageError where a file cannot be removed.
    """
    listed, kept = listed_files(folder), _names(folder, written)
    others = [folder / name for name in sorted(listed - kept)]
    root = folder.resolve()
    for path in others:
        if not path.parent.resolve().is_relative_to(root):
            raise UnsafeFile(
                f"{path} leads out of {folder}, so nothing was removed; delete its line in {folder / INVENTORY}"
            )
    # Where upper and lower case are one, the old name of a page may be that of a new one.
    same = {(stat.st_dev, stat.st_ino) for stat in map(Path.stat, written)}
    removed = []
    for path in others:
        if not (path.is_file() or path.is_symlink()):
            continue
        stat = path.lstat()
        if (stat.st_dev, stat.st_ino) not in same:
            with storage_errors(path.parent):
                path.unlink()
            removed.append(path)
    for parent in {path.parent for path in removed} - {folder}:
        with contextlib.suppress(OSError):  # not empty
            parent.rmdir()
    _write(folder, listed, kept)
    return removed


def _names(folder: Path, files: Iterable[Path]) -> frozenset[str]:
    return frozenset(path.relative_to(folder).as_posix() for path in files)


def _is_ours(line: str) -> bool:
    """Tell whether robench could have written a line: the path of a page or its numbers, below the folder."""
    path = PurePosixPath(line)
    return path.as_posix() == line and not path.is_absolute() and ".." not in path.parts and path.suffix in _ENDINGS


def _write(folder: Path, listed: Collection[str], names: Collection[str]) -> None:
    if names != listed or not (folder / INVENTORY).exists():
        publish(folder / INVENTORY, "".join(f"{name}\n" for name in sorted(names)).encode())


def _remedy(folder: Path) -> str:
    return f"restore it from version control, or delete it: what is in {folder} then stays there"

"""Find what a misspelled name was meant to be, whatever its case."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


def closest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Return the known names that are most similar to a name, the closest first; none if none is similar."""
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(one.lower(), one)
    return [plain[found] for found in difflib.get_close_matches(name.lower(), plain, n=most)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest known name, or nothing if none is similar."""
    found = closest(name, known)
    return f"; did you mean {found[0]}?" if found else ""


def similar_paths(path: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Return the paths that are similar to one that does not exist, the closest first; its folders may be misspelled too.

    Args:
        path: The path that does not exist.
        wanted: Tells whether a path is of the right kind.
    """
    parents = [path.parent] if path.parent.is_dir() or path.parent == path else similar_paths(path.parent, Path.is_dir)
    found = []
    for parent in map(Path, parents):
        try:
            names = [entry.name for entry in parent.iterdir() if wanted(entry)]
        except OSError:
            continue
        # Below a folder that is only similar, the name itself may be right.
        found += [str(parent / name) for name in closest(path.name, names, most=3)]
    return found[:3]

"""Read `--data` as one data set or several: `a.jsonl`, `a.jsonl=2,b/`, `book.xlsx#Sheet2`.

    a.jsonl=2      each epoch has the set's training rows twice; 0.5: the same half of them in every epoch
    book.xlsx#B    the sheet B of an Excel file

A file whose own name has a comma, `=` or `#` is meant where it exists.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mlx_lora.settings.named_recipes import recipe_names
from mlx_lora.sources.records import check_file
from mlx_lora.sources.splits import find_splits
from mlx_lora.system.cache import GIVEN, shown_data
from mlx_lora.system.errors import InputError

MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class DataFile:
    """A file of a data set.

    Attributes:
        path: The file.
        name: Its name in messages, which no other file of the run has.
        sheet: The sheet of an .xlsx file; None: the first.
    """

    path: Path
    name: str
    sheet: str | None = None


@dataclass(frozen=True)
class DataSet:
    """One of the sets that `--data` names.

    Attributes:
        name: As `--data` has it, without its weight.
        weight: How often each epoch has its training rows.
        splits: `train`, `valid`, `test` -> the split's files.
    """

    name: str
    weight: float
    splits: dict[str, tuple[DataFile, ...]]


def named_sets(data: str) -> list[tuple[str, float]]:
    """Return the names of the sets that `--data` names, each with its weight, without looking into them.

    Raises:
        InputError: a weight is no number, or outside of its range.
    """
    parts, found, start = data.split(","), [], 0
    while start < len(parts):
        # The longest run of parts that exists is one name, in which the commas belong.
        ends = range(len(parts), start, -1)
        whole = {end: _name_and_weight(",".join(parts[start:end])) for end in ends}
        end = next((end for end in ends if _exists(whole[end][0]) and "," not in (whole[end][1] or "")), start + 1)
        name, weight = whole[end]
        if name:
            found.append((name, _weight(name, weight)))
        start = end
    if not found:
        raise InputError(f"--data {data}: names no file; give a file, a folder, a dataset id, or several by comma")
    return found


def is_local(name: str) -> bool:
    """Tell whether a set is on this disk, a recipe's among them, and not on the hub."""
    return _exists(name) or name in recipe_names()


def find_sets(data: str) -> list[DataSet]:
    """Return the sets that `--data` names, with their files; each can be opened.

    Raises:
        InputError: a set is not there, or has a file of an unknown kind.
    """
    sets = []
    for name, weight in named_sets(data):
        path, sheet = _sheet(name)
        splits = find_splits(path)
        for file in (file for files in splits.values() for file in files):
            check_file(file)
        sets.append((name, weight, {split: [(file, sheet) for file in files] for split, files in splits.items()}))
    names = _names([file for _, _, splits in sets for files in splits.values() for file, _ in files])
    names |= {file: f"the given {file.stem} list" for file in names if shown_data(str(file)) == GIVEN}
    return [
        DataSet(
            name,
            weight,
            {key: tuple(DataFile(file, names[file], sheet) for file, sheet in files) for key, files in splits.items()},
        )
        for name, weight, splits in sets
    ]


def _name_and_weight(text: str) -> tuple[str, str | None]:
    """Split `name=weight`, unless the whole is the name of something that exists."""
    text = text if _exists(text) else text.strip()
    name, equals, weight = text.rpartition("=")
    return (text, None) if _exists(text) or not equals else (name, weight)


def _weight(name: str, text: str | None) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= MAX_WEIGHT:
        raise InputError(f"--data {name}={text}: a weight must be a number above 0 and at most {MAX_WEIGHT:g}")
    return weight


def _exists(name: str) -> bool:
    path, _ = _sheet(name)
    return bool(name.strip()) and Path(path).expanduser().exists()


def _sheet(name: str) -> tuple[str, str | None]:
    """Split `book.xlsx#Sheet`, unless that is the name of a file."""
    path, mark, sheet = name.rpartition("#")
    if not mark or not path.lower().endswith(".xlsx") or Path(name).expanduser().exists():
        return name, None
    return path, sheet


def _names(files: list[Path]) -> dict[Path, str]:
    """Return a name for each file: its own, with as many folders before it as tell it from the others."""
    names, depth = {file: file.name for file in files}, 1
    while len(set(names.values())) < len(names) and depth < max(len(file.parts) for file in files):
        depth += 1
        often = Counter(names.values())
        names = {file: "/".join(file.parts[-depth:]) if often[name] > 1 else name for file, name in names.items()}
    return names

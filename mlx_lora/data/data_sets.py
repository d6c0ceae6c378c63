"""Find the files that `--data` names: one data set or several, with weights and sheets; and read the file of `--tools`.

    a.jsonl,b/     two data sets, a file and a folder
    a.jsonl=2      each epoch has the set's training rows twice; 0.5: the same half of them in every epoch
    book.xlsx#B    the sheet B of an Excel file
    a/b?split=test[:20%]&prompt_column=q    a part of the set, read in a way of its own: OPTIONS

A settings file may write such a set as a mapping, `{path: a/b, split: "test[:20%]", prompt_column: q}`. A file whose own name has
a comma, `=`, `?` or `#` is meant where it exists.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mlx_lora.config.fields import read_value
from mlx_lora.config.load import RECIPES, recipe_names
from mlx_lora.config.objectives import TASK_SETS, VERIFIERS
from mlx_lora.config.settings import COLUMNS, FIELDS, DataSettings
from mlx_lora.data.examples import FormatError, tools_of
from mlx_lora.data.file_formats import DOCUMENTS, MARKDOWN, PACKED, SUFFIXES, TABLES, check_file, read_records
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import GIVEN, shown_data
from mlx_lora.utils.hub import tiny_shakespeare
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.text import did_you_mean

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
TINY_SHAKESPEARE = "tiny-shakespeare"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SHARD = re.compile(r"(?P<split>[a-z][a-z_]*)(-\d{5}-of-\d{5}.*)?")  # the hub's names for the parts of one split
# Files that describe a data set; of texts, only those whose whole name says so, because the others may be someone's notes.
ABOUT = "readme|license|requirements|dataset_infos?|config|notice"
NOT_DATA = re.compile(rf"({ABOUT})\b.*", re.IGNORECASE)
NOT_TEXT = re.compile(rf"({ABOUT})(\.[a-z]+)?", re.IGNORECASE)
MAX_WEIGHT = 1000.0
# Options of one set: settings that only its records are read with, and these.
READING = ("data_format", *COLUMNS, "label_column", "turn_names")
OPTIONS = {
    "split": re.compile(
        r"(?P<name>\w+)(\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?"
    ),  # as of `datasets`, with a part of it
    "subset": re.compile(r"\w[\w.-]*"),  # a folder of the set; the hub calls it a configuration
    "as": re.compile("train|valid"),  # valid: its rows are validated on, and nothing else is
}


# Several data sets


@dataclass(frozen=True)
class DataFile:
    """A file of a data set.

    Attributes:
        path: The file.
        name: Its name in messages, which no other file of the run has.
        sheet: The sheet of an .xlsx file; None: the first.
        part: Numbers of the records to read, from 0; None: all.
        own: Settings that its records are read with instead of the run's.
    """

    path: Path
    name: str
    sheet: str | None = None
    part: range | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    def reading(self, settings: DataSettings) -> DataSettings:
        """Return the settings that its records are read with."""
        return replace(settings, **self.own)


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


def find_sets(data: str) -> list[DataSet]:
    """Return the sets that `--data` names, with their files; each can be opened.

    Raises:
        InputError: a set is not there, or has a file of an unknown kind.
    """
    sets = []
    for name, weight in named_sets(data):
        place, options = source(name)
        _, sheet = _sheet(place)
        splits = find_splits(name)
        for file in (file for files in splits.values() for file in files):
            check_file(file)
        own = {key: value for key, value in options.items() if key in READING}
        parts = {
            split: [
                DataFile(file, "", sheet, part, own) for file, part in _parts(files, sheet, options.get("split", ""))
            ]
            for split, files in splits.items()
        }
        only = {"valid": parts.get("valid") or parts["train"]} if options.get("as") == "valid" else parts
        sets.append((name, weight, only))
    if any("train" not in parts for _, _, parts in sets) and any("train" in parts for _, _, parts in sets):
        for _, _, parts in sets:
            parts |= {"valid": []} if "train" in parts else {}
    names = _names([file.path for _, _, parts in sets for files in parts.values() for file in files])
    names |= {file: f"the given {file.stem} list" for file in names if shown_data(str(file)) == GIVEN}
    return [
        DataSet(
            name,
            weight,
            {
                key: tuple(replace(file, name=names[file.path]) for file in files)
                for key, files in parts.items()
                if files
            },
        )
        for name, weight, parts in sets
    ]


def source(name: str) -> tuple[str, dict[str, Any]]:
    """Split `NAME?option=value&...`, unless that is the name of a file.

    Returns:
        The name, and the options by name; those of READING are checked values of these settings.

    Raises:
        InputError: there is no such option, or a value is not allowed.
    """
    place, mark, query = name.partition("?")
    if not mark or Path(name).expanduser().exists():
        return name, {}
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in (*OPTIONS, *READING):
            raise InputError(f"--data {name}: no option {key!r}{did_you_mean(key, (*OPTIONS, *READING))}")
        if key in OPTIONS and not OPTIONS[key].fullmatch(value):
            wanted = {"split": "write it as train, train[:20%] or train[100:200]", "as": "write train or valid"}
            raise InputError(
                f"--data {name}: {key} {value!r}: {wanted.get(key, 'write the name of a folder of the set')}"
            )
        try:
            options[key] = read_value(FIELDS[key], value) if key in READING else value
        except ValueError as error:
            raise InputError(f"--data {name}: {key} {error}") from None
    return place, options


def _parts(files: Sequence[Path], sheet: str | None, split: str) -> list[tuple[Path, range | None]]:
    """Return files with the numbers of their records that a split such as `train[:20%]` has; shares are rounded as in `datasets`."""
    match = OPTIONS["split"].fullmatch(split)
    if not match or not match[2]:
        return [(file, None) for file in files]
    counts = [sum(1 for _ in read_records(file, sheet)) for file in files]
    total = sum(counts)
    bounds = [
        None if text is None else round(float(text[:-1]) * total / 100) if text.endswith("%") else int(text)
        for text in (match["begin"], match["end"])
    ]
    begin, end, _ = slice(*bounds).indices(total)
    found, before = [], 0
    for file, count in zip(files, counts, strict=True):
        found.append((file, range(min(max(0, begin - before), count), min(max(0, end - before), count))))
        before += count
    return found


def look_at_data(data: str | None) -> None:
    """Refuse data that cannot be read, as far as the first record shows it: before a model is loaded, which takes long.

    Sets that are downloaded, or made by a package, are left out.

    Raises:
        InputError: a set is not there, is of an unknown kind or damaged, or has no record.
    """
    for name, _ in named_sets(data) if data else ():
        made = name == TINY_SHAKESPEARE or name.startswith((TASK_SETS, VERIFIERS)) or is_dataset_id(name)
        if made and not is_local(name):
            continue
        files = find_sets(name)[0].splits.get("train", ())
        # A text, and a list in a .json file, would be read as a whole.
        by_row = all(file.path.suffix.lower() in (".jsonl", *TABLES, *PACKED) for file in files)
        if files and by_row and not any(next(read_records(file.path, file.sheet), None) for file in files):
            raise InputError(f"--data {shown_data(name)}: the train data has no record; it needs at least one")


def all_files(data: str) -> list[DataFile]:
    """Return the files of all splits of all sets that `--data` names; errors as of `find_sets`."""
    return [file for one in find_sets(data) for files in one.splits.values() for file in files]


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
        try:
            times = 1.0 if weight is None else float(weight)
        except ValueError:
            times = 0.0
        if name and not 0 < times <= MAX_WEIGHT:
            raise InputError(f"--data {name}={weight}: a weight must be a number above 0 and at most {MAX_WEIGHT:g}")
        found += [(name, times)] if name else []
        start = end
    if not found:
        raise InputError(f"--data {data}: names no file; give a file, a folder, a dataset id, or several by comma")
    return found


def is_local(name: str) -> bool:
    """Tell whether a set is on this disk, a recipe's among them, and not on the hub."""
    return (_exists(name) and not name.startswith(VERIFIERS)) or name in recipe_names()


def _name_and_weight(text: str) -> tuple[str, str | None]:
    """Split `name=weight`, unless the whole is the name of something that exists; each option has an `=` of its own."""
    text = text if _exists(text) else text.strip()
    name, equals, weight = text.rpartition("=")
    asks = text.partition("?")[2] and not Path(text).expanduser().exists()
    whole = text.rpartition("&")[2].count("=") == 1 if asks else _exists(text)
    return (text, None) if whole or not equals else (name, weight)


def _exists(name: str) -> bool:
    place, _, query = name.partition("?")
    path, _ = _sheet(name if "," in query or Path(name).expanduser().exists() else place)
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


# The files of one data set


def find_splits(data: str) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split that `--data` names.

    Args:
        data: A file, a folder, `tiny-shakespeare`, a recipe's name, a set of tasks (data/task_sets.py) or a hub
            dataset id `owner/name` (`@revision` may follow), and options: with a split, only that is found, and called `train`.

    Returns:
        `train`, `valid`, `test` -> the split's files, ordered by name (one, unless a hub dataset has several
        parts). A single file, or the only data file of a folder, is `train`; so are all files of a folder of documents,
        those in its subfolders too.

    Raises:
        InputError: there are no data files, or two files have the name of the same split.
    """
    place, options = source(data)
    name, _ = _sheet(place)
    path = Path(name).expanduser()
    split, subset = options.get("split", "").partition("[")[0], options.get("subset", "")
    single, folder = path, None
    if path.is_dir():
        folder = path
    elif path.is_file():
        pass
    elif name == TINY_SHAKESPEARE:
        single = tiny_shakespeare()
    elif name in recipe_names():
        folder = RECIPES / name
    elif name.startswith((TASK_SETS, VERIFIERS)):
        from mlx_lora.data.task_sets import task_file, verifiers_file  # few runs need it

        single = task_file(name) if name.startswith(TASK_SETS) else verifiers_file(name)
    elif is_dataset_id(name):
        from mlx_lora.utils.hub import download_dataset_files  # the hub client is slow to import

        dataset, _, revision = name.partition("@")
        folder = download_dataset_files(dataset, revision or None)
    if folder:
        return _folder_splits(folder, split, subset)
    if single.is_file():
        if split not in ("", "train") or subset:
            raise InputError(
                f"--data {data}: one file, without splits and subsets; leave out {split} {subset}".rstrip()
            )
        return {"train": (single,)}
    near = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near, n=3) or difflib.get_close_matches(name, [TINY_SHAKESPEARE])
    hint = f"similar names: {', '.join(close)}" if close else f"no similar name in {path.parent.resolve()}"
    raise InputError(
        f"--data {data}: no such file or folder, and no hub dataset id (owner/name); {hint}; "
        f"give a {' '.join(SUFFIXES)} file, a folder with train.jsonl, a dataset id or tiny-shakespeare"
    )


def is_dataset_id(data: str) -> bool:
    """Tell whether a text that names no file or folder can be the id of a hub dataset, `owner/name@revision?options`."""
    data = data.partition("?")[0]
    path, dataset = Path(data).expanduser(), data.partition("@")[0]
    return bool(HUB_ID.fullmatch(dataset)) and path.suffix.lower() not in SUFFIXES and not path.parent.is_dir()


def _folder_splits(folder: Path, split: str, subset: str) -> dict[str, tuple[Path, ...]]:
    documents = _are_notes(folder) and not split
    folders = [folder / subset, folder / "data" / subset] if subset else [folder, folder / "data", folder / "default"]
    for subfolder in () if documents else folders:
        splits = _named_splits(subfolder, {split: "train"} if split and split not in SPLIT_NAMES else SPLIT_NAMES)
        if split and (files := splits.get(SPLIT_NAMES.get(split, "train"))):
            return {"train": files}
        if splits and not split:
            return {name: splits[name] for name in ("train", "valid", "test") if name in splits}
    if subset or split not in ("", "train"):
        asked = " ".join(f"{key} {value}" for key, value in (("subset", subset), ("split", split)) if value)
        found = ", ".join(
            sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in SUFFIXES)[:8]
        )
        raise InputError(f"{folder} has no file of {asked}; found: {found or 'nothing'}")
    texts = tuple(one for one in _visible(folder) if one.suffix.lower() in DOCUMENTS and not _describes(one))
    if documents:
        return {"train": texts}
    files = [file for file in _data_files(folder) if not _describes(file)]
    if len(files) == 1:
        return {"train": (files[0],)}
    if files and all(file.suffix.lower() in DOCUMENTS for file in files):  # with other data in a subfolder
        return {"train": texts}
    found = ", ".join(file.name for file in files[:8]) or ", ".join(sorted(p.name for p in folder.iterdir())[:8])
    raise InputError(
        f"{folder} has no train.jsonl (or train{' train'.join(SUFFIXES[1:])}); "
        f"found: {found or 'nothing'}; name the file itself, or rename it"
    )


def _are_notes(folder: Path) -> bool:
    """Tell whether a folder has several texts, no other data, and no train split: then test.md is a note, and no split."""
    files = [file for file in _visible(folder) if file.suffix.lower() in SUFFIXES and not _describes(file)]
    if len(files) < 2 or any(file.suffix.lower() not in DOCUMENTS for file in files):
        return False
    names = {name for file in files for name in (_stem(file), *file.relative_to(folder).parts[:-1])}
    splits = {SPLIT_NAMES[name] for name in names & SPLIT_NAMES.keys()}
    return "train" not in names and not ("train" in splits and len(splits) > 1)


def _stem(file: Path) -> str:
    """Return the name that tells a file's split, without the number of its part."""
    match = SHARD.fullmatch(file.stem)
    return match["split"] if match else ""


def _describes(file: Path) -> bool:
    """Tell whether a file's name says that it describes the data."""
    return bool((NOT_TEXT if file.suffix.lower() in DOCUMENTS else NOT_DATA).fullmatch(file.name))


def _named_splits(folder: Path, known: Mapping[str, str] = SPLIT_NAMES) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split: those with one of its names in `folder`, and all in subfolders with such a name."""
    candidates: dict[str, list[Path]] = {}
    for file in _data_files(folder):
        if split := known.get(_stem(file)):
            candidates.setdefault(split, []).append(file)
    for name, split in known.items():
        candidates.setdefault(split, []).extend(_data_files(folder / name))
    for split, files in candidates.items():
        in_parts = all("-of-" in file.stem or file.parent != folder for file in files)
        if len(files) > 1 and not in_parts:
            names = ", ".join(file.name for file in files)
            raise InputError(f"{folder} has several {split} files: {names}; keep one, or name the file itself")
    return {split: tuple(files) for split, files in candidates.items() if files}


def _data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder; Markdown among other files than texts describes them."""
    if not folder.is_dir():
        return []
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if all(file.suffix.lower() in DOCUMENTS for file in files):
        return files
    return [file for file in files if file.suffix.lower() not in MARKDOWN]


def _visible(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, without hidden ones, ordered by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


# Tools


def read_tools(file: str) -> list[dict[str, Any]]:
    """Return the tools in a file, each `{type, function: {name, ...}}`.

    Args:
        file: `.json` with a list, or with an object that has `tools`; `.jsonl`, whose first row with `tools` counts.

    Raises:
        InputError: there is no such file, or it has no tools.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            [parse_json(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else [parse_json(text)]
        )
    except OSError as error:
        raise InputError(
            f"--tools {file}: cannot be read ({error.strerror}); give a JSON file with a list of tools"
        ) from None
    except ValueError as error:
        raise InputError(f"--tools {file}: not valid JSON ({error}); give a JSON file with a list of tools") from None
    lists = [row if isinstance(row, list) else row.get("tools") for row in rows if isinstance(row, list | dict)]
    try:
        found = next((tools for tools in map(tools_of, lists) if tools), None)
    except FormatError as error:
        raise InputError(f"--tools {file}: {error}") from None
    if found is None:
        raise InputError(f"--tools {file}: no tools in it; give a list of objects, or rows with the field tools")
    return found

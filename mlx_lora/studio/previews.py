"""Show a run's data as it will be trained: encoded once into arrays on disk, from which any page of rows is read fast.

FOLDER/tokens.npy mask.npy offsets.npy     the rows, as `train` would encode them
       pictures.npy                        the number of each row's pictures
       pictures.json                       by number their digests; of each picture its file, size and image tokens
       thumbnails/DIGEST.jpg               of those that a page has shown, or whose bytes are in the data
       examples.npy                        (E, 6) int32: file, line, form, whether cut, the first equal example or -1, split
       meta.json                           names, counts, histogram, refused records, notes

Only pictures that the data's reader has opened are shown, so a path was checked before it is here; a file that has changed since
is not shown again. A large data set is encoded in a process of its own, so that the server goes on answering:

    python -m mlx_lora.studio.previews REQUEST.json FOLDER"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import find_sets
from mlx_lora.data.images import ImageFile, jpeg_url, thumbnail
from mlx_lora.data.load import chat_day, prompt_encoder
from mlx_lora.data.mix import content_key
from mlx_lora.data.notes import data_notes
from mlx_lora.data.prompts import read_teacher_prompt
from mlx_lora.data.read import (
    Repeated,
    SplitRows,
    answers_of,
    check_speaker,
    cut_repeated_prompts,
    encode_entries,
    file_records,
    parse_rows,
    repeated_notes,
)
from mlx_lora.data.report import DroppedRow, row_pieces
from mlx_lora.gguf.tokenizer import gguf_tokenizer_folder
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.table import with_pictures
from mlx_lora.studio.folders import Stamps, stamps, stamps_at, stamps_of_settings
from mlx_lora.studio.model_stores import local_model
from mlx_lora.studio.web import BackgroundTask, Tasks, in_page_words
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, evict, replace_text, replacing_file, replacing_folder, sha256_of
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.hub import HUB_ID, resolve_config, resolve_tokenizer
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.image_tokens import ImageTable

SPLITS = ("train", "valid", "test")
BARS = 40
MOST_REFUSED = 20_000  # that are listed; all are counted
MOST_WHY = 400
FILE, LINE, FORM, CUT, DOUBLED, SPLIT = range(6)
META = "meta.json"
REPORT_EVERY = 500  # records that are parsed
Report = Callable[[int, int | None], None]
PROGRESS = "progress.json"
NUMBERS, FACTS, THUMBNAILS = "pictures.npy", "pictures.json", "thumbnails"
MOST_OF_ROW = 4  # pictures of a row, or of a text's prompt, that are shown
MOST_KEPT = 2000  # thumbnails of pictures that are no files; further ones are not shown


@dataclass
class IndexedSplit:
    """A split that is being indexed: its rows, the form of each entry, and the entries as tokens."""

    rows: SplitRows = field(default_factory=SplitRows)
    forms: list[str] = field(default_factory=list)
    encoded: Any = None  # Encoded, once all is read


def build_index(asked: dict[str, Any], folder: Path, report: Report = lambda done, total: None) -> None:
    """Encode data, and write the index of its rows.

    Args:
        asked: settings of a run by name, with `data`, and `tokenizer`, the folder of the model's tokenizer.
        folder: to write, completely or not at all.
        report: told how many records are parsed, of None, and then how many are encoded, and of how many.

    Raises:
        InputError: the data cannot be read, or has no usable row at all, as `train` would say; or the model sees no pictures.
    """
    settings = train_settings({name: value for name, value in asked.items() if name != "tokenizer"})
    model = Path(asked["tokenizer"])
    tokenizer, config = _load_tokenizer(model), read_json(model / "config.json", "download the model again")
    pictured, seen = replace(settings, model=replace(settings.model, model=str(model))), None
    if with_pictures(pictured, config).objective.images:
        from mlx_lora.objectives.pictures import Pictures

        # The tokenizer gets the template that shows pictures.
        reader = Pictures(settings.objective).reader(model, config, tokenizer, settings.data)
        seen = reader.fetching(settings.data.fetch_images)
    parts, repeated = _read(settings.data, settings.objective.records, seen is not None, report)
    joined = SplitRows()
    for one in parts.values():
        joined.entries += one.rows.entries
    encoder = prompt_encoder(joined, settings.data, tokenizer, None)
    encoder = encoder if seen is None else seen.encoder(encoder)
    total, before = len(joined.entries), 0
    teacher_prompt = read_teacher_prompt(settings.objective.teacher_prompt)
    for one in parts.values():
        entries = one.rows.entries
        one.encoded = encode_entries(
            encoder, entries, lambda done, start=before: report(start + done, total), teacher_prompt
        )
        before += len(entries)
        for number, why in one.encoded.dropped.items():
            place = one.rows.locations[number]
            one.rows.dropped.append(DroppedRow(place.file, place.line, why, place.unit))
    names = list(dict.fromkeys(form for one in parts.values() for form in one.forms))
    table, files, keys = _examples(parts, names)
    notes = repeated_notes(repeated)
    usable = {name: one for name, one in parts.items() if len(one.encoded.rows)}
    if "train" in usable:
        day = chat_day(settings.data, tokenizer, None) if encoder.template else None
        rows, encoded = ({name: getattr(one, of) for name, one in usable.items()} for of in ("rows", "encoded"))
        notes = notes + data_notes(rows, encoded, keys, encoder, day)
    known = {"files": files, "forms": names, "notes": notes, "max_seq_length": settings.data.max_seq_length}
    with replacing_folder(folder) as temporary:
        _write(temporary, parts, table, known)
        if seen is not None:
            numbers = [part.encoded.rows.pictures for part in parts.values() if len(part.encoded.rows)]
            found = np.concatenate([np.zeros(0, np.int32), *(one for one in numbers if one is not None)])
            write_pictures(temporary, found, seen.table, seen.token)


def _load_tokenizer(folder: Path) -> Any:
    return load_folder_tokenizer(
        folder, read_json(folder / "config.json", "download the model again"), False
    )._tokenizer


def _read(
    settings: DataSettings, records: str, pictures: bool, report: Report
) -> tuple[dict[str, IndexedSplit], list[Repeated]]:
    """Return the rows of each split, and each set's rows whose answers repeat their prompt."""
    parts: dict[str, IndexedSplit] = {}
    repeated, parsed = [], 0
    for one in find_sets(settings.data or ""):
        before = {split: len(part.rows.entries) for split, part in parts.items()}
        for split in SPLITS:
            for file in one.splits.get(split, ()):
                part = parts.setdefault(split, IndexedSplit())
                all_forms = part.rows.formats
                for record in file_records(file, settings, part.rows):  # one by one, so that each entry's form is known
                    part.rows.formats = Counter()
                    parse_rows([record], file.name, file.reading(settings), records, part.rows, pictures)
                    part.forms += [next(iter(part.rows.formats), "")] * (len(part.rows.entries) - len(part.forms))
                    all_forms.update(part.rows.formats)
                    parsed += 1
                    if parsed % REPORT_EVERY == 0:
                        report(parsed, None)
                part.rows.formats = all_forms
        repeated.append(cut_repeated_prompts([(part.rows, before.get(split, 0)) for split, part in parts.items()]))
    check_speaker([part.rows for part in parts.values()], settings)
    return parts, repeated


def _write(folder: Path, parts: dict[str, IndexedSplit], table: np.ndarray, known: dict[str, Any]) -> None:
    """Write the arrays and meta.json, with what else is known."""
    found = [part.encoded.rows for part in parts.values()]
    sizes = np.concatenate([np.zeros(0, np.int64), *(rows.lengths for rows in found)])
    masks = np.concatenate([np.zeros(0, bool), *(rows.mask for rows in found)])
    np.save(folder / "tokens.npy", np.concatenate([np.zeros(0, np.int32), *(rows.tokens for rows in found)]))
    np.save(folder / "mask.npy", masks)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    np.save(folder / "examples.npy", table)
    refused = [(row, split) for split, part in parts.items() for row in part.rows.dropped]
    group = found[0].group if found else 1
    width = max(1, -(-(int(sizes.max(initial=0)) + 1) // BARS))  # of a bar of the histogram
    bars = np.bincount(sizes // width) if len(sizes) else ()
    meta = {
        **known,
        "group": group,
        # Of a rated answer, the row that it is compared with is not shown.
        "shown": (found[0].trained_rows or group) if found else 1,
        "form_counts": dict(sum((part.rows.formats for part in parts.values()), Counter())),
        "counts": {
            "rows": len(table),
            "tokens": int(sizes.sum()),
            "trained_tokens": int(masks.sum()),
            "cut": int(table[:, CUT].sum()),
            "doubled": int((table[:, DOUBLED] >= 0).sum()),
            "refused": len(refused),
            "empty": sum(part.rows.empty for part in parts.values()),
            "longest": int(sizes.max(initial=0)),
        },
        "histogram": [{"from": i * width, "to": (i + 1) * width - 1, "count": int(n)} for i, n in enumerate(bars)],
        "refused": [
            {"file": row.file, "line": row.line, "unit": row.unit, "message": row.why[:MOST_WHY], "split": split}
            for row, split in refused[:MOST_REFUSED]
        ],
    }
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def _examples(
    parts: dict[str, IndexedSplit], names: list[str]
) -> tuple[np.ndarray, list[dict[str, str]], dict[str, list[str]]]:
    """Return the table of examples, the files whose numbers are in it, and the keys of each split's records."""
    files: dict[tuple[str, str], int] = {}
    examples: list[tuple[int, ...]] = []
    keys: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for split, part in parts.items():
        rows, cut = part.rows, set(part.encoded.truncated)
        known: dict[int, str] = {}
        for number in part.encoded.source.tolist():
            place, here = rows.locations[number], len(examples)
            doubled = here
            if number not in known:  # a record may give several rows
                known[number] = content_key(*answers_of(rows.entries[number]))
                doubled = first.setdefault(known[number], here)
            file = files.setdefault((place.file, place.unit), len(files))
            doubled = -1 if doubled == here else doubled
            form = names.index(part.forms[number])
            examples.append((file, place.line, form, number in cut, doubled, SPLITS.index(split)))
        keys[split] = list(known.values())
    named = [{"name": name, "unit": unit} for name, unit in files]
    return np.array(examples, np.int32).reshape(-1, 6), named, keys


def write_pictures(folder: Path, numbers: np.ndarray, table: ImageTable, token: int) -> None:
    """Write what a preview needs of its rows' pictures.

    Args:
        folder: of the index.
        numbers: (R,) int32, of each row in the table.
        table: of the pictures.
        token: id of the image token.
    """
    np.save(folder / NUMBERS, numbers)
    pictures = {}
    (folder / THUMBNAILS).mkdir()
    for digest, picture in table.pictures.items():
        is_file = isinstance(picture.source, Path)
        pictures[digest] = [str(picture.source) if is_file else None, *picture.size, table.shown[digest].tokens]
        if not is_file and len(pictures) <= MOST_KEPT:
            (folder / THUMBNAILS / f"{digest}.jpg").write_bytes(thumbnail(picture.pixels()))
    (folder / FACTS).write_text(
        json.dumps({"rows": table.rows, "pictures": pictures, "token": token}), encoding="utf-8"
    )


@click.command(cls=console.Command)
@click.argument("request", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
def main(request: Path, folder: Path) -> None:
    """Write the index of the data that REQUEST names into FOLDER."""
    asked = json.loads(request.read_text(encoding="utf-8"))

    def report(done: int, total: int | None) -> None:
        replace_text(request.with_name(PROGRESS), json.dumps([done, total]))

    build_index(asked, folder, report)


if __name__ == "__main__":
    sys.exit(main())


# Pages of rows

VERSION = 2
AT_ONCE_BYTES = 1_000_000  # files up to here are encoded while the page waits
KEPT_FOLDERS, KEPT_OPEN, KEPT_TOKENIZERS = 8, 4, 2
MOST_ROW_TOKENS, MOST_ROW_CHARS = 4096, 20_000
FILTERS = ("all", "cut", "doubled", "refused")
# The settings that decide how data is encoded; others do not make another index.
COUNTED = (
    "data", "data_format", "prompt_column", "completion_column", "system_column", "chat_column", "text_column", "label_column", "turn_names",
    "speaker", "conversation_gap", "max_seq_length", "mask_prompt", "chat_template", "chat_date", "allow_special_tokens", "pairs", "objective",
    "teacher_prompt", "on_policy", "images", "max_pixels", "fetch_images",
)  # fmt: skip


class RowPictures:
    """The pictures of an index.

    Attributes:
        token: id of the image token.
    """

    def __init__(self, folder: Path):
        self._folder, self._numbers = folder, np.load(folder / NUMBERS, mmap_mode="r")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.token, self._rows, self._pictures = facts["token"], facts["rows"], facts["pictures"]

    def of_row(self, number: int) -> list[dict[str, Any]]:
        """Return the pictures of a row for the page, in order, the first few with their thumbnails."""
        found = []
        for place, digest in enumerate(self._rows[int(self._numbers[number])]):
            file, width, height, tokens = self._pictures[digest]
            url, kept = None, self._folder / THUMBNAILS / f"{digest}.jpg"
            with contextlib.suppress(InputError, OSError):  # the picture cannot be shown any more
                if place < MOST_OF_ROW and file is not None and not kept.is_file():
                    content = thumbnail(ImageFile(Path(file), digest, (0, 0)).pixels())
                    with replacing_file(kept) as temporary:
                        temporary.write_bytes(content)
                url = jpeg_url(kept.read_bytes()) if place < MOST_OF_ROW else None
            name = "" if file is None else Path(file).name
            found.append({"name": name, "width": width, "height": height, "tokens": tokens, "url": url})
        return found


class Index:
    """One data set's index, mapped into memory."""

    def __init__(self, folder: Path):
        self.meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.pictures = RowPictures(folder) if (folder / NUMBERS).is_file() else None
        self.tokens, self.mask, self.offsets, self.examples = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "mask", "offsets", "examples")
        )
        # The numbers of the examples of a filter.
        cut, doubled = np.flatnonzero(self.examples[:, CUT]), np.flatnonzero(self.examples[:, DOUBLED] >= 0)
        self.chosen = {"cut": cut, "doubled": doubled}

    def place(self, example: int) -> dict[str, Any]:
        """Return where an example is from."""
        row = self.examples[example]
        file = self.meta["files"][int(row[FILE])]
        return {"file": file["name"], "unit": file["unit"], "line": int(row[LINE]), "split": SPLITS[int(row[SPLIT])]}


class Previews:
    """Previews of data, by data, tokenizer and settings."""

    def __init__(self, tasks: Tasks, logs: Path):
        self._tasks, self._logs = tasks, logs
        self._opened = lru_cache(KEPT_OPEN)(Index)
        self._tokenizer = lru_cache(KEPT_TOKENIZERS)(lambda folder, version: _load_tokenizer(folder))
        self._lock = threading.Lock()  # tokenizers are not thread-safe

    def page(self, settings: dict[str, Any], offset: int, limit: int, chosen: str) -> dict[str, Any]:
        """Return a page of rows, or the task that encodes the data.

        Args:
            settings: of the run by name, checked, with `model` and `data`.
            offset, limit: of the page.
            chosen: one of FILTERS.

        Raises:
            InputError: the data or the model's tokenizer cannot be used.
        """
        if chosen not in FILTERS:
            raise ApiError(400, f"filter: must be one of {', '.join(FILTERS)}", "invalid_value", "filter")
        tokenizer = tokenizer_folder(local_model(settings["model"]))
        asked = {name: settings[name] for name in COUNTED if name in settings} | {"tokenizer": str(tokenizer)}
        version = stamps_at(tokenizer)
        with self._lock:
            loaded = self._tokenizer(tokenizer, version)
        # A template may show the day on which the run begins.
        shown = DataSettings(chat_template=asked.get("chat_template"))
        today = None if "chat_date" in asked else chat_day(shown, loaded, None)
        key, size = _key(asked, version, today)
        folder = cache_dir("previews") / key
        if not (folder / META).is_file():
            if size > AT_ONCE_BYTES:
                work = partial(self._build, asked=asked, folder=folder)
                task = self._tasks.begin("data", "Reading the data", work, "records", key)
                empty = {"forms": {}, "histogram": [], "rows": [], "problems": [], "notes": []}
                return {"task": task.public(), "total": None, "counts": None, **empty}
            with self._lock:
                build_index(asked, folder)
            evict(folder.parent, most=KEPT_FOLDERS)
        with self._lock:
            return self._page(self._opened(folder), loaded, offset, limit, chosen)

    def _build(self, task: BackgroundTask, asked: dict[str, Any], folder: Path) -> None:
        """Encode in a child process, and pass on how far it is."""
        room = self._logs / f"data-{task.id}"
        room.mkdir(parents=True)
        (room / "request.json").write_text(json.dumps(asked), encoding="utf-8")

        def watch(task: BackgroundTask) -> None:
            with contextlib.suppress(OSError, ValueError):
                done, total = json.loads((room / PROGRESS).read_text(encoding="utf-8"))
                if (done, total) != (task.done, task.total):
                    said = f"{done:,} records read" if total is None else "Encoding"
                    self._tasks.change(task, done=done, total=total, message=said)

        try:
            words = ["studio.previews", str(room / "request.json"), str(folder)]
            self._tasks.run_child(task, words, room / "log", watch)
        finally:
            shutil.rmtree(room, ignore_errors=True)
        self._tasks.change(task, done=task.total or 0, message="")
        evict(folder.parent, most=KEPT_FOLDERS)

    def _page(self, index: Index, tokenizer: Any, offset: int, limit: int, chosen: str) -> dict[str, Any]:
        meta, rows = index.meta, []
        shown = meta["shown"]
        if chosen == "refused":
            total = len(meta["refused"])
            for number, one in enumerate(meta["refused"][offset : offset + limit], offset):
                rows.append({**_row(number, one), "form": "", "why": in_page_words(one["message"])})
        else:
            numbers = index.chosen.get(chosen)
            examples = len(index.examples) if numbers is None else len(numbers)
            total = examples * shown
            for at in range(offset, min(total, offset + limit)):
                example = at // shown if numbers is None else int(numbers[at // shown])
                rows.append(_encoded_row(index, tokenizer, example, at % shown))
        of_training = index.examples[index.examples[:, SPLIT] == SPLITS.index("train")]
        trained = np.bincount(of_training[:, FILE], minlength=len(meta["files"]))
        return {
            "task": None, "total": total, "forms": meta["form_counts"], "counts": meta["counts"],
            "histogram": meta["histogram"], "rows": rows,
            "problems": [{**one, "message": in_page_words(one["message"])} for one in meta["refused"][:200]],
            "notes": [in_page_words(note) for note in meta["notes"]],
            "max_seq_length": meta["max_seq_length"],
            "trained": {file["name"]: int(n) for file, n in zip(meta["files"], trained, strict=True)},
        }  # fmt: skip


def _row(number: int, place: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": number, "file": place["file"], "line": place["line"], "unit": place["unit"], "split": place["split"],
        "form": "", "part": "", "tokens": 0, "trained_tokens": 0, "cut": False, "doubled_of": None, "spans": [],
        "more_characters": 0, "why": None, "pictures": [],
    }  # fmt: skip


def _encoded_row(index: Index, tokenizer: Any, example: int, part: int) -> dict[str, Any]:
    """Return an example's row, with its text in pieces; a long one is cut for the page."""
    facts, number = index.examples[example], example * index.meta["group"] + part
    row = slice(int(index.offsets[number]), int(index.offsets[number + 1]))
    tokens, mask = np.asarray(index.tokens[row]), np.asarray(index.mask[row])
    spans, left, more = [], MOST_ROW_CHARS, 0
    for text, trained in _pieces(index, tokens[:MOST_ROW_TOKENS], mask[:MOST_ROW_TOKENS], tokenizer):
        if left > 0:
            spans.append({"text": text[:left], "trained": trained})
        more += max(0, len(text) - max(0, left))
        left -= len(text)
    doubled = int(facts[DOUBLED])
    return {
        **_row(example, index.place(example)),
        "form": index.meta["forms"][int(facts[FORM])],
        "part": ("chosen", "rejected")[part] if index.meta["shown"] == 2 else "",
        "tokens": len(tokens), "trained_tokens": int(mask.sum()), "cut": bool(facts[CUT]),
        "doubled_of": None if doubled < 0 else index.place(doubled), "spans": spans,
        "more_characters": more, "more_tokens": max(0, len(tokens) - MOST_ROW_TOKENS),
        "pictures": [] if index.pictures is None else index.pictures.of_row(number),
    }  # fmt: skip


def _pieces(index: Index, tokens: np.ndarray, mask: np.ndarray, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return a row as decoded pieces, (text, trained); of image tokens their number.

    Args:
        index, tokenizer: of the row.
        tokens, mask: (T,).
    """
    if index.pictures is None:
        return row_pieces(tokens, mask, tokenizer)
    pieces: list[tuple[str, bool]] = []
    shown = tokens == index.pictures.token
    edges = [0, *(np.flatnonzero(np.diff(shown)) + 1).tolist(), len(tokens)]
    for a, b in pairwise(edges):
        words = f"[{counted(b - a, 'image token')}]"
        of_part = [(words, False)] if shown[a:b].any() else row_pieces(tokens[a:b], mask[a:b], tokenizer)
        for text, trained in of_part:
            if pieces and pieces[-1][1] == trained:
                text = pieces.pop()[0] + text
            pieces.append((text, trained))
    return pieces


def tokenizer_folder(model: str) -> Path:
    """Return a folder with config.json and the tokenizer of a model, without its weights.

    Raises:
        InputError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return gguf_tokenizer_folder(path)
    if path.is_dir():
        return path
    found = HUB_ID.fullmatch(model)
    if found and found["pick"]:
        raise InputError(f"model {model!r}: a GGUF file on the hub has its tokenizer inside; download it first")
    folder = resolve_tokenizer(model) if found else resolve_config(model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(f"model {model!r}: has no tokenizer.json; choose another model")
    return folder


def _key(asked: dict[str, Any], tokenizer: Stamps, today: date | None) -> tuple[str, int]:
    """Return the name of an index, which changes with all that the rows depend on, and the bytes of the data.

    Args:
        asked: as for `build_index`.
        tokenizer: the stamps of its files.
        today: the day that the rows show, None if they show none or the settings name it.
    """
    data = stamps(file.path for one in find_sets(asked["data"]) for part in one.splits.values() for file in part)
    named = stamps_of_settings(asked)  # a template's, a teacher's prompt
    key = sha256_of(json.dumps([VERSION, sorted(asked.items()), data, named, tokenizer, today], default=str))
    return key[:32], sum(size for _, size, _ in data)

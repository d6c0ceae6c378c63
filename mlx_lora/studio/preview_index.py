"""Encode data for the page once, with the code that encodes it for a run, into arrays from which any page is read fast.

FOLDER/tokens.npy mask.npy offsets.npy     the rows, as `train` would encode them
       examples.npy                        (E, 6) int32: file, line, form, whether cut, the first equal example or -1, split
       meta.json                           names, counts, histogram, refused records, notes

A large data set is encoded in a process of its own, so that the server goes on answering:

    python -m mlx_lora.studio.preview_index REQUEST.json FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings, TrainSettings
from mlx_lora.data.encode import answers_of, encode_entries
from mlx_lora.data.examples import BadRow, Record
from mlx_lora.data.files import DataFile, find_sets
from mlx_lora.data.load import chat_day, prompt_encoder
from mlx_lora.data.mix import content_key
from mlx_lora.data.notes import data_notes
from mlx_lora.data.prompts import read_teacher_prompt
from mlx_lora.data.read import (
    Repeated,
    SplitRows,
    check_speaker,
    cut_repeated_prompts,
    file_records,
    parse_rows,
    repeated_notes,
)
from mlx_lora.data.report import DroppedRow
from mlx_lora.data.tokenize import Encoded
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.table import objective_of
from mlx_lora.utils import console
from mlx_lora.utils.files import replacing_file, replacing_folder
from mlx_lora.utils.parsing import read_json

SPLITS = ("train", "valid", "test")
BARS = 40
MOST_REFUSED = 20_000  # that are listed; all are counted
MOST_WHY = 400
FILE, LINE, FORM, CUT, DOUBLED, SPLIT = range(6)
META = "meta.json"
REPORT_EVERY = 500  # records that are parsed
Report = Callable[[int, int | None], None]
PROGRESS = "progress.json"


def build_index(asked: dict[str, Any], folder: Path, report: Report = lambda done, total: None) -> None:
    """Encode data, and write the index of its rows.

    Args:
        asked: settings of a run by name, with `data`, and `tokenizer`, the folder of the model's tokenizer.
        folder: to write, completely or not at all.
        report: told how many records are parsed, of None, and then how many are encoded, and of how many.

    Raises:
        InputError: the data cannot be read, or has no usable row at all, as `train` would say.
    """
    tokenizer_folder = Path(asked["tokenizer"])
    settings = train_settings({name: value for name, value in asked.items() if name != "tokenizer"})
    config = read_json(tokenizer_folder / "config.json", "download the model again")
    tokenizer: Any = load_folder_tokenizer(tokenizer_folder, config, False)._tokenizer
    records = objective_of(settings.objective).records
    parts, forms, repeated = _read(settings.data, records, report)
    joined = SplitRows()
    for rows in parts.values():
        joined.entries += rows.entries
    encoder = prompt_encoder(joined, settings.data, tokenizer, None)
    total, before = len(joined.entries), 0
    teacher_prompt = read_teacher_prompt(settings.objective.teacher_prompt)
    encoded: dict[str, Encoded] = {}
    for name, rows in parts.items():
        encoded[name] = encode_entries(
            encoder, rows.entries, lambda done, start=before: report(start + done, total), teacher_prompt
        )
        before += len(rows.entries)
        for number, why in encoded[name].dropped.items():
            place = rows.locations[number]
            rows.dropped.append(DroppedRow(place.file, place.line, why, place.unit))
    day = chat_day(settings.data, tokenizer, None) if encoder.template else None
    with replacing_folder(folder) as temporary:
        _write(temporary, settings, parts, forms, encoded, encoder, day, repeated_notes(repeated))


def _read(
    settings: DataSettings, records: str, report: Report
) -> tuple[dict[str, SplitRows], dict[str, list[str]], list[Repeated]]:
    """Return the rows of each split, the form of each entry, and each set's rows whose answers repeat their prompt."""
    parts: dict[str, SplitRows] = {}
    repeated = []
    forms: dict[str, list[str]] = {}
    parsed = 0
    for one in find_sets(settings.data or ""):
        before = {split: len(rows.entries) for split, rows in parts.items()}
        for split in SPLITS:
            for file in one.splits.get(split, ()):
                rows, known = parts.setdefault(split, SplitRows()), forms.setdefault(split, [])
                for _ in _read_file(file, settings, records, rows, known):
                    parsed += 1
                    if parsed % REPORT_EVERY == 0:
                        report(parsed, None)
        repeated.append(cut_repeated_prompts([(rows, before.get(split, 0)) for split, rows in parts.items()]))
    check_speaker(parts.values(), settings)
    return parts, forms, repeated


def _read_file(
    file: DataFile, settings: DataSettings, records: str, rows: SplitRows, forms: list[str]
) -> Iterator[None]:
    """Add a file's records one by one, so that each entry's form is known; yield after each."""
    all_forms = rows.formats
    for record in file_records(file, settings, rows):
        rows.formats = Counter()
        one: list[Record | BadRow] = [record]
        parse_rows(one, file.name, settings, records, rows)
        forms += [next(iter(rows.formats), "")] * (len(rows.entries) - len(forms))
        all_forms.update(rows.formats)
        yield
    rows.formats = all_forms


def _write(
    folder: Path,
    settings: TrainSettings,
    parts: dict[str, SplitRows],
    forms: dict[str, list[str]],
    encoded: dict[str, Encoded],
    encoder: Any,
    day: Any,
    notes: list[str],
) -> None:
    """Write the arrays and meta.json."""
    found = list(encoded.values())
    sizes = np.concatenate([np.zeros(0, np.int64), *(one.rows.lengths for one in found)])
    masks = np.concatenate([np.zeros(0, bool), *(one.rows.mask for one in found)])
    names = list(dict.fromkeys(form for known in forms.values() for form in known))
    table, files, keys = _examples(parts, forms, encoded, names)
    np.save(folder / "tokens.npy", np.concatenate([np.zeros(0, np.int32), *(one.rows.tokens for one in found)]))
    np.save(folder / "mask.npy", masks)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    np.save(folder / "examples.npy", table)
    usable = {name for name, one in encoded.items() if len(one.rows)}
    if "train" in usable:
        kept = {name: rows for name, rows in parts.items() if name in usable}
        notes = notes + data_notes(kept, {name: encoded[name] for name in kept}, keys, encoder, day)
    refused = [(row, split) for split, rows in parts.items() for row in rows.dropped]
    group = found[0].rows.group if found else 1
    meta = {
        "files": [{"name": name, "unit": unit} for name, unit in files],
        "forms": names,
        "group": group,
        # Of a rated answer, the row that it is compared with is not shown.
        "shown": (found[0].rows.trained_rows or group) if found else 1,
        "form_counts": dict(sum((rows.formats for rows in parts.values()), Counter())),
        "counts": {
            "rows": len(table),
            "tokens": int(sizes.sum()),
            "trained_tokens": int(masks.sum()),
            "cut": int(table[:, CUT].sum()),
            "doubled": int((table[:, DOUBLED] >= 0).sum()),
            "refused": len(refused),
            "empty": sum(rows.empty for rows in parts.values()),
            "longest": int(sizes.max(initial=0)),
        },
        "histogram": histogram(sizes),
        "refused": [
            {"file": row.file, "line": row.line, "unit": row.unit, "message": row.why[:MOST_WHY], "split": split}
            for row, split in refused[:MOST_REFUSED]
        ],
        "notes": notes,
        "max_seq_length": settings.data.max_seq_length,
    }
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def _examples(
    parts: dict[str, SplitRows], forms: dict[str, list[str]], encoded: dict[str, Encoded], names: list[str]
) -> tuple[np.ndarray, dict[tuple[str, str], int], dict[str, list[str]]]:
    """Return the table of examples, the number of each (file, unit) in it, and the keys of each split's records."""
    files: dict[tuple[str, str], int] = {}
    examples: list[tuple[int, ...]] = []
    keys: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for split, rows in parts.items():
        cut = set(encoded[split].truncated)
        known: dict[int, str] = {}
        for number in encoded[split].source.tolist():
            place, here = rows.locations[number], len(examples)
            doubled = here
            if number not in known:  # a record may give several rows
                known[number] = content_key(*answers_of(rows.entries[number]))
                doubled = first.setdefault(known[number], here)
            file = files.setdefault((place.file, place.unit), len(files))
            doubled = -1 if doubled == here else doubled
            form = names.index(forms[split][number])
            examples.append((file, place.line, form, number in cut, doubled, SPLITS.index(split)))
        keys[split] = list(known.values())
    return np.array(examples, np.int32).reshape(-1, 6), files, keys


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Return how many rows have lengths in each of some ranges of equal width.

    Args:
        lengths: (R,) int64, tokens.
    """
    if not len(lengths):
        return []
    width = max(1, -(-(int(lengths.max()) + 1) // BARS))
    counts = np.bincount(lengths // width)
    return [{"from": i * width, "to": (i + 1) * width - 1, "count": int(n)} for i, n in enumerate(counts)]


@click.command(cls=console.Command)
@click.argument("request", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
def main(request: Path, folder: Path) -> None:
    """Write the index of the data that REQUEST names into FOLDER."""
    asked = json.loads(request.read_text(encoding="utf-8"))

    def report(done: int, total: int | None) -> None:
        with replacing_file(request.with_name(PROGRESS)) as temporary:
            temporary.write_text(json.dumps([done, total]), encoding="utf-8")

    build_index(asked, folder, report)


if __name__ == "__main__":
    sys.exit(main())

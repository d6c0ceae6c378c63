"""Tell data whose records are prompts alone, and read and write them, so that a teacher can answer them first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lora.data.examples import Record
from mlx_lora.data.prompt_records import Prompt
from mlx_lora.data.reading import Rows, check_speaker, file_records, parse_rows, read_rows
from mlx_lora.settings.config import DataSettings
from mlx_lora.sources.data_sets import find_sets
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import replacing_file

PEEKED = 100  # records of each file that are read to tell whether data has answers
PROMPTS = "prompts"
# Settings for records as the user has them; written ones have our names.
OF_RECORDS = ("data_format", "prompt_column", "completion_column", "system_column", "chat_column", "text_column",
    "turn_names", "speaker", "conversation_gap")  # fmt: skip


def has_unanswered(settings: DataSettings) -> bool:
    """Return whether some of the first training records of --data are prompts without an answer.

    Raises:
        InputError: there is no such data.
    """
    rows = Rows()
    for one in find_sets(settings.data or ""):
        for file in one.splits.get("train", ()):
            parse_rows(islice(file_records(file, settings, rows), PEEKED), file.name, settings, PROMPTS, rows)
    return any(isinstance(entry, Prompt) and not entry.answered for entry in rows.entries)


def read_prompts(settings: DataSettings) -> dict[str, Rows]:
    """Return the records of each split of --data as prompts; those that have an answer keep it.

    Raises:
        InputError: a set has a weight, or no usable record; with --strict, an unusable record.
    """
    sets = find_sets(settings.data or "")
    for one in sets:
        if one.weight != 1:
            raise InputError(
                f"--data {one.name}={one.weight:g}: a weight of prompts that the teacher answers; leave it out, or "
                "train on the answers of an earlier run with it"
            )
    names = [name for name in ("train", "valid", "test") if any(name in one.splits for one in sets)]
    found = {
        name: read_rows([file for one in sets for file in one.splits.get(name, ())], settings, PROMPTS)
        for name in names
    }
    check_speaker(found.values(), settings)
    for name, rows in found.items():
        dropped = rows.dropped[0] if rows.dropped else None
        if dropped and (settings.strict or not rows.entries):
            raise InputError(f"--data, {name}: no prompt in {dropped.location} ({dropped.why}); fix or remove it")
    return found


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines that a person can read and edit."""
    with replacing_file(file) as temporary:
        temporary.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
        )


def written_data(settings: DataSettings, data: Path) -> DataSettings:
    """Return settings for data that `write_records` wrote."""
    defaults: Mapping[str, Any] = {name: getattr(DataSettings(), name) for name in OF_RECORDS}
    return replace(settings, data=str(data), **defaults)

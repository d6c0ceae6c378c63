"""Take data as Python has them: a path or hub id, or records in memory, which become a file in the cache.

    "data.jsonl", "owner/name"                      as the command's --data
    [{"prompt": ..., "completion": ...}, ...]       one set; part of it is held out for validation
    {"train": [...], "validation": [...]}           several sets, as a datasets.DatasetDict has them

The file is named by its content, so run.yaml repeats the run, and equal data is encoded only once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_lora.sources.splits import SPLIT_NAMES
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import replacing_folder, sha256_of

MOST_KEPT = 20  # sets of records in the cache, those used last


def data_source(data: Any) -> str:
    """Return what --data takes for the same data.

    Args:
        data: path, hub id, records (an iterable of dicts, or what has `to_list()`), or records by split.

    Raises:
        InputError: it is none of these, or has a record that is no dict of JSON values.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    sets = {"train": data}
    if isinstance(data, Mapping):
        unknown = [str(name) for name in data if SPLIT_NAMES.get(str(name)) is None]
        if unknown or not data:
            raise InputError(
                f"data: a dict with {', '.join(unknown) or 'nothing in it'}; give a list of records, or records by "
                f"split ({', '.join(SPLIT_NAMES)})"
            )
        sets = {SPLIT_NAMES[str(name)]: records for name, records in data.items()}
    texts = {name: "".join(_lines(name, records)) for name, records in sets.items()}
    if empty := [name for name, text in texts.items() if not text]:
        what = "an empty list" if list(texts) == ["train"] else f"no record in {' and '.join(empty)}"
        raise InputError(f'data: {what}; give at least one record, as in {{"prompt": "...", "completion": "..."}}')
    folder = cache_dir("records") / sha256_of(json.dumps(texts, sort_keys=True))[:32]
    if not folder.is_dir():
        with replacing_folder(folder) as temporary:
            for name, text in texts.items():
                (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")
    os.utime(folder)
    _evict(folder.parent)
    return str(folder / "train.jsonl" if list(texts) == ["train"] else folder)


def _lines(name: str, records: Any) -> Iterator[str]:
    """Yield the records as lines of JSON, so that record n is line n of every report."""
    if callable(getattr(records, "to_list", None)):  # datasets.Dataset: plain values, whatever its format
        records = records.to_list()
    if isinstance(records, bytes) or not isinstance(records, Iterable):
        raise InputError(f"data: found {type(records).__name__}; give a path, a hub id or a list of dicts")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            hint = "; of a table, give table.to_dict('records')" if hasattr(records, "to_dict") else ""
            raise InputError(
                f"data, {name} record {number}: found {type(record).__name__}; each record is a dict, as in "
                f'{{"prompt": "...", "completion": "..."}}{hint}'
            )
        try:
            yield json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"data, {name} record {number}: {error}; keep texts, numbers and lists") from None


def _evict(folder: Path) -> None:
    """Remove the sets of records that were used longest ago."""
    kept = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    for path in kept[:-MOST_KEPT]:
        shutil.rmtree(path, ignore_errors=True)

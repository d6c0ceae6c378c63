"""Cache encoded data on disk, so that the same data is only encoded once.

    <cache>/encoded/<key>/entry.json                 fingerprints, and details that the caller stores
                          train.tokens.npy ...       the arrays of each set, mapped into memory when read

The key covers everything that decides the arrays: the data files' bytes, tokenizer, templates, settings, seed, and the
code in `data/`. An entry is written completely or not at all, and a damaged entry counts as absent. At most MAX_ENTRIES
entries and MAX_BYTES are kept, the most recently used ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.utils.files import cache_dir, replacing_folder, sha256_of

MAX_ENTRIES = 20
MAX_BYTES = 4 * 10**9
STALE_S = 24 * 3600.0  # a temporary folder this old belongs to a process that was killed
ARRAYS = {"tokens": np.int32, "mask": np.bool_, "offsets": np.int64, "labels": np.float32}  # labels may be absent
ENTRY_FILE = "entry.json"
TEACHER = ".teacher"  # after the name of a set: its rows as a teacher sees them


def entry_folder(
    kind: str,
    files: Mapping[str, Sequence[Path]],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    day: date | None = None,
    mixed: Sequence[Any] = (),
) -> Path:
    """Return the folder for this data, encoded in this way; it may not exist yet.

    Args:
        kind: The purpose of the data: a training run's splits or one evaluation set.
        files: Split name -> its data files.
        settings: How to encode them; `data` itself does not count, only the content of the files.
        tokenizer: A fast tokenizer, with its chat template.
        seed: Of the held-out split.
        day: The day that the chat template shows; None if it shows none.
        mixed: What else decides which rows of which files there are, and how often.
    """
    parts = {
        "kind": kind,
        "files": {name: [(path.name, sha256_of(path)) for path in paths] for name, paths in files.items()},
        "settings": {**asdict(settings), "data": None, "chat_date": day and day.isoformat()},
        "template": _template_hash(settings.chat_template),
        "tokenizer": _tokenizer_hash(tokenizer),
        "seed": seed,
        "mixed": mixed,
        "code": _code_hash(),
        "packages": [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return cache_dir("encoded") / sha256_of(json.dumps(parts, sort_keys=True, default=str))[:32]


def read_entry(folder: Path) -> tuple[dict[str, EncodedSet], dict[str, Any]] | None:
    """Return an entry's sets, mapped into memory, and its details; None if it is absent or damaged.

    Args:
        folder: From `entry_folder`.
    """
    try:
        entry = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8"))
        sets = {name: _read_set(folder, name, *entry["groups"][name]) for name in entry["groups"]}
        sets = {
            name: replace(rows, teacher=sets.get(name + TEACHER)) for name, rows in sets.items() if TEACHER not in name
        }
        if {name: rows.fingerprint for name, rows in sets.items()} != entry["fingerprints"]:
            return None
        os.utime(folder)  # the most recently used entries are kept
        return sets, entry["details"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # what a damaged file can raise
        return None


def write_entry(folder: Path, sets: dict[str, EncodedSet], details: dict[str, Any]) -> None:
    """Write an entry, completely or not at all, and remove the entries beyond the limits.

    Args:
        folder: From `entry_folder`.
        sets: Name -> encoded set.
        details: Plain values for JSON, returned by `read_entry`.

    Raises:
        OSError: there is no space or no permission.
    """
    # What a teacher sees of a set's rows is a set of its own.
    seen = {name + TEACHER: rows.teacher for name, rows in sets.items() if rows.teacher is not None}
    with replacing_folder(folder) as temporary:
        for name, rows in {**sets, **seen}.items():
            for array, kind in ARRAYS.items():
                if (values := getattr(rows, array)) is not None:
                    np.save(temporary / f"{name}.{array}.npy", np.asarray(values, kind))
        entry = {
            "fingerprints": {name: rows.fingerprint for name, rows in sets.items()},
            "groups": {name: (rows.group, rows.trained_rows) for name, rows in {**sets, **seen}.items()},
            "details": details,
        }
        (temporary / ENTRY_FILE).write_text(json.dumps(entry), encoding="utf-8")
    _evict(folder.parent)


def _read_set(folder: Path, name: str, group: int, trained_rows: int | None) -> EncodedSet:
    # Use a plain array: each slice of a memmap object would cost more than reading the row.
    parts = {
        array: np.load(file, mmap_mode="r").view(np.ndarray)
        for array in ARRAYS
        if (file := folder / f"{name}.{array}.npy").exists() or array != "labels"
    }
    for array, values in parts.items():
        if values.dtype != ARRAYS[array] or values.ndim != 1:
            raise ValueError(f"{name}.{array} has another dtype or shape")
    return EncodedSet(**parts, group=group, trained_rows=trained_rows)


def _evict(folder: Path) -> None:
    """Remove what a killed process left, and, beyond the limits, the entries that were used longest ago."""
    now = time.time()
    entries = []
    for path in folder.iterdir():
        modified = path.stat().st_mtime
        if not path.name.startswith("."):
            entries.append((modified, path))
        elif now - modified > STALE_S:
            shutil.rmtree(path, ignore_errors=True)
    kept_bytes = 0
    for number, (_, path) in enumerate(sorted(entries, reverse=True)):
        kept_bytes += sum(file.stat().st_size for file in path.iterdir())
        if number and (number >= MAX_ENTRIES or kept_bytes > MAX_BYTES):  # the newest entry always stays
            shutil.rmtree(path, ignore_errors=True)


def _template_hash(name_or_file: str | None) -> str | None:
    """Return a hash of the template file; None for a built-in template, which is part of the code."""
    path = Path(name_or_file).expanduser() if name_or_file else None
    return sha256_of(path) if path and path.is_file() else None


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in a tokenizer that ids, masks and rendered chats depend on."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    core = tokenizer.backend_tokenizer.to_str() if fast else type(tokenizer).__name__
    special = [tokenizer.special_tokens_map, tokenizer.all_special_tokens, tokenizer.eos_token_id]
    return sha256_of(json.dumps([core, tokenizer.chat_template, special], sort_keys=True, default=str))


def _code_hash() -> str:
    """Return a hash of the code that reads and encodes data: if it changes, old arrays must not be used."""
    digest = hashlib.sha256()
    folder = resources.files("mlx_lora.data")
    for part, suffix in ((folder, ".py"), (folder / "templates", ".jinja")):
        for file in part.iterdir():
            if file.name.endswith(suffix):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()

"""Stamps of files, which change when the files do. What the studio keeps of earlier work, it keeps under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_lora.studio.folders import PATHS, files_in
from mlx_lora.utils.hub import CONFIG_AND_TOKENIZER

# Of a folder: what tells a model's or an adapter's shape, tokenizer and templates.
TELLING = (*CONFIG_AND_TOKENIZER, "additional_chat_templates/*.jinja")
Stamps = tuple[tuple[str, int, int], ...]


def stamps(files: Iterable[Path]) -> Stamps:
    """Return path, size in bytes, and time of the last change in ns, of those files that are there."""
    found = ((file, file.stat()) for file in files if file.is_file())
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found)


def stamps_at(path: Path) -> Stamps:
    """Return the stamps of a file, or of a folder's small files; none if there is neither."""
    return stamps(sorted(file for pattern in TELLING for file in path.glob(pattern)) if path.is_dir() else [path])


def stamps_of_settings(settings: Mapping[str, Any]) -> Stamps:
    """Return the stamps of the files and folders that settings name, but for those of model and data."""
    named = dict.fromkeys(file for name in PATHS if settings.get(name) for file in files_in(str(settings[name])))
    return tuple(one for file in named for one in stamps_at(Path(file)))

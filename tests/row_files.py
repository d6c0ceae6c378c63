"""Rows written as JSON lines, loaded as a run loads them, and read back as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from byte_tokenizer import byte_tokenizer

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits, load_data


def write_rows(path: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    """Write rows as JSON lines, texts as they are, and return the file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def loaded(
    data: Path | str, *, records: str = "examples", seed: int = 0, tokenizer: Any = None, **settings: Any
) -> DataSplits:
    """Load data with the tokenizer of bytes; unless the settings say otherwise, nothing is held out."""
    asked = DataSettings(**{"data": str(data), "valid_fraction": 0.0, **settings})
    return load_data(asked, tokenizer or byte_tokenizer(), seed, records=records)


def row_texts(rows: EncodedSet, trained: bool = False) -> list[str]:
    """Return the text of each row, or only what is trained of it."""
    decode = byte_tokenizer().decode
    return [decode((tokens[mask] if trained else tokens).tolist()) for tokens, mask in map(rows.row, range(len(rows)))]

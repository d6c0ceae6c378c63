"""Find the cache folders for what is downloaded, converted and measured."""

from __future__ import annotations

import os
from pathlib import Path

GIVEN = "the list that was given"


def shown_data(data: str) -> str:
    """Return what a person calls a data set: records that Python gave are a file in the cache that they never saw."""
    return GIVEN if Path(data).is_relative_to(cache_dir("records")) else data


def cache_dir(kind: str) -> Path:
    """Return the cache folder for one kind of file; it may not exist yet.

    Args:
        kind: `models`, `data`, `converted`, `encoded`, `runs`, `records`, `reference`, `teacher`, `trunk`, `prompts`,
            `answers`, `blas`, `bin`, `measured` or `locks`.

    Returns:
        `$MLX_LORA_CACHE/<kind>`, by default `~/.cache/mlx_lora/<kind>`.
    """
    root = os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora"
    return Path(root) / kind

"""Read evaluation data by the columns that its adapter was trained with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lora.settings.checks import COLUMNS, settings_problems
from mlx_lora.settings.config import TrainSettings
from mlx_lora.settings.setting_row import flag_of
from mlx_lora.sources.data_sets import find_sets
from mlx_lora.sources.record_types import Record
from mlx_lora.sources.records import read_records
from mlx_lora.system.parsing import parse_yaml

NAMES = (*COLUMNS, "turn_names")


def with_columns_of_run(
    settings: TrainSettings, given: Collection[str], adapter: Path | None, say: Callable[[str], None]
) -> TrainSettings:
    """Return the settings with the columns and turn names of the run that made the adapter, if the data has them.

    Args:
        settings: Of the evaluation.
        given: Settings that the user gave; if one names columns, format or turns, it decides, and not the run.
        adapter: The adapter's folder; one without run.yaml changes nothing.
        say: Called with a line about what was taken.
    """
    if adapter is None or not settings.data.data or not {*NAMES, "data_format"}.isdisjoint(given):
        return settings
    found = {
        name: value for name, value in run_of(adapter).items() if name in NAMES and value and isinstance(value, str)
    }
    changed = replace(settings, data=replace(settings.data, **found))
    if not found or settings_problems(changed.to_flat()) or not _has_columns(settings.data.data, found):
        return settings
    named = ", ".join(f"{flag_of(name)} {value}" for name, value in found.items())
    say(f"Columns as in the run that trained {adapter}: {named}")
    return changed


def run_of(adapter: Path) -> dict[str, Any]:
    """Return the contents of run.yaml, nothing if there is none or it cannot be read."""
    try:
        content = parse_yaml((adapter / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_columns(data: str, found: dict[str, str]) -> bool:
    """Tell whether the first record has one of the columns; names of turns alone are taken for any data."""
    columns = {part.strip() for name, value in found.items() if name in COLUMNS for part in (value, *value.split(","))}
    if not columns:
        return True
    for files in find_sets(data)[0].splits.values():
        for record in read_records(files[0].path, files[0].sheet):
            if isinstance(record, Record):
                return not columns.isdisjoint(record.value)
    return False

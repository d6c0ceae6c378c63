"""Read the data of the run that made an adapter again: what it trained on, and what it held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_lora.api.run_columns import run_of
from mlx_lora.artifacts.run_report import read_facts
from mlx_lora.data.encoded_set import EncodedSet
from mlx_lora.data.loading import DataSplits, load_data
from mlx_lora.settings.config import FIELDS, DataSettings, TrainSettings
from mlx_lora.settings.resolve import train_settings
from mlx_lora.settings.setting_row import flag_of
from mlx_lora.sources.data_sets import find_sets, is_local, named_sets
from mlx_lora.system.errors import InputError

OF_DATA = (*(field.name for field in dataclasses.fields(DataSettings)), "seed", "objective")


def settings_of_run(adapter: Path | None, given: Mapping[str, Any]) -> TrainSettings:
    """Return settings with the data of the run that made an adapter, for measuring the rows that it held out.

    Args:
        adapter: its folder.
        given: the other settings, by name.

    Raises:
        InputError: there is no run of imitation whose data is named, or a setting would change how the data is read.
    """
    run = {} if adapter is None else run_of(adapter)
    found = {name: run[name] for name in OF_DATA if run.get(name) is not None}
    if not found.get("data"):
        raise InputError(
            "--data is required: a data file, or a folder with a test or valid split; only the adapter of a run can do "
            "without, and the rows that the run held out are measured"
        )
    if (objective := given.get("objective") or found.get("objective", "sft")) != "sft":
        raise InputError(f"--data is required with --objective {objective}: name the rows to measure")
    if changed := [flag_of(name) for name in given if name in OF_DATA and name != "objective"]:
        raise InputError(
            f"{', '.join(changed)} without --data: held-out rows are read as the run read them; name the data"
        )
    return train_settings({**found, **given})


def held_out_rows(
    adapter: Path, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[EncodedSet, EncodedSet]:
    """Return the rows that a run held out, its test rows if it has some, and those that it trained on.

    Raises:
        InputError: it held nothing out, or its data is not there as it was.
    """
    splits = data_of_run(adapter, tokenizer, say)
    held_out = splits if isinstance(splits, str) else splits.test or splits.valid
    if isinstance(splits, str) or not isinstance(held_out, EncodedSet):
        why = splits if isinstance(splits, str) else "the run held no rows out"
        raise InputError(f"no --data, and no held-out rows of {adapter}: {why}; give --data FILE")
    return held_out, splits.train


def data_of_run(
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
    most_bytes: float = math.inf,
) -> DataSplits | str:
    """Return the data of the run that made an adapter, split as in the run, or why there is none.

    Args:
        adapter: its folder.
        tokenizer: with the adapter's chat template.
        say: takes lines of progress.
        most_bytes: larger files are not read.
    """
    run = {name: value for name, value in run_of(adapter).items() if name in FIELDS}
    data = run.get("data")
    if not data:
        return "the adapter's folder does not name its data"
    try:
        settings = train_settings(run)
        if settings.objective.objective != "sft":
            return f"the adapter was trained with --objective {settings.objective.objective}"
        if not all(is_local(name) for name, _ in named_sets(data)):
            return "the data of its run is not on this disk"
        if _bytes_of(data) > most_bytes:
            return "the data of its run is large"
        splits = load_data(settings.data, tokenizer, settings.loop.seed, say)
    except InputError as error:
        return f"the data of its run cannot be read ({error})"
    return splits if _as_it_was(adapter, splits) else "the data of its run has changed"


def _as_it_was(adapter: Path, splits: DataSplits) -> bool:
    """Tell whether the training rows have the sizes that the run's report has; without a report nobody knows."""
    known = (read_facts(adapter).get("data") or {}).get("splits", {}).get("train")
    return known is None or known == splits.report.to_dict()["splits"]["train"]


def _bytes_of(data: str) -> int:
    return sum(file.path.stat().st_size for one in find_sets(data) for part in one.splits.values() for file in part)

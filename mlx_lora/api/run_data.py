"""Find the data of the run that made an adapter: the columns that it read, the rows that it held out, and those that it trained on."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import row_of
from mlx_lora.config.rules import settings_problems
from mlx_lora.config.settings import COLUMNS, FIELDS, DataSettings, TrainSettings
from mlx_lora.data.chat_exports import chat_kind
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Record
from mlx_lora.data.files import find_sets, is_local, named_sets
from mlx_lora.data.load import DataSplits, load_data
from mlx_lora.data.records import read_records
from mlx_lora.exporters.adapter_folder import run_of, with_limits_of_run
from mlx_lora.objectives.synthetic_prompts import written_data
from mlx_lora.reports.run_report import read_facts
from mlx_lora.trainer.adapter import with_reference_of_run
from mlx_lora.trainer.run_folder import WRITTEN
from mlx_lora.utils.errors import InputError, refuse

log = logging.getLogger(__name__)


# Settings of a run that say how its data is read: of columns, of chat exports, and all that decide which rows it has.
NAMES = (*COLUMNS, "label_column", "turn_names")
CHAT_COLUMNS = ("speaker", "conversation_gap")
TRAINED_PARTS = ("mask_prompt", "allow_special_tokens")
# Settings of an objective that name code to run or what to fetch: an adapter may be a stranger's, so its run.yaml must not choose them.
NAMED_BY_USER = ("reward", "reward_weights", "environment", "tools", "teacher", "teacher_prompt", "own_prompts")
HOW_COMPUTED = ("shared_prefix", "reward_errors", "reward_timeout")  # settings of an objective that change no loss
DATA_FIELDS = (*(field.name for field in dataclasses.fields(DataSettings)), "seed", "objective")


def with_settings_of_run(settings: TrainSettings, given: Collection[str], adapter: Path | None) -> TrainSettings:
    """Return the settings with those of the run that made the adapter: limits, objective, reference, and columns if the data has them.

    Args:
        settings: of the evaluation.
        given: settings that the user gave; each of them decides, and not the run. If one names columns, format or turns, the
            run's columns are not used.
        adapter: the adapter's folder; one without run.yaml changes nothing.
    """
    if adapter is None:
        return settings
    settings = replace(settings, data=with_limits_of_run(settings.data, given, adapter))
    run, words = run_of(adapter), f"As in the run that trained {adapter}"
    if run.get("objective") == settings.objective.objective:
        ours = asdict(settings.data)
        trained = {
            name: run[name]
            for name in TRAINED_PARTS
            if name not in given and isinstance(run.get(name), bool) and run[name] != ours[name]
        }
        settings = _taken(settings, "data", trained, words)
        names = {*given, *HOW_COMPUTED, *NAMED_BY_USER}  # not those, and no code
        loss = {
            name: run[name]
            for name, value in asdict(settings.objective).items()
            if name in run and name not in names and run[name] != value
        }
        settings = _taken(settings, "objective", loss, words)
    data = settings.data.data
    if data and {*NAMES, *CHAT_COLUMNS, "data_format"}.isdisjoint(given):
        firsts = [files[0].path for files in find_sets(data)[0].splits.values()]
        if isinstance(run.get("speaker"), str) and any(map(chat_kind, firsts)):  # a chat export
            columns = {name: run[name] for name in CHAT_COLUMNS if name in run}
        else:
            columns = {name: value for name, value in run.items() if name in NAMES and value and isinstance(value, str)}
        if columns and _has_columns(data, columns):
            settings = _taken(settings, "data", columns, f"Columns a{words[1:]}")
    return with_reference_of_run(settings, adapter)


def _taken(settings: TrainSettings, section: str, found: Mapping[str, Any], words: str) -> TrainSettings:
    """Return the settings with those of a run in one section, and say so; without them where they exclude each other."""
    changed = replace(settings, **{section: replace(getattr(settings, section), **found)})
    if not found or settings_problems(changed.to_flat()):
        return settings
    log.info(f"{words}: {_flags(found)}")
    return changed


def _flags(settings: Mapping[str, Any]) -> str:
    """Return settings as flags, for a message."""
    words = {True: "{}", False: "--no-{}"}
    return ", ".join(
        words[value].format(flag_of(name) if value else flag_of(name).removeprefix("--"))
        if isinstance(value, bool)
        else f"{flag_of(name)} {value}"
        for name, value in settings.items()
    )


def with_settings_of_runs(settings: TrainSettings, given: Collection[str], adapters: Collection[Path]) -> TrainSettings:
    """Return the settings as `with_settings_of_run` does, for rows that several adapters answer.

    Raises:
        InputError: their runs read other columns.
    """
    found = {folder: with_settings_of_run(settings, given, folder) for folder in adapters}
    columns = {tuple(getattr(one.data, name) for name in (*NAMES, *CHAT_COLUMNS)) for one in found.values()}
    if len(columns) > 1:
        raise InputError(
            f"--data {settings.data.data}: the runs of {', '.join(map(str, found))} read other columns; name those to read "
            "(--prompt-column, --completion-column)"
        )
    return next(iter(found.values()), settings)


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


def settings_of_run(adapter: Path | None, given: Mapping[str, Any]) -> TrainSettings:
    """Return settings with the data of the run that made an adapter, for measuring the rows that it held out.

    Args:
        adapter: its folder.
        given: the other settings, by name.

    Raises:
        InputError: there is no run of imitation whose data is named, or a setting would change how the data is read.
    """
    run = {} if adapter is None else run_of(adapter)
    found = {name: run[name] for name in DATA_FIELDS if run.get(name) is not None}
    objective = given.get("objective") or found.get("objective")
    changed = ", ".join(flag_of(name) for name in given if name in DATA_FIELDS and name != "objective")
    if not found.get("data"):
        raise InputError(
            "--data is required: a data file, or a folder with a test or valid split; only the adapter of a run can do "
            "without, and the rows that the run held out are measured"
        )
    refuse(
        {
            f"--data is required with --objective {objective}: name the rows to measure": not row_of(
                objective
            ).of_answers,
            f"{changed} without --data: held-out rows are read as the run read them; name the data": changed,
        }
    )
    return train_settings({**found, **given})


def held_out_rows(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedSet, EncodedSet]:
    """Return the rows that a run held out, its test rows if it has some, and those that it trained on.

    Raises:
        InputError: it held nothing out, or its data is not there as it was.
    """
    splits = data_of_run(adapter, tokenizer)
    held_out = splits if isinstance(splits, str) else splits.test or splits.valid
    if isinstance(splits, str) or not isinstance(held_out, EncodedSet):
        why = splits if isinstance(splits, str) else "the run held no rows out"
        raise InputError(f"no --data, and no held-out rows of {adapter}: {why}; give --data FILE")
    return held_out, splits.train


def data_of_run(
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    most_bytes: float = math.inf,
) -> DataSplits | str:
    """Return the data of the run that made an adapter, split as in the run, or why there is none.

    Args:
        adapter: its folder.
        tokenizer: with the adapter's chat template.
        most_bytes: larger files are not read.
    """
    run = {name: value for name, value in run_of(adapter).items() if name in FIELDS}
    data = run.get("data")
    if not data:
        return "the adapter's folder does not name its data"
    try:
        settings = train_settings(run)
        if not settings.objective.row.of_answers:
            return f"the adapter was trained with --objective {settings.objective.objective}"
        if not all(is_local(name) for name, _ in named_sets(data)):
            return "the data of its run is not on this disk"
        files = [file for one in find_sets(data) for part in one.splits.values() for file in part]
        if sum(file.path.stat().st_size for file in files) > most_bytes:
            return "the data of its run is large"
        written = settings.data.rephrase and (adapter / WRITTEN).is_dir()
        asked = written_data(settings.data, adapter / WRITTEN) if written else settings.data
        splits = load_data(asked, tokenizer, settings.loop.seed)
    except InputError as error:
        return f"the data of its run cannot be read ({error})"
    # The training rows have the sizes that the run's report has; without a report nobody knows.
    known = (read_facts(adapter).get("data") or {}).get("splits", {}).get("train")
    if known is None or known == splits.report.to_dict()["splits"]["train"]:
        return splits
    return "the data of its run has changed"

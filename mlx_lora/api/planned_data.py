"""Read the data of a run that is planned, with the model's tokenizer and without its weights."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from mlx_lora.data.loading import UNCACHED, DataSplits, load_data
from mlx_lora.data.teacher_rows import read_teacher_prompt
from mlx_lora.models.gguf_tokenizer_folder import gguf_tokenizer_folder
from mlx_lora.models.load import check_highest
from mlx_lora.models.outline import Outline
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.models.vocabulary import embedding_rows
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.runs.teacher_answers import readable_data
from mlx_lora.runs.training_run import check_test_split
from mlx_lora.settings.config import TrainSettings
from mlx_lora.sources.data_sets import find_sets, is_local, named_sets
from mlx_lora.sources.gguf_reader import is_gguf
from mlx_lora.sources.hub import resolve_config
from mlx_lora.sources.splits import TINY_SHAKESPEARE, find_splits, is_dataset_id

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def local_data(settings: TrainSettings, outline: Outline, say: Callable[[str], None]) -> DataSplits | None:
    """Return the run's data; None if some of it is not on this disk, or the model's folder has no tokenizer.

    Raises:
        InputError: --data names what is nowhere, or data that `train` would refuse.
    """
    if settings.data.data is None:  # with --objective distill, the model writes the prompts when the run begins
        return None
    elsewhere = [name for name, _ in named_sets(settings.data.data) if not is_local(name)]
    for name in elsewhere:
        if name != TINY_SHAKESPEARE and not is_dataset_id(name):
            find_splits(name)  # says that there is no such file
    if elsewhere:
        return None
    find_sets(settings.data.data)  # refuses files that cannot be read, without a tokenizer too
    folder = resolve_config(settings.model.model or "", settings.model.revision)
    if folder.is_file() and is_gguf(folder):
        folder = gguf_tokenizer_folder(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return read_splits(settings, folder, outline.config, say)


def read_splits(
    settings: TrainSettings,
    folder: Path,
    config: dict[str, Any],
    say: Callable[[str], None],
    today: date | None = None,
) -> DataSplits:
    """Return the run's data, encoded with the tokenizer in a model's folder.

    Args:
        settings: of the run.
        folder, config: of the model.
        say, today: as for `load_data`.

    Raises:
        InputError: the data cannot be used.
    """
    tokenizer = load_folder_tokenizer(folder, config, settings.model.trust_remote_code)
    prompt = read_teacher_prompt(settings.objective.teacher_prompt)
    data, room = readable_data(settings)
    records = UNCACHED if room else objective_of(settings.objective).records
    splits = load_data(data, tokenizer._tokenizer, settings.loop.seed, say, today, records, prompt)
    if not room:
        return splits
    # Planned as if every answer took all of its room, as it will be only when the teacher has written them.
    return splits.changed(lambda sets: {name: rows.with_room(1, room) for name, rows in sets.items()})


def check_splits(settings: TrainSettings, splits: DataSplits, outline: Outline) -> None:
    """Refuse data that `train` would refuse after reading it.

    Raises:
        InputError: there are tokens that the model does not have, or --test without a test split.
    """
    data, limit = settings.data.data, embedding_rows(outline.model, outline.config)
    check_test_split(settings, splits)
    for rows in filter(None, (splits.train, splits.valid, splits.test)):
        check_highest(limit, int(rows.tokens.max(initial=0)), f"--data {data}", settings.model.model or "")

"""What a run is asked for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.guards import LOSS
from mlx_lora.trainer.run_folder import continues_here, holds_adapter
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.load import DataSplits
    from mlx_lora.parallel.ranks import Ranks


def wants_training(settings: TrainSettings) -> bool:
    """Train unless only --test was asked for, as in mlx_lm.lora."""
    return bool(settings.loop.train) or not settings.loop.test


def check_request(
    settings: TrainSettings, ranks: Ranks, functions: Mapping[str, Callable[..., Any]] | None = None
) -> None:
    """Refuse, before anything is loaded, a run whose results could not be written or would overwrite others'."""
    objective_of(settings.objective).check(settings.objective, functions or {})
    loop, trains = settings.loop, wants_training(settings)
    if loop.metric_for_best_model != LOSS or settings.data.ask or loop.eval_tasks:
        from mlx_lora.trainer.validation_task import check_task  # few runs need it

        check_task(settings)
    needed = {"--model": settings.model.model, "--data": settings.data.data, "--adapter-path": loop.adapter_path}
    if settings.objective.row.taught:
        del needed["--data"]  # without it, the model writes the prompts itself
    missing = [flag for flag, value in needed.items() if not value]
    single = {"--test without --train": not trains, "--max-restarts": loop.max_restarts, "--ask": settings.data.ask}
    alone = [flag for flag, asked in single.items() if asked]
    if alone and ranks.size > 1:
        raise InputError(
            f"{' and '.join(alone)} in {ranks.size} processes: works in a single process only; start it without a launcher"
        )
    if missing:
        raise InputError(
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} required (--help says what each takes)"
        )
    if not trains or not ranks.leads:
        return
    folder = Path(loop.adapter_path)
    check_writable(folder, "--adapter-path", needed_bytes=1_000_000)
    if holds_adapter(folder) and not (loop.force or continues_here(loop)):
        raise InputError(
            f"--adapter-path {folder}: already holds an adapter; choose another folder, --resume to continue, or --force to overwrite it"
        )


def check_test_split(settings: TrainSettings, splits: DataSplits) -> None:
    """Refuse --test without a test split, before the training and not after it."""
    if settings.loop.test and splits.test is None:
        raise InputError(
            f"--test: {splits.report.data} has no test split; add a test file to the folder, or leave --test out"
        )

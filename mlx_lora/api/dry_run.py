"""Plan a training run as `train` would begin it: read the data, report on it, and refuse what `train` would refuse."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mlx_lora.api.plan import plan_run
from mlx_lora.api.plan_data import (
    read_splits,
)
from mlx_lora.compat.foreign import TOKENIZER
from mlx_lora.config.settings import ROWS, TrainSettings
from mlx_lora.models.convert import cached_gguf_folder
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.teacher import check_teacher
from mlx_lora.objectives.teacher_answers import readable_data
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.trainer.choose_strategy import settled_offload
from mlx_lora.trainer.run import check_request, wants_training
from mlx_lora.trainer.run_folder import check_continuation, find_checkpoint, first_day
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_model
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import gigabytes

if TYPE_CHECKING:
    from mlx_lora.data.load import DataSplits
    from mlx_lora.models.meta import Outline
    from mlx_lora.objectives.base import Objective
    from mlx_lora.trainer.checkpoint import Checkpoint


log = logging.getLogger(__name__)


def dry_run(settings: TrainSettings) -> dict[str, Any]:
    """Read a run's data, report on it and return the run's plan. Nothing is trained, and no run folder is written.

    The model's files are downloaded as `train` would, and its tokenizer is used, but its weights are not loaded.

    Raises:
        InputError: settings, model, data or run folder that `train` would refuse, or a run that does not fit.
    """
    check_request(settings, ALONE)
    if not wants_training(settings):
        raise InputError("--dry-run: nothing would be trained with --test alone; give --train too")
    with waiting("Planning the run"):
        return _planned(settings)


def _planned(settings: TrainSettings) -> dict[str, Any]:
    settings = settled_offload(settings, ALONE)
    model = settings.model
    source = resolve_model(model.model or "", model.revision, trust_remote_code=model.trust_remote_code)
    folder = cached_gguf_folder(source) if source.kind == "gguf" else source.path

    found = find_checkpoint(settings.loop, ALONE)

    def read(outline: Outline, objective: Objective) -> DataSplits | None:
        if readable_data(settings)[0].data is None:
            log.info(
                "Data: the model writes the prompts itself when the run begins; planned for rows of --max-seq-length"
            )
            return None
        splits = read_splits(settings, folder, outline.config, objective, first_day(settings.loop))
        log.info(splits.report.render())
        if settings.objective.teacher:
            tokenizer = load_folder_tokenizer(folder, outline.config, model.trust_remote_code)
            check_teacher(settings, TOKENIZER.of(tokenizer))
        if found is not None:
            _check_resume(settings, splits, found)
        return splits

    result = plan_run(settings, read=read, identity=found and found.identity)
    if not result["fits"] and not result["not_known"] and settings.loop.memory_check:
        raise InputError(
            f"this run: needs {gigabytes(result['needed_bytes'])} at its peak by the plan, and may use "
            f"{gigabytes(result['budget_bytes'])}; {result['advice']}, or --no-memory-check to try it anyway"
        )
    return result


def _check_resume(settings: TrainSettings, splits: DataSplits, found: Checkpoint) -> None:
    """Refuse a checkpoint of a run with other settings or data; what only a loaded model tells is not compared."""
    rows = objective_of(settings.objective).targets_of(splits.train)
    asked = {name: value for name, value in settings.to_flat().items() if not ROWS[name].may_change}
    known = {name: value for name, value in asked.items() if value is not None}
    check_continuation(found, {**found.identity, **known, "rows": rows.fingerprint})

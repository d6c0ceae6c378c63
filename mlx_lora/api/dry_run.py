"""Say what a run would train on and whether it fits, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lora.api.planned_data import read_splits
from mlx_lora.api.run_plan import plan_run
from mlx_lora.artifacts.checkpoint import Checkpoint
from mlx_lora.artifacts.run_folder import check_continuation, find_checkpoint, first_day
from mlx_lora.data.loading import DataSplits
from mlx_lora.models.converted_models import cached_gguf_folder
from mlx_lora.models.outline import Outline
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.runs.teacher_answers import readable_data
from mlx_lora.runs.training_run import check_request, wants_training
from mlx_lora.settings.config import ROWS, TrainSettings
from mlx_lora.sources.hub import resolve_model
from mlx_lora.system.distributed import ALONE
from mlx_lora.system.errors import InputError
from mlx_lora.system.long_task import waiting
from mlx_lora.system.units import gigabytes
from mlx_lora.training.run_fit import check_base_fits
from mlx_lora.training.teacher import check_teacher


def dry_run(settings: TrainSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Read a run's data, report on it and return the run's plan. Nothing is trained, and no run folder is written.

    The model's files are downloaded as `train` would, and its tokenizer is used, but its weights are not loaded.

    Args:
        settings: of the run.
        say: takes lines of progress and the report on the data.

    Raises:
        InputError: settings, model, data or run folder that `train` would refuse, or a run that does not fit.
    """
    check_request(settings, ALONE)
    if not wants_training(settings):
        raise InputError("--dry-run: nothing would be trained with --no-train or --test alone; give --train too")
    with waiting("Planning the run", say):
        return _planned(settings, say)


def _planned(settings: TrainSettings, say: Callable[[str], None]) -> dict[str, Any]:
    check_base_fits(settings)
    model = settings.model
    source = resolve_model(model.model or "", model.revision, trust_remote_code=model.trust_remote_code)
    folder = cached_gguf_folder(source) if source.kind == "gguf" else source.path

    found = find_checkpoint(settings.loop, ALONE, say)

    def read(outline: Outline) -> DataSplits | None:
        if readable_data(settings)[0].data is None:
            say("Data: the model writes the prompts itself when the run begins; planned for rows of --max-seq-length")
            return None
        splits = read_splits(settings, folder, outline.config, say, first_day(settings.loop))
        say(splits.report.render())
        if settings.objective.teacher:
            tokenizer = load_folder_tokenizer(folder, outline.config, model.trust_remote_code)
            check_teacher(settings, tokenizer._tokenizer)
        if found is not None:
            _check_resume(settings, splits, found)
        return splits

    result = plan_run(settings, say=say, read=read, identity=found and found.identity)
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

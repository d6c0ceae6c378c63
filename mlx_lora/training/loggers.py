"""Send a run's reports to wandb or swanlab (`--report-to`)."""

from __future__ import annotations

from typing import Any

from mlx_lora.settings.config import TrainSettings
from mlx_lora.system.errors import InputError
from mlx_lora.training.progress import Metrics


def reporting_sinks(settings: TrainSettings) -> list[Any]:
    """Return the functions that take reports for --report-to; they call mlx-lm's wandb and swanlab callbacks."""
    if not settings.loop.report_to:
        return []
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    folder, name = settings.loop.adapter_path, settings.loop.project_name
    try:
        callback: Any = get_reporting_callbacks(
            settings.loop.report_to,
            project_name=name,
            log_dir=folder,
            config=settings.to_flat(),  # pyright: ignore[reportArgumentType] # a table, whatever mlx-lm says
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"--report-to {settings.loop.report_to}: {error}; install it, or leave the flag out") from None

    def sink(record: Metrics) -> None:
        if record.val_loss is not None:
            callback.on_val_loss_report({"iteration": record.step, "val_loss": record.val_loss})
        if record.loss is not None:
            callback.on_train_loss_report(
                {"iteration": record.step, "train_loss": record.loss, "learning_rate": record.learning_rate}
            )

    return [sink]

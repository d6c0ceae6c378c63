"""Callbacks that log a run with TensorBoard, trackio, wandb or swanlab, each with its own package (`--report-to`)."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_lora.settings.config import LOGGERS, TrainSettings
from mlx_lora.system.errors import InputError
from mlx_lora.training.callbacks import Callback, Facts

PROJECT = "mlx-lora"  # where none is named


def package_of(logger: str, module: str) -> ModuleType:
    """Import a logger's package.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"--report-to {logger}: {module} cannot be imported ({error}); pip install 'mlx-lora[{logger}]', or leave "
            f"{logger} out"
        ) from None


def numbers_of(facts: Facts, group: str) -> dict[str, float]:
    """Return the finite numbers of a line of metrics.jsonl as `group/name`; validations have no throughput."""
    kept = {name: value for name, value in facts.items() if type(value) in (int, float) and math.isfinite(value)}
    if group == "valid":
        unused = (
            "learning_rate",
            "grad_norm",
            "examples",
            "positions",
            "padding_fraction",
            "skipped_steps",
            "elapsed_s",
        )
        kept = {k: v for k, v in kept.items() if k not in unused and not k.endswith(("tokens", "_per_s", "_bytes"))}
        kept["loss"] = kept.pop("val_loss", math.nan)
    return {f"{group}/{name}": value for name, value in kept.items() if name != "step" and math.isfinite(value)}


class TensorBoard(Callback):
    """Writes event files for TensorBoard, with the package tensorboardX: `tensorboard --logdir FOLDER` shows them."""

    def __init__(self, folder: str | Path | None = None):
        """Take the folder of the event files; None: `tensorboard` in the run's folder."""
        self._package, self._folder, self._writer = package_of("tensorboard", "tensorboardX"), folder, None

    def on_start(self, facts: Facts) -> None:
        folder = self._folder or Path(facts["adapter_path"]) / "tensorboard"
        self._writer: Any = self._package.SummaryWriter(str(folder))
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts["settings"].items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def _add(self, facts: Facts, group: str) -> None:
        for name, value in numbers_of(facts, group).items():
            self._writer.add_scalar(name, value, facts["step"])
        self._writer.flush()

    def on_report(self, facts: Facts) -> None:
        self._add(facts, "train")

    def on_validation(self, facts: Facts) -> None:
        self._add(facts, "valid")

    def on_end(self, facts: Facts) -> None:
        if self._writer is not None:
            self._writer.close()


class _Tracker(Callback):
    """What trackio, wandb and swanlab have in common: `init`, `log(numbers, step=)` and `finish`."""

    def __init__(self, name: str, project: str | None):
        self._package, self._project, self._begun = package_of(name, name), project or PROJECT, False

    def on_start(self, facts: Facts) -> None:
        folder = str(facts["adapter_path"])
        self._package.init(project=self._project, config=facts["settings"], **self._where(folder))
        self._begun = True

    def _where(self, folder: str) -> dict[str, Any]:
        """Return the arguments of `init` that say where files go."""
        return {}

    def on_report(self, facts: Facts) -> None:
        self._package.log(numbers_of(facts, "train"), step=facts["step"])

    def on_validation(self, facts: Facts) -> None:
        self._package.log(numbers_of(facts, "valid"), step=facts["step"])

    def on_end(self, facts: Facts) -> None:
        if self._begun:
            self._package.finish()


class Trackio(_Tracker):
    """Logs with trackio, which keeps its runs on this machine: `trackio show` opens them."""

    def __init__(self, project: str | None = None):
        """Take the project's name; None: mlx-lora."""
        super().__init__("trackio", project)


class Wandb(_Tracker):
    """Logs with Weights & Biases; `WANDB_MODE=offline` keeps the run on this machine."""

    def __init__(self, project: str | None = None):
        """Take the project's name; None: mlx-lora."""
        super().__init__("wandb", project)

    def _where(self, folder: str) -> dict[str, Any]:
        return {"dir": folder}


class SwanLab(_Tracker):
    """Logs with SwanLab; `SWANLAB_MODE=local` keeps the run on this machine."""

    def __init__(self, project: str | None = None):
        """Take the project's name; None: mlx-lora."""
        super().__init__("swanlab", project)

    def _where(self, folder: str) -> dict[str, Any]:
        return {"logdir": str(Path(folder) / "swanlog")}


def logger_callbacks(settings: TrainSettings) -> list[Callback]:
    """Return the callbacks that --report-to names.

    Raises:
        InputError: a logger's package is not installed.
    """
    project, made = settings.loop.project_name, []
    makers = {"trackio": Trackio, "wandb": Wandb, "swanlab": SwanLab}
    for name in LOGGERS:
        if name in named_loggers(settings.loop.report_to):
            made.append(TensorBoard() if name == "tensorboard" else makers[name](project))
    return made


def named_loggers(report_to: str | None) -> list[str]:
    """Return the names in --report-to."""
    return [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]

"""Call a user's callbacks during a run, and those that log it with TensorBoard, trackio, wandb or swanlab (`--report-to`).

An error in a callback ends the run after a save, and the message names the callback. Each logger needs its own package.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_lora.config.settings import LOGGERS, TrainSettings
from mlx_lora.utils.errors import InputError, RunError

Facts = dict[str, Any]


class Callback:
    """What a run tells; make a subclass with the methods that you need, and pass an instance to `train(callbacks=...)`.

    Each method takes one plain dict, a copy that it may keep. An exception in a method ends the run as Ctrl-C does:
    the step is finished, adapter and checkpoint are saved, and `train` raises a RunError that names the method.
    """

    def on_start(self, facts: Facts) -> None:
        """Called before the first step.

        Args:
            facts: `settings` (all of the run, as in run.yaml), `steps` of the whole run, `adapter_path`.
        """

    def on_step(self, facts: Facts) -> None:
        """Called after every optimizer step, while the device may still compute it; there is no loss yet.

        Args:
            facts: `step` (from 1), `steps`.
        """

    def on_report(self, facts: Facts) -> None:
        """Called every `steps_per_report` steps, with the means since the last report.

        Args:
            facts: a line of metrics.jsonl: `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_s` ...
        """

    def on_validation(self, facts: Facts) -> None:
        """Called after every validation.

        Args:
            facts: a line of metrics.jsonl: `step`, `epoch`, `val_loss`, and what the objective reports.
        """

    def on_save(self, facts: Facts) -> None:
        """Called after the adapter, and with `save_every` a checkpoint, was written.

        Args:
            facts: `step`, `adapter_path`.
        """

    def on_end(self, facts: Facts) -> None:
        """Called once at the end, also of a run that fails; close files here.

        Args:
            facts: `steps` taken, `val_loss`, `interrupted`, `stopped_early`, `adapter_path` and `error` (None, or its
                text; without the first four where the run failed).
        """


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """All callbacks of a run, and what went wrong in one of them."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        """Check the callbacks.

        Raises:
            InputError: one is no Callback, or has a method `on_...` that a run never calls.
        """
        for callback in callbacks:
            if not isinstance(callback, Callback):
                found = f"{callback.__name__} is a class or function" if callable(callback) and hasattr(
                    callback, "__name__") else f"found {type(callback).__name__}"  # fmt: skip
                raise InputError(f"callbacks: {found}; give instances of a subclass of mlx_lora.Callback")
            for name in dir(callback):
                if name.startswith("on_") and name not in EVENTS:
                    close = difflib.get_close_matches(name, EVENTS, n=1)
                    advice = f"did you mean {close[0]}?" if close else f"a run calls {', '.join(EVENTS)}"
                    raise InputError(f"callbacks: {type(callback).__name__}.{name} is never called; {advice}")
        self._callbacks = callbacks
        self._failed: tuple[str, Exception] | None = None

    def failed(self) -> bool:
        """Tell whether a callback raised an exception, after which none is called except for the end."""
        return self._failed is not None

    def tell(self, event: str, facts: Facts) -> None:
        """Call one method of every callback, one of EVENTS, unless one failed before."""
        for callback in self._callbacks:
            if self._failed is None:
                self._call(callback, event, facts)

    def _call(self, callback: Callback, event: str, facts: Facts) -> None:
        try:
            getattr(callback, event)(dict(facts))
        except Exception as error:  # anything: it is the user's code
            if self._failed is None:
                self._failed = (f"{type(callback).__name__}.{event}", error)

    @contextmanager
    def around(self, steps: int, settings: Facts) -> Iterator[Facts]:
        """Call `on_start`, run what is inside, and call `on_end` of every callback, also of one that failed.

        Args:
            steps: of the whole run.
            settings: as in run.yaml.

        Yields:
            What `on_end` gets; the run inside adds its outcome.
        """
        ending: Facts = {"adapter_path": settings["adapter_path"], "error": None}
        try:
            self.tell("on_start", {"settings": settings, "steps": steps, "adapter_path": settings["adapter_path"]})
            yield ending
        except BaseException as error:
            ending["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            if self._failed is not None:
                ending["error"] = ending["error"] or "{}: {!r}".format(*self._failed)
            for callback in self._callbacks:
                self._call(callback, "on_end", ending)

    def raise_failure(self, kept: str) -> None:
        """Raise the error of a callback, if there was one.

        Args:
            kept: what the run leaves, for the message.

        Raises:
            RunError: it names the callback's method.
        """
        if self._failed is not None:
            name, error = self._failed
            raise RunError(f"callback {name} failed ({type(error).__name__}: {error}); {kept}") from error


# Loggers (--report-to)

PROJECT = "mlx-lora"  # where none is named


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

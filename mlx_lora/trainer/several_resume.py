"""Find where several runs go on together: the last round at which every run has a checkpoint, unless it had ended by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora.config.settings import TrainSettings
from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.trainer.run_folder import CHECKPOINTS, holds_adapter
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

TOGETHER_FILE = "together.json"


@dataclass(frozen=True)
class Left:
    """What an earlier start of a run left in its folder.

    Attributes:
        steps: of its checkpoints.
        ended: the step after which it was over; None: it was not.
        error: what ended it, if it failed.
        length: its --iters and --epochs, if it took all of its steps; None: it ended earlier, or is not known to have.
    """

    steps: frozenset[int]
    ended: int | None = None
    error: str | None = None
    length: list[Any] | None = None

    def is_over(self, at: int) -> bool:
        """Return whether the run had ended by a round, and so need not go on from there."""
        return self.ended is not None and 0 < self.ended <= at

    @classmethod
    def of(cls, folder: Path) -> Left:
        """Read a run folder."""
        steps = frozenset(step for step, _ in numbered(folder / CHECKPOINTS))
        file = folder / TOGETHER_FILE
        state = read_json(file, "start the runs again with --force") if file.is_file() else {}
        ended, error = state.get("ended"), state.get("error")
        error, length = error if isinstance(error, str) else None, state.get("length")
        return cls(steps, ended if type(ended) is int else None, error, length if isinstance(length, list) else None)

    def goes_on(self, settings: TrainSettings, at: int) -> bool:
        """Tell whether a run that took all of its steps is to go on, because its settings have another length now.

        Raises:
            InputError: it ended before the round from which the runs go on.
        """
        if self.error or self.length is None or self.length == length_of(settings):
            return False
        if self.ended != at or at not in self.steps:
            raise InputError(
                f"--resume: {settings.loop.adapter_path} ended at step {self.ended}, and the runs go on from step {at}, so its "
                "length cannot be changed; resume it by itself"
            )
        return True


def length_of(settings: TrainSettings) -> list[Any]:
    """Return what decides how long a run is."""
    return [settings.loop.iters, settings.loop.epochs]


def common_round(left: Sequence[Left]) -> int:
    """Return the last round at which every run has a checkpoint, or was over; 0: they begin."""
    rounds = sorted({0}.union(*(run.steps for run in left)), reverse=True)
    return next(at for at in rounds if not at or all(at in run.steps or run.is_over(at) for run in left))


def resumed(runs: Sequence[TrainSettings]) -> tuple[list[TrainSettings], list[Left], int]:
    """Return settings that go on from where all runs were last together, what each had left, and the round."""
    left = [Left.of(Path(settings.loop.adapter_path)) for settings in runs]
    at = common_round(left)
    found = []
    for settings in runs:
        place = str(Path(settings.loop.adapter_path) / CHECKPOINTS / f"step-{at:06d}") if at else None
        found.append(replace(settings, loop=replace(settings.loop, resume=place, force=at == 0)))
    return found, left, at


def refuse_to_lose(runs: Sequence[TrainSettings], names: Sequence[str], left: Sequence[Left]) -> None:
    """Raise InputError if runs have checkpoints and none in common, unless a kill during the first saving left them so.

    So it does if all have adapters and no checkpoints, or one has an adapter and no checkpoint because it was over.
    """
    trained = [
        name
        for name, settings, one in zip(names, runs, left, strict=True)
        if not one.steps and holds_adapter(Path(settings.loop.adapter_path))
    ]
    over = [name for name, one in zip(names, left, strict=True) if one.ended is not None and one.error is None]
    if len(trained) == len(runs) or set(trained) & set(over):
        raise InputError(
            f"--resume: {', '.join(trained)} hold adapters, and no checkpoints to go on from; give --force to replace them"
        )
    saved = frozenset[int]().union(*(one.steps for one in left))
    begun = all((Path(settings.loop.adapter_path) / "run.yaml").is_file() for settings in runs)
    if saved and not (begun and len(saved) == 1):
        last = ", ".join(f"{name}: {max(one.steps, default='none')}" for name, one in zip(names, left, strict=True))
        advice = "resume each by itself, or to begin all again, give --force instead"
        raise InputError(f"--resume: the runs have no checkpoint in common (last steps: {last}); {advice}")

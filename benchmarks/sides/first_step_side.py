"""The child of first_step.py: run `mlx-lora train` in this process, time its phases, and end after the first step.

    first_step_side.py OUT.json STARTED train --model ...

STARTED is the parent's time.monotonic() before it started this process. Phases are functions of mlx_lora, wrapped as their
modules are imported, so that lines appear when they do for a user. A phase has its own time, without that of phases inside.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

OTHER = "everything else"
# Module -> name in it -> phase. A name that a checkout does not have is left out.
PHASES = {
    "mlx_lora.trainer.run": {
        "check_base_fits": "whether the base fits", "load_base": "load the model",
        "build_run": "build the run, the rest",
    },
    "mlx_lora.models.load": {
        "base_fingerprint": "fingerprint of the model", "use_measured_matmul": "measure the two matmuls",
        "load_folder_tokenizer": "load the tokenizer",
    },
    "mlx_lora.trainer.build": {
        "adapt": "put the adapter on", "shape_of": "read the blocks' graphs", "fit_settings": "plan memory",
        "training_plan": "plan batches", "choose_held_out": "choose held-out rows",
        "choose_step_variant": "try to differentiate", "choose_trunk": "frozen blocks", "Step": "make the step",
        "check_same": "agree with other ranks", "take_first_ranks": "agree with other ranks",
    },
    "mlx_lora.losses.agree": {
        "choose_loss": "compare the loss", "choose_model_kernels": "choose kernels", "check_kernels": "compare kernels",
    },
    "mlx_lora.objectives.base": {"load_data": "read and tokenize the data"},
    "mlx_lora.losses.fused": {"loss_figures": "measure losses"},
    "mlx_lora.kernels.choose": {"measured_now": "measure kernels"},
    "mlx_lora.trainer.callbacks": {"RunPage._write_first_texts": "texts before training"},
    "mlx_lora.trainer.trainer": {"mean_loss": "validation before training"},
    "mlx_lora.trainer.step": {"Step.__call__": "the first step"},
}  # fmt: skip


class Clock:
    """Adds up wall and processor seconds by phase; processor seconds include those of compilers.

    Attributes:
        ended: called at the end of each phase.
    """

    def __init__(self, started_s: float):
        self.ended: Callable[[], None] = lambda: None
        self.phases: dict[str, list[float]] = {"start Python": [time.monotonic() - started_s, _processor_s()]}
        self._open = [OTHER]
        self._since = time.monotonic(), _processor_s()

    def turn(self) -> None:
        """Book the time since the last turn on the innermost phase."""
        now = time.monotonic(), _processor_s()
        booked = self.phases.setdefault(self._open[-1], [0.0, 0.0])
        for kind in range(2):
            booked[kind] += now[kind] - self._since[kind]
        self._since = now

    def enter(self, phase: str) -> None:
        self.turn()
        self._open.append(phase)

    def leave(self) -> None:
        self.turn()
        self._open.pop()
        self.ended()

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return the function, with its time booked on a phase."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call


def _processor_s() -> float:
    own, compilers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + compilers.ru_utime + compilers.ru_stime


class Wrapping(importlib.abc.MetaPathFinder):
    """Wraps the phases of a module as soon as it is imported, and times imports of heavy packages."""

    def __init__(self, clock: Clock, first_step: Callable[[Any], None]):
        self._clock, self._first_step = clock, first_step

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        heavy = name in ("mlx.core", "mlx_lm", "transformers", "mlx_lora.train")
        if name not in PHASES and not heavy:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._clock.enter("imports")
            execute(module)
            self._clock.leave()
            self._wrap(name, module)

        spec.loader.exec_module = exec_module
        return spec

    def _wrap(self, name: str, module: ModuleType) -> None:
        for path, phase in PHASES.get(name, {}).items():
            *owners, last = path.split(".")
            owner = functools.reduce(lambda of, part: getattr(of, part, None), owners, module)
            function = getattr(owner, last, None)
            if function is None:
                continue
            if path == "Step.__call__":
                function = self._to_the_end(function)
            setattr(owner, last, self._clock.timed(function, phase))

    def _to_the_end(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that is computed when it returns, and after which the process ends."""

        def call(*args: Any, **kwargs: Any) -> None:
            import mlx.core as mx

            result = step(*args, **kwargs)
            mx.eval(result)
            self._first_step(result)

        return call


def main() -> None:
    """Run the command until its first step is done."""
    out, started_s, *command = sys.argv[1:]
    clock = Clock(float(started_s))

    def write(**more: Any) -> None:
        spent = {"wall_s": time.monotonic() - float(started_s), "processor_s": _processor_s()}
        found = json.dumps({**spent, "phases": clock.phases, **more})
        Path(out).write_text(found, encoding="utf-8")

    def first_step(result: Any) -> None:
        clock.turn()
        tasks = Path("/proc/self/task")
        threads = len(list(tasks.iterdir())) if tasks.exists() else None
        write(loss=result.loss_sum.item() / max(1.0, result.count.item()), threads=threads)
        sys.stderr.flush()
        os._exit(0)  # the run is not wanted

    clock.ended = write  # so that a run that takes too long is not lost
    sys.meta_path.insert(0, Wrapping(clock, first_step))
    sys.argv = ["mlx-lora", *command]
    from mlx_lora.__main__ import main as command_line

    command_line(prog_name="mlx-lora")


if __name__ == "__main__":
    main()

"""`train_several`: several runs on one base at once, each with its own folder, data and settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.api.base import Base, PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.train import Run, data_source, run_settings
from mlx_lora.trainer.several_runs import SeveralRuns, failures
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted


@speaks_python()
def train_several(base: Base | PathLike, runs: Sequence[Mapping[str, Any]], *, progress: bool = True) -> list[Run]:
    """Train several adapters on one base at once, each as if alone, and return their results in the same order.

    The base computes once for the rows of all runs, so small batches take less time than one run after another
    (docs/training.md). The base itself stays as it is.

    Args:
        base: from `load`, or a model's name.
        runs: of each run what `train` takes: `data`, an `adapter_path` of its own, and settings by name.
        progress: show lines of progress, each with the name of its run's folder; False: print nothing.

    Raises:
        InputError: runs that cannot be trained together, or see `train`.
        RunError: some runs failed; the results of the others are in their folders.
    """
    if len(runs) < 2:
        raise InputError(f"train_several: found {counted(len(runs), 'run')}; give two or more, or call train for one")
    base = as_base(base, "train_several")
    settings = []
    for number, given in enumerate(runs):
        missing = [name for name in ("data", "adapter_path") if given.get(name) is None]
        if missing:
            raise InputError(f"train_several, run {number}: no {' and no '.join(missing)}; each run needs its own")
        named = {"data": data_source(given["data"]), "adapter_path": os.fspath(given["adapter_path"])}
        settings.append(run_settings(base.settings, {**given, **named}))
    base.release()
    mx.reset_peak_memory()  # an earlier run's peak is not these runs'
    try:
        with base.loaded.lent() as lent, console.log_to(console.show if progress else None):
            members = SeveralRuns.open(settings, base=lent).train()
    finally:
        device.compile_for(device.COMPILE_FROM_STEPS)  # short runs turned compiling off
    if failed := failures(members):
        raise failed
    outcomes = [(Path(member.folder), member.outcome) for member in members]
    return [
        Run(folder, ended.steps, ended.val_loss, ended.interrupted, ended.stopped_early)
        for folder, ended in outcomes
        if ended is not None
    ]

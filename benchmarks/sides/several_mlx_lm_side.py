"""Time a step of mlx-lm's own loop on rows of one width: called by benchmarks/several_runs.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared import NEVER, Enough

import on_mlx  # noqa: F401  isort: skip  (first: it gives mlx-lm the same fast BLAS as us)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load


class Clock(TrainingCallback):
    """Notes wall clock and processor seconds of each step after the first, and ends the run."""

    def __init__(self, steps: int):
        self.steps, self.found = steps, []
        self.before: tuple[float, float] | None = None

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        now = time.perf_counter(), time.process_time()
        if self.before is not None:
            self.found.append({"wall_s": now[0] - self.before[0], "cpu_s": now[1] - self.before[1]})
        self.before = now
        if len(self.found) == self.steps:
            raise Enough


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model, tokenizer = load(job["model"])
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": job["rank"], "scale": 2.0, "dropout": 0.0})
    chosen = np.random.default_rng(0)

    def batches(*_: Any, **__: Any) -> Iterator[tuple[mx.array, mx.array]]:
        while True:
            tokens = chosen.integers(1, tokenizer.vocab_size, (job["rows"], job["width"] + 1))
            yield mx.array(tokens), mx.array([[1, job["width"] + 1]] * job["rows"])

    clock = Clock(job["steps"])
    settings = TrainingArgs(
        batch_size=job["rows"], iters=NEVER, val_batches=0, steps_per_report=1, steps_per_eval=NEVER, steps_per_save=NEVER,
        adapter_file=str(Path(job["result"]).with_suffix(".safetensors")), max_seq_length=job["width"] + 1,
    )  # fmt: skip
    with suppress(Enough):
        train(
            model, optim.Adam(learning_rate=1e-5), [], None, settings, iterate_batches=batches, training_callback=clock
        )
    result = {"found": clock.found, "peak_bytes": float(mx.get_peak_memory())}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

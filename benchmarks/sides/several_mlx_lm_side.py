"""Time a step of mlx-lm's own loop on rows of one width: called by benchmarks/several_runs.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from on_mlx import loop_settings  # isort: skip  (first: it gives mlx-lm the same fast BLAS as us)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load
from shared import Enough, StepTimes, read_job, write_result


class Clock(TrainingCallback):
    """Notes the times of each step, and ends the run after the first and some others."""

    def __init__(self, steps: int):
        self._most, self.times = 1 + steps, StepTimes()

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.times.end()
        if len(self.times.steps) == self._most:
            raise Enough


def main() -> None:
    job = read_job()
    model, tokenizer = load(job["model"])
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": job["rank"], "scale": 2.0, "dropout": 0.0})
    chosen = np.random.default_rng(0)

    def batches(*_: Any, **__: Any) -> Iterator[tuple[mx.array, mx.array]]:
        while True:
            tokens = chosen.integers(1, tokenizer.vocab_size, (job["rows"], job["width"] + 1))
            yield mx.array(tokens), mx.array([[1, job["width"] + 1]] * job["rows"])

    clock = Clock(job["steps"])
    given = {"batch_size": job["rows"], "max_seq_length": job["width"] + 1, "grad_checkpoint": False}
    settings, optimizer = TrainingArgs(**loop_settings(job | given)), optim.Adam(learning_rate=1e-5)
    with suppress(Enough):
        train(model, optimizer, [], None, settings, iterate_batches=batches, training_callback=clock)
    write_result(job, {"found": clock.times.steps[1:], "peak_bytes": float(mx.get_peak_memory())})


if __name__ == "__main__":
    main()

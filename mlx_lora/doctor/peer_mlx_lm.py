"""mlx_lm.lora's own trainer on the kit's rows: its loop, loss, datasets, batches, layers and optimizer, unchanged.

python -m mlx_lora.doctor.peer_mlx_lm JOB.json
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_lora  # noqa: F401 # isort: skip  (first: it gives mlx-lm the same fast BLAS as us)
import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from mlx_lora.doctor.peer_steps import StepEnds, read_job


class Clock(TrainingCallback):
    """Notes each step as mlx-lm reports it."""

    def __init__(self, ends: StepEnds):
        self._ends = ends

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Note the end of a step."""
        self._ends()


def main() -> None:
    """Train."""
    job = read_job()
    mx.random.seed(0)
    model, tokenizer, *_ = load(job["model"])
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": job["rank"], "scale": 2.0, "dropout": 0.0})
    records = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    asked = SimpleNamespace(mask_prompt=True)
    rows = CacheDataset(create_dataset(records, tokenizer, asked))  # pyright: ignore[reportArgumentType] # as it does
    settings = TrainingArgs(
        batch_size=job["batch_size"], iters=job["steps"], val_batches=0, steps_per_report=1, steps_per_eval=10**9,
        steps_per_save=10**9, adapter_file=str(Path(job["ends"]).with_suffix(".safetensors")), max_seq_length=2048,
    )  # fmt: skip
    train(model, optim.AdamW(learning_rate=1e-4), rows, None, settings, training_callback=Clock(StepEnds(job["ends"])))


if __name__ == "__main__":
    main()

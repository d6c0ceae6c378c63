"""unsloth-zoo's MLX trainer as a side, with its chunked loss; in a Python of its own (versus.py --unsloth-python).

    PYTHON benchmarks/sides/unsloth_zoo_side.py JOB.json      (versus.py runs this)

Its own loader, LoRA layers, batches, loss and loop. Rows go in as token ids with labels made from our masks. A
wrapper around the plan's last call before each step notes which rows and shape the step gets.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

# Its package starts a CUDA set-up on Linux unless told not to.
os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"

import mlx_lora  # isort: skip  (first: it gives MLX the same fast BLAS as us)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from datasets import Dataset
from mlx.utils import tree_flatten
from shared import Rows, StepLog, read_job, write_result
from unsloth_zoo.mlx.loader import FastMLXModel
from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig
from unsloth_zoo.mlx.utils import FiniteTextBatchPlan, make_cce_loss_fn

IGNORED = -100
MANY_STEPS = 10_000


def load_side(job: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Load the model with the job's factors in its LoRA layers."""
    factors = mx.load(job["adapter"])
    names = sorted({name.split(".")[-2] for name in factors})
    model, tokenizer = FastMLXModel.from_pretrained(
        job["model"], max_seq_length=job["max_seq_length"], dtype="float32", load_in_4bit=False, text_only=True
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=job["rank"],
        lora_alpha=job["rank"] * job["scale"],
        target_modules=names,
        use_gradient_checkpointing="mlx" if job["grad_checkpoint"] else False,
    )
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    if trainable != set(factors):
        raise ValueError(f"unsloth-zoo adapts other layers than we do: {sorted(trainable ^ set(factors))[:4]}")
    model.load_weights(list(factors.items()), strict=False)
    return model, tokenizer


def labels(rows: Rows, row: int) -> np.ndarray:
    """(n,) ids where trained, else ignored."""
    return np.where(rows.mask(row), rows.tokens(row), IGNORED)


def check(job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Compute its chunked loss on the check rows."""
    model, _ = load_side(job)
    loss = make_cce_loss_fn(model)
    loss_sum, count = 0.0, 0
    for row in range(len(rows)):
        tokens = rows.tokens(row)
        mean, trained = loss(
            model, mx.array(tokens[None]), mx.array([[1, len(tokens)]]), mx.array(labels(rows, row)[None])
        )
        loss_sum, count = loss_sum + mean.item() * int(trained.item()), count + int(trained.item())
    return {"loss_sum": loss_sum, "count": count, "same_ids": True, "notes": [], "facts": facts(model)}


def facts(model: nn.Module) -> dict[str, Any]:
    """What this side computes in and with."""
    dtypes = {str(p.dtype).removeprefix("mlx.core.") for _, p in tree_flatten(model.parameters())}
    versions = {name: metadata.version(name) for name in ("unsloth-zoo", "mlx", "mlx-lm")}
    blas = {"blas": mlx_lora.BLAS.name, "fast_blas": mlx_lora.BLAS.fast}
    return {**blas, "dtypes": sorted(dtypes), "versions": versions}


class NotedSteps:
    """Knows the rows and the input shape of the step that runs."""

    def __init__(self, rows: Rows):
        self._numbers = {tuple(rows.tokens(row).tolist()): row for row in range(len(rows))}
        self.rows: list[int] = []
        self.shape: tuple[int, int] = (0, 0)

    def follow(self) -> None:
        """Wrap the plan's last call before a step."""
        prepare = FiniteTextBatchPlan.prepare_cce_batch

        def noted(plan: FiniteTextBatchPlan, index: int, batch: Any) -> Any:
            chosen = [plan._rows[int(i)].input_ids for i in plan._schedule[index] if i is not None]
            self.rows = [self._numbers[tuple(ids)] for ids in chosen]
            self.shape = (batch[0].shape[0], batch[0].shape[1] - 1)
            return prepare(plan, index, batch)

        FiniteTextBatchPlan.prepare_cce_batch = noted


def train_run(job: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Run its loop until the job's steps or seconds are over."""
    model, tokenizer = load_side(job)
    records = [{"input_ids": rows.tokens(i).tolist(), "labels": labels(rows, i).tolist()} for i in range(len(rows))]
    settings = MLXTrainingConfig(
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=1,
        max_steps=job["steps"] or MANY_STEPS,
        warmup_steps=0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        gradient_checkpointing=job["grad_checkpoint"],
        append_eos=False,
        max_seq_length=job["max_seq_length"],
        output_dir=str(Path(job["result"]).with_suffix("")),
        seed=job["seed"],
    )
    trainer = MLXTrainer(model, tokenizer, Dataset.from_list(records), args=settings)
    noted = NotedSteps(rows)
    noted.follow()
    log = StepLog(rows, job["steps"], job["seconds"])

    def after_step(step: int, total: int, loss: float, *rest: Any) -> None:
        if log.end_step(noted.rows, noted.shape, loss):
            trainer.stop_requested = True

    trainer.add_step_callback(after_step)
    log.begin()
    trainer.train()
    return {**log.result(), "peak_allocator_bytes": mx.get_peak_memory(), "facts": facts(model)}


def main() -> None:
    """Do the job."""
    job = read_job()
    rows = Rows(Path(job["rows"]))
    write_result(job, check(job, rows) if job["mode"] == "check" else train_run(job, rows))


if __name__ == "__main__":
    main()

"""mlx-lm's own trainer as a side: its loop, loss, datasets, batches, layers and optimizer, unchanged.

Wired as `mlx_lm.lora.train_model` does it, with `mask_prompt` and reporting every step. Around it stand only a
dataset that notes which rows it handed out, a batch iterator that passes batches through, and a callback.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from on_mlx import facts_of, gemm_gflops, loop_settings, put_factors  # isort: skip  (first: it gives mlx-lm the same fast BLAS as us)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load
from shared import Enough, Rows, StepLog, run


class NotedRows(CacheDataset):
    """mlx-lm's dataset that also notes the rows handed out since the last batch."""

    def __init__(self, data: Any):
        super().__init__(data)
        self.taken: list[int] = []

    def __getitem__(self, idx: int) -> Any:
        self.taken.append(idx)
        return super().__getitem__(idx)


class Clock(TrainingCallback):
    """Logs each step as it is reported, and ends the run."""

    def __init__(self, log: StepLog, dataset: NotedRows):
        self._log, self._dataset = log, dataset
        self.shape: tuple[int, int] = (0, 0)

    def batches(self, dataset: NotedRows, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """mlx-lm's batches; the shape of each is noted."""
        for batch in iterate_batches(dataset, *args, **kwargs):
            self.shape = (batch[0].shape[0], batch[0].shape[1] - 1)  # its inputs are all but the last column
            yield batch

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        rows, self._dataset.taken = self._dataset.taken, []
        if self._log.end_step(rows, self.shape, train_info["train_loss"]):
            raise Enough


class MlxLm:
    """See the module."""

    def prepare(self, job: dict[str, Any], rows: Rows) -> None:
        """Load model, dataset and rows, with the job's factors in mlx-lm's own LoRA layers."""
        np.random.seed(job["seed"])  # mlx_lm.lora seeds both; its batches draw from numpy's
        mx.random.seed(job["seed"])
        self.job, self.rows = job, rows
        self.model, tokenizer = load(job["model"])
        self.model.freeze()
        linear_to_lora_layers(self.model, -1, {"rank": job["rank"], "scale": job["scale"], "dropout": 0.0})
        put_factors(self.model, job["adapter"], "mlx-lm")
        self.records = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
        settings = SimpleNamespace(mask_prompt="messages" in self.records[0])
        self.dataset = create_dataset(self.records, tokenizer, settings)

    def check(self) -> dict[str, Any]:
        """Compute the loss on the check rows: over our trained tokens, and over the ones mlx-lm would train."""
        rows, ids = self.rows, [list(self.dataset.process(record)[0]) for record in self.records]
        other_ids = [i for i, own in enumerate(ids) if own != rows.tokens(i).tolist()]
        loss_sum, count = 0.0, 0
        for row in range(len(rows)):
            batch = mx.array(np.pad(rows.tokens(row), (0, 1))[None])
            for start, stop in rows.spans(row):
                # mlx-lm's loss takes positions from and to, both included; ours end before `stop`.
                mean, tokens = default_loss(self.model, batch, mx.array([[start, stop - 1]]))
                loss_sum, count = loss_sum + mean.item() * tokens.item(), count + int(tokens.item())
        own = next(iterate_batches(CacheDataset(self.dataset), len(rows), self.job["max_seq_length"]))
        own_mean, own_tokens = default_loss(self.model, *own)
        extra = int(own_tokens.item()) - count
        notes = [f"{len(other_ids)} of {len(rows)} check rows have other token ids than ours"] if other_ids else []
        if extra:
            notes.append(
                f"its own mask trains {extra} more tokens on the {len(rows)} check rows than ours (one padding token per "
                "row, and what the template writes after the end-of-turn token); they are not counted as supervised"
            )
        own_figures = {"own_loss": own_mean.item(), "own_count": int(own_tokens.item())}
        facts = {**facts_of(self.model), "gemm_gflops": gemm_gflops()}
        same = {"same_ids": not other_ids, "notes": notes, "facts": facts}
        return {"loss_sum": loss_sum, "count": count, **own_figures, **same}

    def steps(self, log: StepLog) -> None:
        """Run mlx-lm's loop until the log has had enough."""
        job, noted = self.job, NotedRows(self.dataset)
        clock = Clock(log, noted)
        settings = TrainingArgs(**loop_settings(job))
        log.begin()
        with suppress(Enough):
            optimizer = optim.AdamW(learning_rate=job["learning_rate"])
            train(self.model, optimizer, noted, None, settings, iterate_batches=clock.batches, training_callback=clock)

    def figures(self) -> dict[str, Any]:
        """Return MLX's peak and what this side computes in."""
        return {"peak_allocator_bytes": mx.get_peak_memory(), "facts": facts_of(self.model)}


if __name__ == "__main__":
    run(MlxLm())

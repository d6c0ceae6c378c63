"""unsloth-zoo's MLX trainers as sides, with their chunked losses; in a Python of their own (peers.py).

Their own loader, LoRA layers, batches, loss and loop. Rows go in as token ids with labels made from our masks, and pairs as
token ids, in place of their own tokenization of a row. A wrapper around the plan's last call before each step notes which
rows and shape the step gets. On pairs, the reference is the same model with its adapter off: in each step, or with
`precompute` once before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Its package starts a CUDA set-up on Linux unless told not to.
os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"

from on_mlx import facts_of, put_factors  # isort: skip  (first: it gives MLX the same fast BLAS as us)
import mlx.core as mx
import numpy as np
from datasets import Dataset
from shared import REPORTS, Rows, StepLog, Stopwatch, read_job, run
from unsloth_zoo.mlx import preference, trainer
from unsloth_zoo.mlx.loader import FastMLXModel
from unsloth_zoo.mlx.preference import FinitePreferenceBatchPlan, TokenizedPreferenceRow
from unsloth_zoo.mlx.trainer import MLXDPOConfig, MLXDPOTrainer, MLXTrainer, MLXTrainingConfig
from unsloth_zoo.mlx.utils import FiniteTextBatchPlan, make_cce_loss_fn

IGNORED = -100
MANY_STEPS = 10_000


def common_settings(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of its trainers that its sides have in common; what is not here is as it comes."""
    return {
        "per_device_train_batch_size": job["batch_size"], "gradient_accumulation_steps": 1,
        "max_steps": job["steps"] or MANY_STEPS, "warmup_steps": 0, "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant", "gradient_checkpointing": job["grad_checkpoint"],
        "max_seq_length": job["max_seq_length"], "output_dir": str(Path(job["result"]).with_suffix("")), "seed": job["seed"],
    }  # fmt: skip


class UnslothZoo:
    """Its trainer on rows."""

    def prepare(self, job: dict[str, Any], rows: Rows) -> None:
        """Load the model with the job's factors in its LoRA layers."""
        self.job, self.rows = job, rows
        names = sorted({name.split(".")[-2] for name in mx.load(job["adapter"])})
        self.model, self.tokenizer = FastMLXModel.from_pretrained(
            job["model"], max_seq_length=job["max_seq_length"], dtype="float32", load_in_4bit=False, text_only=True
        )
        checkpointing = "mlx" if job["grad_checkpoint"] else False
        alpha = job["rank"] * job["scale"]
        self.model = FastMLXModel.get_peft_model(
            self.model, r=job["rank"], lora_alpha=alpha, target_modules=names, use_gradient_checkpointing=checkpointing
        )
        put_factors(self.model, job["adapter"], "unsloth-zoo")

    def labels(self, row: int) -> np.ndarray:
        """(n,) ids where trained, else ignored."""
        return np.where(self.rows.mask(row), self.rows.tokens(row), IGNORED)

    def check(self) -> dict[str, Any]:
        """Compute its chunked loss on the check rows."""
        loss, loss_sum, count = make_cce_loss_fn(self.model), 0.0, 0
        for row in range(len(self.rows)):
            tokens = self.rows.tokens(row)
            span, labels = mx.array([[1, len(tokens)]]), mx.array(self.labels(row)[None])
            mean, trained = loss(self.model, mx.array(tokens[None]), span, labels)
            loss_sum, count = loss_sum + mean.item() * int(trained.item()), count + int(trained.item())
        facts = self.figures()["facts"]
        return {"loss_sum": loss_sum, "count": count, "same_ids": True, "notes": [], "facts": facts}

    def steps(self, log: StepLog) -> None:
        """Run its loop until the log has had enough."""
        every = range(len(self.rows))
        numbers = {tuple(self.rows.tokens(row).tolist()): row for row in every}
        records = [{"input_ids": self.rows.tokens(i).tolist(), "labels": self.labels(i).tolist()} for i in every]
        settings = MLXTrainingConfig(**common_settings(self.job), append_eos=False)
        running = MLXTrainer(self.model, self.tokenizer, Dataset.from_list(records), args=settings)
        prepare, now = FiniteTextBatchPlan.prepare_cce_batch, {}

        def noted(plan: FiniteTextBatchPlan, index: int, batch: Any) -> Any:
            chosen = [plan._rows[int(i)].input_ids for i in plan._schedule[index] if i is not None]
            now["rows"] = [numbers[tuple(ids)] for ids in chosen]
            now["shape"] = (batch[0].shape[0], batch[0].shape[1] - 1)
            return prepare(plan, index, batch)

        def after_step(step: int, total: int, loss: float, *rest: Any) -> None:
            if log.end_step(now["rows"], now["shape"], loss):
                running.stop_requested = True

        FiniteTextBatchPlan.prepare_cce_batch = noted  # the plan's last call before a step
        running.add_step_callback(after_step)
        log.begin()
        running.train()

    def figures(self) -> dict[str, Any]:
        """Return MLX's peak and what this side computes in."""
        facts = facts_of(self.model, "unsloth-zoo", "mlx", "mlx-lm")
        return {"peak_allocator_bytes": mx.get_peak_memory(), "facts": facts}


class UnslothDpo(UnslothZoo):
    """Its trainer on pairs."""

    def steps(self, log: StepLog) -> None:
        """Run its loop until the log has had enough."""
        job, rows, numbers, now = self.job, self.rows, self.rows.number_of(), {}
        prepare = FinitePreferenceBatchPlan.prepare_cce_batch

        def as_given(tokenizer: Any, row: dict[str, int], **_: Any) -> TokenizedPreferenceRow:
            prompt, chosen, rejected = (tuple(ids) for ids in rows.parts(row["pair"]))
            return TokenizedPreferenceRow(prompt, chosen, prompt, rejected)

        def noted(plan: FinitePreferenceBatchPlan, index: int, batch: Any) -> Any:
            chosen = [plan.rows[i] for i in plan.schedule[index]]
            now["pairs"] = [numbers[row.chosen, row.rejected] for row in chosen]
            now["width"] = batch[0].shape[1] - 1
            return prepare(plan, index, batch)

        preference.tokenize_preference_row = as_given
        FinitePreferenceBatchPlan.prepare_cce_batch = noted  # the plan's last call before a step
        self.watch = trainer.precompute_reference_logps = Stopwatch(trainer.precompute_reference_logps)
        settings = MLXDPOConfig(
            **common_settings(job), weight_decay=job["weight_decay"], max_grad_norm=0.0, max_grad_leaf_norm=0.0,
            max_length=job["max_seq_length"], max_prompt_length=None, beta=job["beta"],
            precompute_ref_log_probs=job["precompute"],
        )  # fmt: skip
        given = [{"pair": pair} for pair in range(rows.pairs())]
        running = MLXDPOTrainer(self.model, self.tokenizer, given, args=settings)
        running.add_callback(_Clock(running, now, log))
        log.begin()
        running.train()

    def figures(self) -> dict[str, Any]:
        """Return MLX's peak, the seconds of the pass over the reference, and what this side computes in."""
        return {**super().figures(), "reference_s": self.watch.read(), "notes": []}


class _Clock:
    """Logs each step from what the trainer logs, and ends the run."""

    def __init__(self, running: MLXDPOTrainer, now: dict[str, Any], log: StepLog):
        self._running, self._now, self._log = running, now, log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        reports = {name: float(logs[theirs]) for name, theirs in REPORTS.items()}
        if self._log.end_pairs(self._now["pairs"], self._now["width"], float(logs["loss"]), reports):
            self._running.stop_requested = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


if __name__ == "__main__":
    run(UnslothDpo() if "precompute" in read_job() else UnslothZoo())

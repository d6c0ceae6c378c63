"""unsloth-zoo's MLX preference trainer as a side, with its chunked loss; in a Python of its own.

    PYTHON benchmarks/sides/unsloth_dpo_side.py JOB.json      (versus.py --objective dpo runs this)

Its own loader, LoRA layers, batches, loss and loop. The reference is the same model with its adapter off: in each step,
or with `precompute` once before. Pairs go in as token ids, in place of its own tokenization of a row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import unsloth_zoo_side as common  # isort: skip  (first: it gives MLX the same fast BLAS as us)
import mlx.core as mx
from shared import PairLog, PairRows, read_job, write_result
from unsloth_zoo.mlx import preference, trainer
from unsloth_zoo.mlx.preference import FinitePreferenceBatchPlan, TokenizedPreferenceRow
from unsloth_zoo.mlx.trainer import MLXDPOConfig, MLXDPOTrainer

MANY_STEPS = 10_000


class NotedSteps:
    """Knows the pairs and the input width of the step that runs."""

    def __init__(self, rows: PairRows):
        self._numbers = rows.number_of()
        self.pairs: list[int] = []
        self.width = 0

    def follow(self) -> None:
        """Wrap the plan's last call before a step."""
        prepare = FinitePreferenceBatchPlan.prepare_cce_batch

        def noted(plan: FinitePreferenceBatchPlan, index: int, batch: Any) -> Any:
            chosen = [plan.rows[i] for i in plan.schedule[index]]
            self.pairs = [self._numbers[row.chosen, row.rejected] for row in chosen]
            self.width = batch[0].shape[1] - 1
            return prepare(plan, index, batch)

        FinitePreferenceBatchPlan.prepare_cce_batch = noted


class Stopwatch:
    """Adds up the seconds of the pass over the reference."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def follow(self) -> None:
        """Wrap the pass."""
        compute = trainer.precompute_reference_logps

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            table = compute(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return table

        trainer.precompute_reference_logps = timed


def give_token_ids(rows: PairRows) -> list[dict[str, int]]:
    """Let its plan take our token ids, and return its data set: numbers of pairs."""

    def as_given(tokenizer: Any, row: dict[str, int], **_: Any) -> TokenizedPreferenceRow:
        prompt, chosen, rejected = (tuple(ids) for ids in rows.parts(row["pair"]))
        return TokenizedPreferenceRow(prompt, chosen, prompt, rejected)

    preference.tokenize_preference_row = as_given
    return [{"pair": pair} for pair in range(rows.pairs())]


def settings_of(job: dict[str, Any]) -> MLXDPOConfig:
    """Return its settings; what is not here is as it comes."""
    return MLXDPOConfig(
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=1,
        max_steps=job["steps"] or MANY_STEPS,
        warmup_steps=0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=job["weight_decay"],
        max_grad_norm=0.0,
        max_grad_leaf_norm=0.0,
        gradient_checkpointing=job["grad_checkpoint"],
        max_seq_length=job["max_seq_length"],
        max_length=job["max_seq_length"],
        max_prompt_length=None,
        beta=job["beta"],
        precompute_ref_log_probs=job["precompute"],
        output_dir=str(Path(job["result"]).with_suffix("")),
        seed=job["seed"],
    )


def train_run(job: dict[str, Any], rows: PairRows) -> dict[str, Any]:
    """Run its loop until the job's steps, passes or seconds are over."""
    model, tokenizer = common.load_side(job)
    given = give_token_ids(rows)
    noted, watch, log = NotedSteps(rows), Stopwatch(), PairLog(rows, job)
    noted.follow()
    watch.follow()
    running = MLXDPOTrainer(model, tokenizer, given, args=settings_of(job))
    running.add_callback(_Clock(running, noted, log))
    log.begin()
    running.train()
    return {
        **log.result(),
        "peak_allocator_bytes": mx.get_peak_memory(),
        "reference_s": watch.seconds,
        "facts": common.facts(model),
        "notes": [],
    }


class _Clock:
    """Logs each step from what the trainer logs, and ends the run."""

    def __init__(self, running: MLXDPOTrainer, noted: NotedSteps, log: PairLog):
        self._running, self._noted, self._log = running, noted, log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        names = {"chosen_logps": "logps/chosen", "rejected_logps": "logps/rejected", "accuracy": "rewards/accuracies"}
        reports = {name: float(logs[theirs]) for name, theirs in names.items()}
        if self._log.end_pairs(self._noted.pairs, self._noted.width, float(logs["loss"]), reports):
            self._running.stop_requested = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def main() -> None:
    """Do the job."""
    job = read_job()
    write_result(job, train_run(job, PairRows(Path(job["rows"]))))


if __name__ == "__main__":
    main()

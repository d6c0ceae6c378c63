"""mlx-lm-lora's DPO trainer as a side: its loader, loop, loss and batches, unchanged; in a Python of its own.

Wired as `mlx_lm_lora.train.run` does it: a second copy of the base is the reference, scored in each step. Pairs go in as
token ids. Around it stand only a dataset that notes which pairs it handed out, and a callback.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from on_mlx import facts_of, loop_settings, put_factors  # isort: skip  (first: it gives MLX the same fast BLAS as us)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import load
from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo
from mlx_lm_lora.utils import from_pretrained
from shared import Enough, Rows, StepLog, run

WORKING_SET = "max_recommended_working_set_size"
# What it names logits are the summed log-probabilities; the metrics that it names so are per token.
REPORTS = {"chosen_logps": "chosen_logits_mean", "rejected_logps": "rejected_logits_mean", "accuracy": "accuracies"}


class NotedPairs:
    """The pairs in the form that its batches take; notes the last ones that were asked for."""

    def __init__(self, rows: Rows, batch_size: int):
        self._parts = [rows.parts(pair) for pair in range(rows.pairs())]
        self._batch_size, self._asked = batch_size, [0]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, pair: int) -> dict[str, Any]:
        self._asked = [*self._asked[-self._batch_size + 1 :], pair] if self._batch_size > 1 else [pair]
        prompt, chosen, rejected = self._parts[pair]
        lengths = {"chosen_prompt_length": len(prompt), "rejected_prompt_length": len(prompt)}
        return {"chosen": prompt + chosen, "rejected": prompt + rejected, **lengths}

    def batch(self) -> tuple[list[int], int]:
        """Return the numbers of the last batch's pairs, and the width of its inputs: the longest row less a token."""
        rows = [self._parts[pair] for pair in self._asked]
        longest = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in rows)
        return list(self._asked), longest - 1


class Clock(TrainingCallback):
    """Logs each step as it is reported, and ends the run."""

    def __init__(self, log: StepLog, pairs: NotedPairs):
        self._log, self._pairs = log, pairs

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        reports = {name: float(train_info[f"train_{theirs}"]) for name, theirs in REPORTS.items()}
        if self._log.end_pairs(*self._pairs.batch(), train_info["train_loss"], reports):
            raise Enough


def without_metal() -> list[str]:
    """Answer its question for Metal's working set where there is none, and say so."""
    device = mx.device_info()
    if WORKING_SET in device:
        return []
    mx.device_info = lambda *_: {**device, WORKING_SET: 0}
    mx.set_wired_limit = lambda limit: 0
    return ["its train_dpo asks for Metal's working set and fails without one; here it is told 0: no change"]


def about_batches(result: dict[str, Any]) -> list[str]:
    """Return a note if it draws pairs again before it has drawn the others, with what shows it."""
    new_each_step = "next(\n            iterate_dpo_batches(" in inspect.getsource(train_dpo)
    if not new_each_step or result["different"] == result["drawn"]:
        return []
    return [
        f"drew {result['different']} different pairs in {result['drawn']}: train_dpo makes a new batch iterator for each "
        "step and takes its first batch, so there are no epochs, and some pairs are never seen"
    ]


class MlxLmLora:
    """See the module."""

    def prepare(self, job: dict[str, Any], rows: Rows) -> None:
        """Load the model with the job's factors in its LoRA layers, and the reference."""
        np.random.seed(job["seed"])  # its batches draw from numpy's
        mx.random.seed(job["seed"])
        self.job, self.rows, self.notes = job, rows, without_metal()
        config = {"rank": job["rank"], "dropout": 0.0, "scale": job["scale"], "use_dora": False, "num_layers": -1}
        self.model, _, _ = from_pretrained(model=job["model"], lora_config=config)
        put_factors(self.model, job["adapter"], "mlx-lm-lora")
        self.reference = load(job["model"])[0].freeze()

    def steps(self, log: StepLog) -> None:
        """Run its loop until the log has had enough."""
        job, pairs = self.job, NotedPairs(self.rows, self.job["batch_size"])
        settings = DPOTrainingArgs(**loop_settings(job), beta=job["beta"], loss_type="sigmoid")
        rate, decay = job["learning_rate"], job["weight_decay"]
        optimizer = optim.AdamW(learning_rate=rate, weight_decay=decay, bias_correction=True)
        log.begin()
        with suppress(Enough):
            train_dpo(self.model, self.reference, optimizer, pairs, None, settings, training_callback=Clock(log, pairs))
        self.notes += about_batches(log.result())

    def figures(self) -> dict[str, Any]:
        """Return MLX's peak, what this side computes in, and notes."""
        facts = facts_of(self.model, "mlx-lm-lora", "mlx", "mlx-lm")
        return {"peak_allocator_bytes": mx.get_peak_memory(), "reference_s": 0.0, "facts": facts, "notes": self.notes}


if __name__ == "__main__":
    run(MlxLmLora())

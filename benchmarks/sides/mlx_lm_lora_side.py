"""mlx-lm-lora's DPO trainer as a side: its loader, loop, loss and batches, unchanged; in a Python of its own.

    PYTHON benchmarks/sides/mlx_lm_lora_side.py JOB.json      (versus.py --objective dpo runs this)

Wired as `mlx_lm_lora.train.run` does it: a second copy of the base is the reference, scored in each step. Pairs go in as
token ids. Around it stand only a dataset that notes which pairs it handed out, and a callback.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives MLX the same fast BLAS as us)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import load
from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo
from mlx_lm_lora.utils import from_pretrained
from shared import PairLog, PairRows, read_job, write_result

NEVER = 10**9
WORKING_SET = "max_recommended_working_set_size"


class Enough(Exception):
    """Leaves the loop when the run's time is over."""


class NotedPairs:
    """The pairs in the form that its batches take; notes the last ones that were asked for."""

    def __init__(self, rows: PairRows, batch_size: int):
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

    def __init__(self, log: PairLog, pairs: NotedPairs):
        self._log, self._pairs = log, pairs

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        # What it names logits are the summed log-probabilities; the metrics that it names so are per token.
        names = {
            "chosen_logps": "chosen_logits_mean",
            "rejected_logps": "rejected_logits_mean",
            "accuracy": "accuracies",
        }
        reports = {name: float(train_info[f"train_{theirs}"]) for name, theirs in names.items()}
        pairs, width = self._pairs.batch()
        if self._log.end_pairs(pairs, width, train_info["train_loss"], reports):
            raise Enough


def load_side(job: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Load the model with the job's factors in its LoRA layers, and the reference."""
    config = {"rank": job["rank"], "dropout": 0.0, "scale": job["scale"], "use_dora": False, "num_layers": -1}
    model, _, _ = from_pretrained(model=job["model"], lora_config=config)
    factors = mx.load(job["adapter"])
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    if names != set(factors):
        raise ValueError(f"mlx-lm-lora adapts other layers than we do: {sorted(names ^ set(factors))[:4]}")
    model.load_weights(list(factors.items()), strict=False)
    return model, load(job["model"])[0].freeze()


def facts(model: nn.Module) -> dict[str, Any]:
    """What this side computes in and with."""
    dtypes = {str(p.dtype).removeprefix("mlx.core.") for _, p in tree_flatten(model.parameters())}
    versions = {name: metadata.version(name) for name in ("mlx-lm-lora", "mlx", "mlx-lm")}
    return {"blas": mlx_lora.BLAS.name, "fast_blas": mlx_lora.BLAS.fast, "dtypes": sorted(dtypes), "versions": versions}


def without_metal() -> list[str]:
    """Answer its question for Metal's working set where there is none, and say so."""
    device = mx.device_info()
    if WORKING_SET in device:
        return []
    mx.device_info = lambda *_: {**device, WORKING_SET: 0}
    mx.set_wired_limit = lambda limit: 0
    return [
        "its train_dpo asks for Metal's working set and fails without one; here it is told 0, which changes nothing"
    ]


def about_batches(result: dict[str, Any]) -> list[str]:
    """Return a note if it draws pairs again before it has drawn the others, with what shows it."""
    new_each_step = "next(\n            iterate_dpo_batches(" in inspect.getsource(train_dpo)
    if not new_each_step or result["different"] == result["drawn"]:
        return []
    return [
        f"drew {result['different']} different pairs in {result['drawn']}: train_dpo makes a new batch iterator for each "
        "step and takes its first batch, so there are no epochs, and some pairs are never seen"
    ]


def train_run(job: dict[str, Any], rows: PairRows) -> dict[str, Any]:
    """Run its loop until the job's steps, passes or seconds are over."""
    np.random.seed(job["seed"])  # its batches draw from numpy's
    mx.random.seed(job["seed"])
    notes = without_metal()
    model, reference = load_side(job)
    pairs = NotedPairs(rows, job["batch_size"])
    log = PairLog(rows, job)
    settings = DPOTrainingArgs(
        batch_size=job["batch_size"],
        iters=NEVER,
        val_batches=0,
        steps_per_report=1,
        steps_per_eval=NEVER,
        steps_per_save=NEVER,
        adapter_file=str(Path(job["result"]).with_suffix(".safetensors")),
        max_seq_length=job["max_seq_length"],
        grad_checkpoint=job["grad_checkpoint"],
        beta=job["beta"],
        loss_type="sigmoid",
    )
    rate, decay = job["learning_rate"], job["weight_decay"]
    optimizer = optim.AdamW(learning_rate=rate, weight_decay=decay, bias_correction=True)
    log.begin()
    with suppress(Enough):
        train_dpo(model, reference, optimizer, pairs, None, settings, training_callback=Clock(log, pairs))
    result = log.result()
    return {
        **result,
        "peak_allocator_bytes": mx.get_peak_memory(),
        "reference_s": 0.0,
        "facts": facts(model),
        "notes": notes + about_batches(result),
    }


def main() -> None:
    """Do the job."""
    job = read_job()
    write_result(job, train_run(job, PairRows(Path(job["rows"]))))


if __name__ == "__main__":
    main()

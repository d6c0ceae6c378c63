"""TRL's DPOTrainer on torch with PEFT as a side, where torch_place.py says.

Its own loop, collator, loss and chunked head. The reference is the same model with its adapter off: in each step, or
with `precompute` once before, and then with pairs of like length in a batch as well, which is its fastest setting.
Pairs go in as token ids, in place of its own tokenization.
"""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft_side import lora_settings, place_of, put_factors
from safetensors.torch import load_file
from shared import REPORTS, Rows, StepLog, run
from torch_place import TorchPlace
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

MANY_STEPS = 10_000


class NotedTrainer(DPOTrainer):
    """TRL's trainer on token ids; notes what each step gets and how long the reference's pass takes."""

    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int]
    pairs: list[int]
    place: TorchPlace
    width = 0
    loss = 0.0
    reference_s = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        start = time.perf_counter()
        found = super()._precompute_ref_logps(*args)
        self.reference_s += time.perf_counter() - start
        return found

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = [
            tuple(ids[: int(mask.sum())].tolist())
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        half = len(rows) // 2
        self.pairs = [self.numbers[both] for both in zip(rows[:half], rows[half:], strict=True)]
        self.width = inputs["input_ids"].shape[1] - 1
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.place.note_memory()
        self.loss = loss.item()
        return loss


class Clock(TrainerCallback):
    """Logs each step from what the trainer logs, and ends the run."""

    def __init__(self, running: NotedTrainer, log: StepLog):
        self._running, self._log = running, log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        reports = {name: float(logs[theirs]) for name, theirs in REPORTS.items()}
        self._running.place.wait()
        # The logged loss is rounded, so the step's own is taken.
        if self._log.end_pairs(self._running.pairs, self._running.width, self._running.loss, reports):
            control.should_training_stop = True


def settings_of(job: dict[str, Any], place: TorchPlace) -> DPOConfig:
    """Return its settings; what is not here is as it comes."""
    grouped = {"train_sampling_strategy": "group_by_length"} if job["precompute"] else {}
    return DPOConfig(
        output_dir=str(Path(job["result"]).with_suffix("")), per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"] or MANY_STEPS, learning_rate=job["learning_rate"], lr_scheduler_type="constant",
        weight_decay=job["weight_decay"], max_grad_norm=0.0, gradient_checkpointing=job["grad_checkpoint"],
        max_length=job["max_seq_length"], beta=job["beta"], precompute_ref_log_probs=job["precompute"],
        bf16=place.dtype == "bfloat16", use_cpu=place.device == "cpu", dataloader_pin_memory=False,
        remove_unused_columns=False,  # the sampler by length reads the column `length`
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=job["seed"], **grouped,
    )  # fmt: skip


def records(rows: Rows, by_length: bool) -> list[dict[str, Any]]:
    """Return its data set; sorted by length where the reference is computed over it beforehand."""
    found = []
    for pair in range(rows.pairs()):
        prompt, chosen, rejected = rows.parts(pair)
        length = len(prompt) + max(len(chosen), len(rejected))
        found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    return sorted(found, key=lambda record: record["length"]) if by_length else found


class Trl:
    """See the module."""

    def prepare(self, job: dict[str, Any], rows: Rows) -> None:
        """Load the model and put the job's factors into PEFT's LoRA layers.

        Raises:
            ValueError: PEFT adapts other layers, or the trainer takes another device.
        """
        self.place, factors = place_of(job), load_file(job["adapter"])
        self.running = NotedTrainer(
            AutoModelForCausalLM.from_pretrained(job["model"], dtype=self.place.torch_dtype),
            args=settings_of(job, self.place),
            train_dataset=Dataset.from_list(records(rows, job["precompute"])),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            peft_config=lora_settings(job, factors),
        )
        put_factors(self.running.model, factors)
        if self.running.args.device.type != self.place.device:
            raise ValueError(f"--torch-device {self.place.device}: TRL computes on {self.running.args.device.type}")
        self.running.place, self.running.numbers = self.place, rows.number_of()

    def steps(self, log: StepLog) -> None:
        """Run its loop until the log has had enough."""
        self.running.add_callback(Clock(self.running, log))
        self.place.wait()
        log.begin()
        self.running.train()

    def figures(self) -> dict[str, Any]:
        """Return the device's peak, the seconds of the pass over the reference, and what torch computes in."""
        versions = {name: metadata.version(name) for name in ("trl", "peft", "transformers", "torch")}
        facts = {**self.place.facts(), "versions": versions}
        return {
            "peak_allocator_bytes": self.place.peak_bytes(), "reference_s": self.running.reference_s, "facts": facts,
            "notes": [],
        }  # fmt: skip


if __name__ == "__main__":
    run(Trl())

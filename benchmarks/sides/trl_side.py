"""TRL's DPOTrainer on torch with PEFT as a side, where torch_place.py says.

    python benchmarks/sides/trl_side.py JOB.json      (versus.py --objective dpo runs this)

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
from peft import LoraConfig
from peft_side import place_of, renamed_factors
from safetensors.torch import load_file
from shared import PairLog, PairRows, read_job, write_result
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

    def __init__(self, running: NotedTrainer, log: PairLog):
        self._running, self._log = running, log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        names = {"chosen_logps": "logps/chosen", "rejected_logps": "logps/rejected", "accuracy": "rewards/accuracies"}
        reports = {name: float(logs[theirs]) for name, theirs in names.items()}
        self._running.place.wait()
        # The logged loss is rounded, so the step's own is taken.
        if self._log.end_pairs(self._running.pairs, self._running.width, self._running.loss, reports):
            control.should_training_stop = True


def settings_of(job: dict[str, Any], place: TorchPlace) -> DPOConfig:
    """Return its settings; what is not here is as it comes."""
    grouped = {"train_sampling_strategy": "group_by_length"} if job["precompute"] else {}
    return DPOConfig(
        output_dir=str(Path(job["result"]).with_suffix("")),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"] or MANY_STEPS,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=job["weight_decay"],
        max_grad_norm=0.0,
        gradient_checkpointing=job["grad_checkpoint"],
        max_length=job["max_seq_length"],
        beta=job["beta"],
        precompute_ref_log_probs=job["precompute"],
        bf16=place.dtype == "bfloat16",
        use_cpu=place.device == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,  # the sampler by length reads the column `length`
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job["seed"],
        **grouped,
    )


def records(rows: PairRows, by_length: bool) -> list[dict[str, Any]]:
    """Return its data set; sorted by length where the reference is computed over it beforehand."""
    found = []
    for pair in range(rows.pairs()):
        prompt, chosen, rejected = rows.parts(pair)
        length = len(prompt) + max(len(chosen), len(rejected))
        found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    return sorted(found, key=lambda record: record["length"]) if by_length else found


def load_trainer(job: dict[str, Any], rows: PairRows, place: TorchPlace) -> NotedTrainer:
    """Load the model and put the job's factors into PEFT's LoRA layers.

    Raises:
        ValueError: PEFT adapts other layers, or the trainer takes another device.
    """
    factors = load_file(job["adapter"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=place.torch_dtype)
    paths = sorted({name.rsplit(".", 1)[0] for name in factors})
    lora = LoraConfig(r=job["rank"], lora_alpha=job["scale"] * job["rank"], target_modules=paths, task_type="CAUSAL_LM")
    running = NotedTrainer(
        model,
        args=settings_of(job, place),
        train_dataset=Dataset.from_list(records(rows, job["precompute"])),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=lora,
    )
    renamed = renamed_factors(factors)
    trainable = {name for name, p in running.model.named_parameters() if p.requires_grad}
    if trainable != set(renamed):
        raise ValueError(f"PEFT adapts other layers than we do: {sorted(trainable ^ set(renamed))[:4]}")
    if running.args.device.type != place.device:
        raise ValueError(f"--torch-device {place.device}: TRL computes on {running.args.device.type}")
    running.model.load_state_dict(renamed, strict=False)
    running.place = place
    running.numbers = rows.number_of()
    return running


def train_run(job: dict[str, Any], rows: PairRows) -> dict[str, Any]:
    """Run its loop until the job's steps, passes or seconds are over."""
    log, place = PairLog(rows, job), place_of(job)
    running = load_trainer(job, rows, place)
    running.add_callback(Clock(running, log))
    place.wait()
    log.begin()
    running.train()
    versions = {name: metadata.version(name) for name in ("trl", "peft", "transformers", "torch")}
    return {
        **log.result(),
        "peak_allocator_bytes": place.peak_bytes(),
        "reference_s": running.reference_s,
        "facts": {**place.facts(), "versions": versions},
        "notes": [],
    }


def main() -> None:
    """Do the job."""
    job = read_job()
    write_result(job, train_run(job, PairRows(Path(job["rows"]))))


if __name__ == "__main__":
    main()

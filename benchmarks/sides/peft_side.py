"""PEFT on torch as a side: padded, packed or grouped batches under torch's AdamW, where torch_place.py says.

padded   random batches of `batch_size` rows, padded to the longest; what transformers' Trainer does by default.
packed   whole rows, best fit first, in bins of `batch_tokens`, position ids restarting in each: transformers then
         keeps attention inside a row (TRL's `packing` with its default strategy).
grouped  rows of like length, as many as `batch_tokens` holds, padded to the longest, batches shuffled.

The loss is transformers' own; clip at 1.0 as in its Trainer. Rows are our encoder's, so the trained tokens are too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from shared import Rows, StepLog, run
from torch_place import TorchPlace, torch_place
from transformers import AutoModelForCausalLM

IGNORED = -100


def lora_settings(job: dict[str, Any], factors: dict[str, torch.Tensor]) -> LoraConfig:
    """Return PEFT's settings for an adapter on the layers that the factors are for."""
    paths = sorted({name.rsplit(".", 1)[0] for name in factors})
    alpha = job["scale"] * job["rank"]
    return LoraConfig(r=job["rank"], lora_alpha=alpha, target_modules=paths, task_type="CAUSAL_LM")


def put_factors(model: PeftModel, factors: dict[str, torch.Tensor]) -> None:
    """Load our factors into PEFT's layers, which keep them in float32.

    Raises:
        ValueError: PEFT adapts other layers than we do.
    """
    suffix = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    renamed = {}
    for name, value in factors.items():  # PEFT's are (r, in) and (out, r); mlx-lm and we store the transposes
        path, kind = name.rsplit(".", 1)
        renamed[f"base_model.model.{path}.{suffix[kind]}"] = value.T.contiguous()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if trainable != set(renamed):
        raise ValueError(f"PEFT adapts other layers than we do: {sorted(trainable ^ set(renamed))[:4]}")
    model.load_state_dict(renamed, strict=False)


def place_of(job: dict[str, Any]) -> TorchPlace:
    """Return where the job is to compute; a process whose device is not there ends with the reason."""
    try:
        return torch_place(torch, job["torch_device"], job["torch_dtype"])
    except ValueError as error:
        sys.exit(f"Error: {error}")


def padded_batch(rows: Rows, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Lay rows out with right padding and an attention mask."""
    width = max(len(rows.tokens(n)) for n in numbers)
    batch = {"input_ids": torch.zeros(len(numbers), width, dtype=torch.long)}  # (B, T)
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for i, n in enumerate(numbers):
        tokens, mask = torch.tensor(rows.tokens(n)).long(), torch.tensor(rows.mask(n))
        batch["input_ids"][i, : len(tokens)] = tokens
        batch["attention_mask"][i, : len(tokens)] = 1
        batch["labels"][i, : len(tokens)] = torch.where(mask, tokens, IGNORED)
    return batch


def packed_batch(rows: Rows, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Lay rows end to end; a row's first token is never trained, so no target crosses a border."""
    tokens = torch.cat([torch.tensor(rows.tokens(n)).long() for n in numbers])
    mask = torch.cat([torch.tensor(rows.mask(n)) for n in numbers])
    positions = torch.cat([torch.arange(len(rows.tokens(n))) for n in numbers])
    labels = torch.where(mask, tokens, IGNORED)
    return {"input_ids": tokens[None], "position_ids": positions[None], "labels": labels[None]}


def plan(rows: Rows, job: dict[str, Any], random: np.random.Generator) -> list[list[int]]:
    """Return one epoch's batches of row numbers."""
    lengths = rows.lengths()
    order = random.permutation(len(rows))
    if job["batching"] == "padded":
        size = job["batch_size"]
        return [order[i : i + size].tolist() for i in range(0, len(order) - size + 1, size)]
    order = order[np.argsort(-lengths[order], kind="stable")]  # longest first
    batches: list[list[int]] = []
    used: list[int] = []
    for n in order.tolist():
        if job["batching"] == "packed":
            fitting = [i for i, tokens in enumerate(used) if tokens + lengths[n] <= job["batch_tokens"]]
            best = max(fitting, key=used.__getitem__, default=None)
        else:  # the last batch's first row is its longest
            fits = batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= job["batch_tokens"]
            best = len(batches) - 1 if fits else None
        if best is None:
            batches.append([n])
            used.append(int(lengths[n]))
        else:
            batches[best].append(n)
            used[best] += int(lengths[n])
    return [batches[i] for i in random.permutation(len(batches))]


class Peft:
    """See the module."""

    def prepare(self, job: dict[str, Any], rows: Rows) -> None:
        """Load the model with the job's factors in PEFT's LoRA layers."""
        torch.manual_seed(job["seed"])
        self.job, self.rows, self.place = job, rows, place_of(job)
        self.lay_out = packed_batch if job["batching"] == "packed" else padded_batch
        factors = load_file(job["adapter"])
        base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=self.place.torch_dtype).to(self.place.device)
        self.model = get_peft_model(base, lora_settings(job, factors))
        put_factors(self.model, factors)

    def loss_of(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return transformers' mean loss over the trained tokens, and their count, of a batch that is still on the CPU."""
        count = int((batch["labels"] != IGNORED).sum())
        moved = {name: values.to(self.place.device) for name, values in batch.items()}
        with self.place.computing():
            return self.model(**moved, num_items_in_batch=count, use_cache=False).loss, count

    def check(self) -> dict[str, Any]:
        """Compute the loss on the check rows, in this side's own batches."""
        self.model.eval()
        loss_sum, count = 0.0, 0
        small = {**self.job, "batch_size": min(self.job["batch_size"], 2)}
        with torch.no_grad():
            for numbers in plan(self.rows, small, np.random.default_rng(0)):
                mean, tokens = self.loss_of(self.lay_out(self.rows, numbers))
                loss_sum, count = loss_sum + mean.item() * tokens, count + tokens
        return {"loss_sum": loss_sum, "count": count, "same_ids": True, "notes": [], "facts": self.place.facts()}

    def batches(self) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield batches epoch after epoch, without end."""
        random = np.random.default_rng(self.job["seed"])
        while True:
            for numbers in plan(self.rows, self.job, random):
                yield numbers, self.lay_out(self.rows, numbers)

    def steps(self, log: StepLog) -> None:
        """Train until the log has had enough."""
        self.model.train()
        if self.job["grad_checkpoint"]:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.job["learning_rate"])
        self.place.wait()
        log.begin()
        for numbers, batch in self.batches():
            loss, _ = self.loss_of(batch)
            self.place.note_memory()  # everything that the backward pass needs is alive
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.place.wait()
            if log.end_step(numbers, batch["input_ids"].shape, loss.item()):
                break

    def figures(self) -> dict[str, Any]:
        """Return the device's peak and what torch computes in."""
        return {"peak_allocator_bytes": self.place.peak_bytes(), "facts": self.place.facts()}


if __name__ == "__main__":
    run(Peft())

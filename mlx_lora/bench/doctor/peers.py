"""The speed of other trainers on the kit's rows: mlx_lm.lora's own, and torch with transformers and PEFT.

python -m mlx_lora.bench.doctor.peers mlx-lm JOB.json
python -m mlx_lora.bench.doctor.peers torch JOB.json

mlx-lm's loop, loss, datasets, batches, layers and optimizer are unchanged. torch runs on a Mac's GPU (MPS), on CUDA, or on the CPU.
Its model has the same shape, and random weights too; rows of similar length share a batch and are padded to the longest. It has no
4-bit base on MPS, so a 4-bit model is compared with a float one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lora.utils.parsing import read_json

IGNORED = -100


class StepEnds:
    """Writes the seconds since the start at the end of each step, a line each, so that a process may be ended at any time."""

    def __init__(self, path: str):
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 # open as long as the process
        self._begun = time.perf_counter()

    def __call__(self) -> None:
        """Note the end of a step."""
        self._file.write(f"{time.perf_counter() - self._begun}\n")
        self._file.flush()


def train_with_mlx_lm(job: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Train with mlx-lm's own functions."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, create_dataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    mx.random.seed(0)
    model, tokenizer, *_ = load(job["model"])
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": job["rank"], "scale": 2.0, "dropout": 0.0})
    asked = SimpleNamespace(mask_prompt=True)
    rows = CacheDataset(create_dataset(records, tokenizer, asked))  # pyright: ignore[reportArgumentType] # as it does
    settings = TrainingArgs(
        batch_size=job["batch_size"], iters=job["steps"], val_batches=0, steps_per_report=1, steps_per_eval=10**9,
        steps_per_save=10**9, adapter_file=str(Path(job["ends"]).with_suffix(".safetensors")), max_seq_length=2048,
    )  # fmt: skip
    clock, ends = TrainingCallback(), StepEnds(job["ends"])
    clock.on_train_loss_report = lambda train_info: ends()
    train(model, optim.AdamW(learning_rate=1e-4), rows, None, settings, training_callback=clock)


def train_with_torch(job: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Train with torch: bfloat16 on a GPU, float32 on a CPU, as ours."""
    import torch  # pyright: ignore[reportMissingImports] # an extra
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(job["model"])
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # mlx's, which transformers cannot read
    model = AutoModelForCausalLM.from_config(config).to(torch.float32 if device == "cpu" else torch.bfloat16).to(device)
    settings = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    batches, ends = torch_batches(job, records, device), StepEnds(job["ends"])
    for step in range(job["steps"]):
        loss = model(**batches[step % len(batches)], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        ends()


def torch_batches(job: dict[str, Any], records: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Return an epoch's batches, the longest rows first."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [tokenizer.encode(tokenizer.apply_chat_template(one["messages"], tokenize=False)) for one in records]
    rows.sort(key=len, reverse=True)
    made = []
    for start in range(0, len(rows), job["batch_size"]):
        some = rows[start : start + job["batch_size"]]
        width = max(map(len, some))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in some])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some])
        batch = {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, IGNORED)}
        made.append({name: value.to(device) for name, value in batch.items()})
    return made


PEERS = {"mlx-lm": train_with_mlx_lm, "torch": train_with_torch}

if __name__ == "__main__":
    # The job has `model`, `data`, `batch_size`, `steps`, `rank` and `ends`, the file for the steps' ends.
    peer, path = sys.argv[1:]
    job = read_json(Path(path), "give a job's file")
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()
    PEERS[peer](job, [json.loads(line) for line in lines])

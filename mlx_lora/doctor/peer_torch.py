"""torch with transformers and PEFT on the kit's rows: on a Mac's GPU (MPS), on CUDA, or on the CPU.

python -m mlx_lora.doctor.peer_torch JOB.json

The model has the same shape, and random weights too. Rows of similar length share a batch and are padded to the longest.
torch has no 4-bit base on MPS, so a 4-bit model is compared with a float one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports] # an extra
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mlx_lora.doctor.peer_steps import StepEnds, read_job

IGNORED = -100


def torch_device() -> tuple[str, Any]:
    """Return the device and the dtype: bfloat16 on a GPU, float32 on a CPU, as ours."""
    if torch.backends.mps.is_available():
        return "mps", torch.bfloat16
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def batches_of(job: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Return an epoch's batches, the longest rows first."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    records = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
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


def main() -> None:
    """Train."""
    job = read_job()
    torch.manual_seed(0)
    device, dtype = torch_device()
    config = AutoConfig.from_pretrained(job["model"])
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # mlx's, which transformers cannot read
    model = AutoModelForCausalLM.from_config(config).to(dtype).to(device)
    settings = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    batches, ends = batches_of(job, device), StepEnds(job["ends"])
    for step in range(job["steps"]):
        loss = model(**batches[step % len(batches)], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        ends()


if __name__ == "__main__":
    main()

"""The same model in transformers, on torch: the judge of numerics."""

from __future__ import annotations

import numpy as np
import pytest


def torch_base(folder):
    """Return the llama model of a folder in float32 on torch; skips the test when torch is not installed."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained_in_torch(model, trained, optimizer, batches, penalty=lambda: 0.0, after=lambda step: None) -> list[float]:
    """Train some parameters by name on batches and return the losses, without the penalty; `after` is called after each step."""
    import torch

    losses = []
    for step, batch in enumerate(batches, start=1):
        logits = model(torch.tensor(batch.inputs.astype(np.int64))).logits
        mask, targets = torch.tensor(batch.mask), torch.tensor(batch.targets.astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits[mask], targets[mask])
        optimizer.zero_grad()
        (loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        after(step)
        losses.append(loss.item())
    return losses


def name_here(name: str) -> str:
    """Return our name of one of PEFT's trained parameters."""
    name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
    path, kind = name.rsplit(".", 1)
    return f"{path}.{'m' if kind == 'lora_magnitude_vector' else kind.lower()}"

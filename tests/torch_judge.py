"""The same model in transformers, on torch: the judge of numerics."""

from __future__ import annotations

import pytest


def torch_base(folder):
    """Return the llama model of a folder in float32 on torch; skips the test when torch is not installed."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def name_here(name: str) -> str:
    """Return our name of one of PEFT's factors."""
    path, kind = name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".", 1)
    return f"{path}.{ {'lora_A': 'lora_a', 'lora_B': 'lora_b'}[kind] }"

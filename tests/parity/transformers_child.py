"""Transformers' half of transformers_steps.py: makes a tiny random model, and trains it with plain factors.

    python tests/parity/transformers_child.py make|train JOB.json

A process of its own: torch's batched product crashes where another BLAS than its own was loaded first.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity.families import FAMILIES, Family


def random_model(family: Family) -> torch.nn.Module:
    """Return the family's model with weights of such a size that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(getattr(transformers, family.config)(**family.settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn_like(value) / math.sqrt(value.shape[-1]))
            else:  # norms, decay rates, sinks
                value.add_(0.1 * torch.randn_like(value))
    return model


def as_mlx_lm_reads(family: Family, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names, and in the layout, that mlx-lm reads."""
    named = {}
    for name, value in weights.items():
        for part, other in family.stored:
            name = name.replace(part, other)
        if family.model.startswith("GptOss") and ".experts." in name:
            name, value = _gpt_oss_expert(name, value)
        elif family.model.startswith("OlmoHybrid") and name.endswith("conv1d.weight"):
            value = _three_convolutions(family, name, value)
        named |= value if isinstance(value, dict) else {name: value.contiguous()}
    return named


def _gpt_oss_expert(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor | dict[str, torch.Tensor]]:
    """Return an expert tensor as mlx-lm's own conversions have it: (E, out, in), gate and up apart."""
    kind = "bias" if name.endswith("_bias") else "weight"
    name = name.removesuffix("_bias")
    value = value if kind == "bias" else value.transpose(1, 2)
    if name.endswith("down_proj"):
        return f"{name}.{kind}", value
    stem = name.removesuffix("gate_up_proj")
    return name, {f"{stem}{one}_proj.{kind}": value[:, n::2].contiguous() for n, one in enumerate(("gate", "up"))}


def _three_convolutions(family: Family, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the convolutions of q, k and v, which transformers keeps as one (and saves in three even parts)."""
    keys = family.settings["linear_num_key_heads"] * family.settings["linear_key_head_dim"]
    parts = value.split([keys, keys, len(value) - 2 * keys])
    return {name.replace("conv1d", f"{one}_conv1d"): part.contiguous() for one, part in zip("qkv", parts, strict=True)}


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Write the model's folder as a user would download it, with a tokenizer of bytes; say which linear layers it has."""
    family, folder = FAMILIES[job["family"]], Path(job["folder"])
    model = random_model(family)
    model.save_pretrained(folder)
    weights = model.state_dict() if family.own_layout else load_file(folder / "model.safetensors")
    save_file(as_mlx_lm_reads(family, weights), folder / "model.safetensors", {"format": "pt"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, **family.for_mlx_lm, "eos_token_id": 256}), encoding="utf-8")
    linear = {n: list(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {"linear": linear}


def adapted(job: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """Return the model made again, with its factors."""
    family = FAMILIES[job["family"]]
    model = random_model(family)
    model.set_attn_implementation("eager")
    model.requires_grad_(requires_grad=False)
    modules = dict(model.named_modules())
    with np.load(job["factors"]) as initial:
        factors = {name: torch.nn.Parameter(torch.tensor(initial[name])) for name in initial}
    for path in {name.rpartition(".")[0] for name in factors}:
        a, b = factors[f"{path}.lora_a"], factors[f"{path}.lora_b"]

        def add(_module, inputs, output, a=a, b=b):
            return output + job["scale"] * (inputs[0] @ a) @ b

        modules[family.name_there(path)].register_forward_hook(add)
    return model.train(), factors


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train, and keep the first step's logits and gradients, and every step's loss."""
    model, factors = adapted(job)
    optimizer = torch.optim.AdamW(factors.values(), lr=job["learning_rate"], weight_decay=job["weight_decay"])
    losses, kept = [], {}
    with np.load(job["batches"]) as batches:
        for step in range(job["steps"]):
            inputs, targets, mask = (torch.tensor(batches[f"{name}{step}"]) for name in ("inputs", "targets", "mask"))
            logits = model(inputs.long(), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[mask], targets.long()[mask])
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                kept = {f"gradient:{name}": value.grad.numpy().copy() for name, value in factors.items()}
                kept["logits"] = logits.detach().numpy()
            torch.nn.utils.clip_grad_norm_(factors.values(), job["clip"])
            optimizer.step()
            losses.append(loss.item())
    np.savez(job["kept"], **kept)
    return {"losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    done = {"make": make, "train": train}[sys.argv[1]](asked)
    Path(asked["result"]).write_text(json.dumps(done), encoding="utf-8")

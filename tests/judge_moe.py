"""Transformers' logits of a tiny mixture, alone and with each PEFT adapter.

python judge_moe.py KIND FOLDER IDS.npz OUT.npz ADAPTER...

A program of its own: torch's batched product crashes where another BLAS than its own was loaded first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

EXPERTS = {"gpt_oss": "mlp.experts", "mixtral": "block_sparse_moe.switch_mlp"}


def stacked(gate: torch.Tensor, up: torch.Tensor, in_turns: bool) -> torch.Tensor:
    return torch.stack([gate, up], dim=2).flatten(1, 2) if in_turns else torch.cat([gate, up], dim=1)


def load(kind: str, folder: Path) -> torch.nn.Module:
    """Return transformers' own model with the folder's weights, put where it has them."""
    config = json.loads((folder / "config.json").read_text())
    # GPT-OSS's own default there stretches the positions, which ours does not have.
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    settings = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "eos_token_id"})
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="eager")
    weights = load_file(folder / "model.safetensors")
    ours = EXPERTS.get(kind, "mlp.switch_mlp")
    for block in range(2):
        prefix = f"model.layers.{block}."
        for leaf, ending in (("weight", ""), ("bias", "_bias")):
            if f"{prefix}{ours}.down_proj.{leaf}" not in weights:
                continue
            gate, up, down = (weights.pop(f"{prefix}{ours}.{name}_proj.{leaf}") for name in ("gate", "up", "down"))
            both = stacked(gate, up, in_turns=kind == "gpt_oss")
            for name, value in (("gate_up_proj", both), ("down_proj", down)):
                turned = value.transpose(1, 2) if kind == "gpt_oss" and leaf == "weight" else value
                weights[f"{prefix}mlp.experts.{name}{ending}"] = turned
    renamed = {name.replace("block_sparse_moe.gate", "mlp.gate"): value for name, value in weights.items()}
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def main() -> None:
    kind, folder, ids, out, *adapters = sys.argv[1:]
    found = []
    for adapter in [None, *adapters]:
        model = load(kind, Path(folder))
        if adapter:
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad(), np.load(ids) as rows:
            found += [model(torch.tensor(rows[name])).logits.numpy() for name in rows]
    np.savez(out, *found)


if __name__ == "__main__":
    main()

"""Ranks of PEFT's configs against the factors in their files."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.peft import rank_problems
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

LAYER = "model.layers.0.self_attn.q_proj"


def write(folder, rank: int, **config):
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": mx.ones((rank, 64)),
        f"base_model.model.{LAYER}.lora_B.weight": mx.ones((64, rank)),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def test_a_rank_that_is_not_the_factors_is_refused(tiny_folder, tmp_path):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    with pytest.raises(InputError) as refused:
        load_adapter(base, write(tmp_path, 2))
    assert "\n" not in str(refused.value)
    assert all(words in str(refused.value) for words in ("rank 2", "r 4", LAYER))
    assert load_adapter(base, write(tmp_path, 2, rank_pattern={"q_proj": 2})).rank == 2


def test_every_layer_is_compared():
    found = {f"layer{n}": {"A": f"a{n}"} for n in range(3)}
    header = {f"a{n}": {"shape": [4 + n, 8]} for n in range(3)}
    [problem] = rank_problems({"r": 4}, found, header)
    assert "layer1" in problem
    assert "1 more" in problem
    assert not rank_problems({"r": 4, "rank_pattern": {"layer1": 5, "layer2": 6}}, found, header)
    assert not rank_problems({"r": 4, "peft_type": "ADALORA"}, found, header)

"""LoRA layers: exact algebra, exact trainable set, clear refusals."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from comparing import weights_checksum
from conftest import quantized, tiny_model

from mlx_lora.adapters.inject import adapter_layers, adapter_parameters, inject, kaiming_factors, select_targets
from mlx_lora.models.folder import base_fingerprint
from mlx_lora.utils.errors import InputError

ALL = "all-linear,embed_tokens"


@pytest.mark.parametrize("bits", [None, 4])
def test_fresh_adapter_changes_nothing_and_a_moved_one_does(bits):
    model = tiny_model()
    if bits:
        quantized(model, bits)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    before, checksum = model(tokens), weights_checksum(model)
    inject(model, select_targets(model, ALL).paths, rank=4, scale=2.0)
    assert mx.array_equal(model(tokens), before)
    assert weights_checksum(model, frozenset({"lora_a", "lora_b"})) == checksum
    layer = next(iter(adapter_layers(model).values()))
    layer.lora_b = mx.full(layer.lora_b.shape, 0.05)
    assert not np.allclose(model(tokens), before, atol=1e-3)


def test_trainable_set_is_exactly_the_factors():
    model = quantized(tiny_model())
    targets = select_targets(model)
    inject(model, targets.paths, rank=4, scale=1.0)
    names = set(adapter_parameters(model))
    assert names == {f"{path}.{leaf}" for path in targets.paths for leaf in ("lora_a", "lora_b")}
    assert len(targets.paths) == 2 * 7
    assert all("embed" not in path for path in targets.paths)


def test_factors_depend_on_seed_and_path_only():
    a, b = kaiming_factors("x.q_proj", 64, 32, 8, seed=1)
    assert mx.array_equal(a, kaiming_factors("x.q_proj", 64, 32, 8, seed=1)[0])
    assert not mx.array_equal(a, kaiming_factors("x.q_proj", 64, 32, 8, seed=2)[0])
    assert not mx.array_equal(a, kaiming_factors("x.k_proj", 64, 32, 8, seed=1)[0])
    assert a.shape == (64, 8)
    assert b.shape == (8, 32)
    assert mx.abs(a).max().item() <= 1 / 8
    assert mx.abs(a).max().item() > 0.11
    assert not b.any()


def test_targets_by_name_pattern_and_depth():
    model = tiny_model(tie_word_embeddings=False)
    assert select_targets(model, "q_proj,v_proj", 1).paths == (
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    )
    assert select_targets(model, "self_attn.*").keys == (
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    )  # fmt: skip
    assert select_targets(model, "q_proj", 0) == select_targets(model, "q_proj")  # as in mlx-lm
    uneven = select_targets(model, "layers.0.mlp.*,layers.1.self_attn.q_proj,lm_head")
    assert uneven.keys == uneven.paths
    assert "lm_head" in uneven.paths
    assert select_targets(model, "embed_tokens").paths == ("model.embed_tokens",)


def test_every_unmatched_target_is_named_with_what_exists():
    model = tiny_model()
    with pytest.raises(InputError, match=r"'q_prj'.*did you mean q_proj.*'nothing'.*the layers are.*gate_proj"):
        select_targets(model, "q_prj,nothing,v_proj")
    with pytest.raises(InputError, match="outside the last 1 blocks"):
        select_targets(model, "layers.0.mlp.up_proj", num_layers=1)
    with pytest.raises(InputError, match="the model has 2 blocks"):
        select_targets(model, "all-linear", num_layers=3)


def test_fingerprint_survives_quantization_and_dtype_but_not_another_model():
    config = {"model_type": "llama"}
    mark = base_fingerprint(tiny_model(), config)
    assert base_fingerprint(quantized(tiny_model()), config) == mark
    half = tiny_model()
    half.set_dtype(mx.bfloat16)
    assert base_fingerprint(half, config) == mark
    adapted = tiny_model()
    inject(adapted, select_targets(adapted, ALL).paths, rank=4, scale=2.0)
    assert base_fingerprint(adapted, config) == mark
    assert base_fingerprint(tiny_model(seed=1), config) != mark
    assert base_fingerprint(tiny_model(), {"model_type": "mistral"}) != mark

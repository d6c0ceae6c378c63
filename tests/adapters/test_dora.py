"""DoRA layers: the definition, its gradient without the length's, quantized bases, folding and mlx-lm."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import by_dtype
from make_adapters import TOKENS
from mlx_lm.utils import load as mlx_lm_load

from mlx_lora.adapters.inject import adapter_layers, inject, select_targets
from mlx_lora.adapters.lora import DoRALinear
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter
from mlx_lora.models.load import load_base

IN, OUT, R = 64, 33, 5


def test_a_row_of_zeros_stays_one_when_fused():
    """Padded vocabularies have such rows; without a length they have no direction."""
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight[3] = 0
    fused = DoRALinear.from_base(linear, (mx.random.normal((IN, R)), mx.zeros((R, OUT))), 2.0).fuse()
    assert not fused.weight[3].any()
    assert np.allclose(fused.weight, linear.weight, atol=1e-6)
    assert fused.weight[4].any()


@pytest.mark.parametrize(
    ("folder", "targets"),
    [("tiny_folder", "all-linear,embed_tokens"), ("tiny_4bit_folder", "all-linear")],
)
def test_round_trip_here_and_in_stock_mlx_lm(folder, targets, request, tmp_path):
    path = request.getfixturevalue(folder)
    base = load_base(ModelSettings(model=str(path)))
    bare = np.array(base.model(TOKENS))
    chosen = select_targets(base.model, targets)
    inject(base.model, chosen.paths, 4, 1.5, layer_type="dora")
    for wrapped in adapter_layers(base.model).values():
        wrapped.lora_b = 0.1 * mx.random.normal(wrapped.lora_b.shape)
        wrapped.m = wrapped.m * 1.1
    expected = np.array(base.model(TOKENS))
    info = AdapterInfo("dora", 4, 6.0, 1.5, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint)
    save_adapter(tmp_path, base.model, info)
    again = load_base(ModelSettings(model=str(path)))
    assert load_adapter(again, tmp_path).method == "dora"
    assert np.allclose(again.model(TOKENS), expected, atol=1e-5)
    assert not np.allclose(bare, expected, atol=1e-2)
    stock, _ = mlx_lm_load(str(path), adapter_path=str(tmp_path))
    # The folder is float32, as mlx-lm then computes, whatever we compute in.
    assert np.allclose(stock(TOKENS), expected, atol=by_dtype(1e-3, 3e-2 * np.abs(expected).max()))

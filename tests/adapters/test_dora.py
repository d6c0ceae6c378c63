"""DoRA layers: the definition, its gradient without the length's, quantized bases, folding and mlx-lm."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import by_dtype
from conftest import quantized, tiny_model
from make_adapters import TOKENS
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear as MlxLmDoRA
from mlx_lm.utils import load as mlx_lm_load

from mlx_lora.adapters.base import dense_weight
from mlx_lora.adapters.inject import adapter_layers, inject, select_targets
from mlx_lora.adapters.lora import DoRAEmbedding, DoRALinear
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter
from mlx_lora.models.load import load_base

IN, OUT, R = 64, 33, 5
TRAINED = ("lora_a", "lora_b", "m")
BASES = {
    "float": lambda: nn.Linear(IN, OUT, bias=False),
    "bias": lambda: nn.Linear(IN, OUT),
    **{f"{bits}-bit": lambda bits=bits: nn.Linear(IN, OUT).to_quantized(32, bits) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": lambda: nn.Linear(IN, OUT, bias=False).to_quantized(32, 4, mode="mxfp4"),
}


def layer(base: nn.Module) -> DoRALinear:
    factors = 0.2 * mx.random.normal((IN, R)), 0.2 * mx.random.normal((R, OUT))
    wrapped = DoRALinear.from_base(base, factors, 1.5)
    wrapped.m = wrapped.m * (1 + 0.2 * mx.random.normal((OUT,)))
    return wrapped


def lengths(weight: mx.array) -> mx.array:
    return mx.linalg.norm(weight, axis=1)


def by_definition(
    dora: DoRALinear, x: mx.array, length_of=lambda weight: mx.stop_gradient(lengths(weight))
) -> mx.array:
    weight = dense_weight(dora.linear).astype(mx.float32) + dora.scale * (dora.lora_a @ dora.lora_b).T
    y = x @ (weight * (dora.m / length_of(weight))[:, None]).T
    return y + dora.linear.bias if "bias" in dora.linear else y


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_value_and_gradients_equal_the_definition(base):
    mx.random.seed(2)
    dora, x, d = layer(base()), mx.random.normal((3, 7, IN)), mx.random.normal((3, 7, OUT))
    dora.freeze()
    dora.unfreeze(keys=list(TRAINED), recurse=False)

    def grads(function):
        return nn.value_and_grad(dora, lambda x: (function(x) * d).sum())(x)

    (value, got), (wanted, expected) = grads(dora), grads(lambda x: by_definition(dora, x))
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-3)
    assert {name for name, _ in tree_flatten(got)} == set(TRAINED)
    for name in TRAINED:
        assert np.allclose(got[name], expected[name], rtol=1e-3, atol=1e-4 * mx.abs(expected[name]).max().item()), name
    # With a gradient through the length they would be others.
    assert not np.allclose(grads(lambda x: by_definition(dora, x, lengths))[1]["lora_a"], expected["lora_a"], rtol=1e-2)


def test_a_row_of_zeros_stays_one_when_fused():
    """Padded vocabularies have such rows; without a length they have no direction."""
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight[3] = 0
    fused = DoRALinear.from_base(linear, (mx.random.normal((IN, R)), mx.zeros((R, OUT))), 2.0).fuse()
    assert not fused.weight[3].any()
    assert np.allclose(fused.weight, linear.weight, atol=1e-6)
    assert fused.weight[4].any()


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_fresh_one_changes_nothing_and_a_fused_one_is_the_same(base):
    linear, x = base(), mx.random.normal((2, IN))
    fresh = DoRALinear.from_base(linear, (mx.random.normal((IN, R)), mx.zeros((R, OUT))), 2.0)
    assert np.allclose(fresh(x), linear(x), atol=1e-4)
    trained = layer(linear)
    assert np.allclose(
        trained.fuse()(x), trained(x), atol=2e-2 if "mxfp4" in str(getattr(linear, "mode", "")) else 1e-3
    )
    assert not np.allclose(trained(x), linear(x), atol=1e-1)


def test_it_is_mlx_lms():
    linear, x = nn.Linear(IN, OUT), mx.random.normal((2, IN))
    ours = layer(linear)
    theirs = MlxLmDoRA.from_base(linear, r=R, scale=1.5)
    theirs.lora_a, theirs.lora_b, theirs.m = ours.lora_a, ours.lora_b, ours.m
    assert np.allclose(ours(x), theirs(x), atol=1e-4)


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_4bit_folder"])
def test_round_trip_here_and_in_stock_mlx_lm(folder, request, tmp_path):
    path = request.getfixturevalue(folder)
    base = load_base(ModelSettings(model=str(path)))
    bare = np.array(base.model(TOKENS))
    chosen = select_targets(base.model)
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


def test_exactly_its_parameters_are_trained_and_the_base_is_not():
    model = quantized(tiny_model())
    inject(model, select_targets(model).paths, 4, 2.0, layer_type="dora")
    kinds = {name.rsplit(".", 1)[1] for name, _ in tree_flatten(model.trainable_parameters())}
    assert kinds == {"lora_a", "lora_b", "m"}
    assert len(tree_flatten(model.trainable_parameters())) == 3 * 14


@pytest.mark.parametrize("bits", [None, 4])
def test_an_embeddings_value_gradients_and_fold_are_the_definitions(bits):
    mx.random.seed(4)
    base = nn.Embedding(41, IN)
    if bits:
        base = nn.QuantizedEmbedding.from_embedding(base, 32, bits)
    factors = 0.2 * mx.random.normal((41, R)), 0.2 * mx.random.normal((R, IN))
    dora = DoRAEmbedding.from_base(base, factors, 1.5)
    dora.m = dora.m * (1 + 0.2 * mx.random.normal((41,)))
    dora.freeze()
    dora.unfreeze(keys=list(TRAINED), recurse=False)
    tokens, x = mx.array([[0, 7, 40, 7]]), mx.random.normal((2, 5, IN))
    d, e = mx.random.normal((1, 4, IN)), mx.random.normal((2, 5, 41))

    def rows():
        weight = dense_weight(base) + dora.scale * dora.lora_a @ dora.lora_b
        return weight * (dora.m / mx.stop_gradient(mx.linalg.norm(weight, axis=1)))[:, None]

    def grads(look_up, head):
        return nn.value_and_grad(dora, lambda: (look_up() * d).sum() + (head() * e).sum())()

    value, got = grads(lambda: dora(tokens), lambda: dora.as_linear(x))
    wanted, expected = grads(lambda: rows()[tokens], lambda: x @ rows().T)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-3)
    for name in TRAINED:
        assert np.allclose(got[name], expected[name], rtol=1e-3, atol=1e-4 * mx.abs(expected[name]).max().item()), name
    assert np.allclose(dora.fuse()(tokens), dora(tokens), atol=1e-4)
    dora.finish()
    assert np.allclose(dora.as_linear(x), x @ rows().T, atol=1e-3)
    assert not np.allclose(dora(tokens), base(tokens), atol=1e-1)


def test_an_adapted_embedding_is_mlx_lms(tiny_folder, tmp_path):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    chosen = select_targets(base.model, "all-linear,embed_tokens")
    inject(base.model, chosen.paths, 4, 1.5, layer_type="dora")
    for wrapped in adapter_layers(base.model).values():
        wrapped.lora_b = 0.1 * mx.random.normal(wrapped.lora_b.shape)
    info = AdapterInfo("dora", 4, 6.0, 1.5, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint)
    save_adapter(tmp_path, base.model, info)
    stock, _ = mlx_lm_load(str(tiny_folder), adapter_path=str(tmp_path))
    expected = base.model(TOKENS)
    assert np.allclose(stock(TOKENS), expected, atol=1e-3)
    again = load_base(ModelSettings(model=str(tiny_folder)))
    assert not np.allclose(again.model(TOKENS), expected, atol=1e-2)
    load_adapter(again, tmp_path)
    assert np.allclose(again.model(TOKENS), expected, atol=1e-4)

"""Quantization-aware training: the output is the fused layer's, the gradients are those of the fit or those without rounding, and it ends and resumes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import peak_bytes
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters import qat
from mlx_lora.adapters.base import EMBEDDING, AdapterLayer
from mlx_lora.adapters.lora import DoRALinear, LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lora.adapters.qat import (
    FLAG,
    STRAIGHT,
    FakeQuantized,
    begin_qat,
    end_qat,
    fused_layer,
    hold_fused,
    release_fused,
)
from mlx_lora.utils.errors import InputError

IN, OUT, R, EXPERTS = 96, 33, 5, 3
FORMATS = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
FORMATS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def factors(*shapes: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    a, b = (0.2 * mx.random.normal(shape) for shape in shapes)
    return a, b


def linear(kind: type[AdapterLayer] = LoRALinear, mode: str = "affine", bits: int = 4, group: int = 32) -> AdapterLayer:
    base = nn.Linear(IN, OUT, bias=mode == "affine").to_quantized(group, bits, mode=mode)
    return kind.from_base(base, factors((IN, R), (R, OUT)), 1.5)


def experts() -> AdapterLayer:
    base = SwitchLinear(IN, OUT, EXPERTS, bias=True).to_quantized(32, 4)
    return LoRASwitchLinear.from_base(base, factors((EXPERTS, R, IN), (EXPERTS, OUT, R)), 1.5)


def embedding() -> AdapterLayer:
    base = nn.Embedding(OUT, IN).to_quantized(32, 4)
    return LoRAEmbedding.from_base(base, factors((OUT, R), (R, IN)), 1.5)


def with_qat(layer: AdapterLayer) -> nn.Module:
    model = nn.Sequential(layer)
    begin_qat(model)
    return model.layers[0]


def gradients(layer: AdapterLayer, call, *arguments: mx.array, names=("lora_a", "lora_b")) -> dict[str, np.ndarray]:
    """Return the output's gradients by the named arrays, and by the first argument if it is float."""
    weights = mx.random.normal(call(layer, *arguments).shape, key=mx.random.key(7))
    x, *rest = arguments
    floats = mx.issubdtype(x.dtype, mx.floating)

    def loss(own: dict[str, mx.array], x: mx.array) -> mx.array:
        layer.update(own)
        return (call(layer, x, *rest) * weights).sum()

    before = {name: layer[name] for name in names}
    found = mx.grad(loss, argnums=(0, 1) if floats else 0)(before, x)
    layer.update(before)
    own, by_x = found if floats else (found, None)
    return {**{name: np.array(array) for name, array in own.items()}, **({"x": np.array(by_x)} if floats else {})}


def assert_fused_forward_and_straight_backward(layer: AdapterLayer, call, *arguments, names=("lora_a", "lora_b")):
    plain = gradients(layer, call, *arguments, names=names)
    if layer.OVER is not EMBEDDING and layer.base.mode == "affine":
        plain |= gradients(layer, through_the_fit, *arguments, names=names)
    fused, without = fused_layer(layer), np.array(call(layer, *arguments))
    wanted = np.array(call(fused, *arguments))
    aware = with_qat(layer)
    assert isinstance(aware, FakeQuantized)
    assert np.allclose(call(aware, *arguments), wanted, rtol=1e-4, atol=1e-4)
    assert not np.allclose(without, wanted, rtol=1e-3, atol=1e-3)
    found = gradients(aware, call, *arguments, names=names)
    for name in names:
        assert np.allclose(found[name], plain[name], rtol=1e-4, atol=1e-4 * np.abs(plain[name]).max()), name
        assert plain[name].any()
    if "x" in found:
        by_fused = np.array(
            mx.grad(
                lambda x: (call(fused, x, *arguments[1:]) * mx.random.normal(wanted.shape, key=mx.random.key(7))).sum()
            )(arguments[0])
        )
        assert np.allclose(found["x"], by_fused, rtol=1e-3, atol=1e-4 * np.abs(by_fused).max())
        assert not np.allclose(found["x"], plain["x"], rtol=1e-3, atol=1e-3 * np.abs(plain["x"]).max())


def called(layer, x, *more):
    return layer(x, *more)


def through_the_fit(layer: AdapterLayer, x: mx.array, indices: mx.array | None = None) -> mx.array:
    """Return the output with a weight whose gradient is, in each group, that of its least-squares fit to the codes.

    The projection on the codes and ones is made by numpy, group by group, and each row is multiplied by its expert alone.
    """
    base, merged = layer.base, layer.weight + layer.product()
    if "m" in layer:  # DoRA's lengths, without gradient
        merged = merged * (layer.m / mx.stop_gradient(mx.linalg.norm(merged, axis=-1)))[..., None]
    ones = mx.ones_like(base.scales)
    codes = np.array(
        mx.dequantize(fused_layer(layer).weight, ones, 0 * ones, group_size=base.group_size, bits=base.bits)
    )
    projections = []
    for group in codes.reshape(-1, base.group_size):
        basis = np.stack([group, np.ones_like(group)], axis=1)
        projections.append(basis @ np.linalg.pinv(basis))
    projection = mx.array(np.array(projections, np.float32))
    followed = (projection @ merged.reshape(-1, base.group_size, 1)).reshape(merged.shape)
    weight = STRAIGHT * merged + (1 - STRAIGHT) * followed
    return x @ weight.T if indices is None else x @ weight[indices].swapaxes(-1, -2)


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_a_linear_layer_of_every_format(mode, bits, group):
    mx.random.seed(3)
    assert_fused_forward_and_straight_backward(
        linear(LoRALinear, mode, bits, group), called, mx.random.normal((2, 7, IN))
    )


def test_scales_and_biases_are_rounded_as_they_will_be_written():
    layer = linear()
    layer.base.set_dtype(mx.bfloat16)
    fused = fused_layer(layer)
    as_floats = [array.astype(mx.float32) for array in (fused.scales, fused.biases)]
    written = np.array(mx.dequantize(fused.weight, *as_floats, group_size=32, bits=4))
    assert np.allclose(np.array(with_qat(layer).merged()), written, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_small_update_has_the_true_gradient_of_the_fused_layer(bits, monkeypatch):
    monkeypatch.setattr(qat, "STRAIGHT", 0.0)
    layer, x = with_qat(linear(bits=bits)), mx.random.normal((2, 7, IN))
    layer.lora_b = layer.lora_b * 2.0**-bits / 16  # below half a step, so that no code changes
    found = gradients(layer, called, x)
    weights = mx.random.normal((2, 7, OUT), key=mx.random.key(7))
    for name in ("lora_a", "lora_b"):
        array, way = layer[name], mx.random.normal(layer[name].shape, key=mx.random.key(1))
        step = 0.1 * float(mx.abs(array).max().item())
        ends = []
        for sign in (1, -1):
            layer[name] = array + sign * step * way
            ends.append(np.array(fused_layer(layer)(x) - layer.base(x), np.float64))
        layer[name] = array
        wanted = (np.array(weights) * (ends[0] - ends[1])).sum() / (2 * step)
        assert np.isclose((found[name] * np.array(way)).sum(), wanted, rtol=0.02), name


def test_dora_trains_its_lengths_too():
    layer = linear(DoRALinear)
    layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape))
    assert_fused_forward_and_straight_backward(
        layer, called, mx.random.normal((2, 7, IN)), names=("lora_a", "lora_b", "m")
    )


def test_an_embedding_and_its_tied_head():
    assert_fused_forward_and_straight_backward(embedding(), called, mx.array([[3, 0, 10], [3, 3, 32]]))
    assert_fused_forward_and_straight_backward(
        embedding(), lambda layer, x: layer.as_linear(x), mx.random.normal((2, 4, IN))
    )


@pytest.mark.parametrize("in_order", [False, True])
def test_experts(in_order):
    indices = mx.array([0, 0, 1, 1, 2, 2, 2]) if in_order else mx.array([0, 2, 1, 1, 0, 2, 2])

    def call(layer, x, indices):
        return layer(x, indices, sorted_indices=in_order)

    assert_fused_forward_and_straight_backward(experts(), call, mx.random.normal((7, 1, IN)), indices)


def test_an_expert_that_no_row_chose_has_no_gradient():
    layer = with_qat(experts())
    found = gradients(layer, called, mx.random.normal((4, 1, IN)), mx.array([2, 0, 0, 2]))
    assert not found["lora_a"][1].any()
    assert not found["lora_b"][1].any()
    assert found["lora_a"][2].any()


def test_a_tokens_experts_share_its_input():
    indices = mx.array([[[0, 2], [1, 0], [2, 1]]])
    assert_fused_forward_and_straight_backward(experts(), called, mx.random.normal((1, 3, 1, 1, IN)), indices)


def test_it_ends_and_is_held_for_generation():
    layer, x = linear(), mx.random.normal((2, IN))
    before, model = np.array(layer(x)), nn.Sequential(layer)
    begin_qat(model)
    assert FLAG in layer
    aware = np.array(model(x))
    hold_fused(model)
    layer.lora_b = layer.lora_b * 0  # what is held stays
    assert np.allclose(model(x), aware, atol=1e-4)
    release_fused(model)
    assert not np.allclose(model(x), aware, atol=1e-3)
    end_qat(model)
    assert FLAG not in layer
    assert not np.array_equal(np.array(layer(x)), before)  # B is zero now


def test_a_float_base_is_refused_by_name():
    model = nn.Module()
    model.proj = LoRALinear.from_base(nn.Linear(IN, OUT), factors((IN, R), (R, OUT)), 1.0)
    with pytest.raises(InputError, match="proj"):
        begin_qat(model)


def test_a_float_layer_beside_quantized_ones_stays_as_it_is():
    model, x = nn.Module(), mx.random.normal((2, IN))
    model.rounded, model.proj = linear(), LoRALinear.from_base(nn.Linear(IN, OUT), factors((IN, R), (R, OUT)), 1.0)
    plain = np.array(model.proj(x))
    begin_qat(model)
    assert FLAG in model.rounded
    assert not isinstance(model.proj, FakeQuantized)
    assert np.array_equal(model.proj(x), plain)
    end_qat(model)


def test_a_compiled_function_is_traced_again_when_it_begins():
    layer, x = linear(), mx.random.normal((2, IN))
    model = nn.Sequential(layer)
    compiled = mx.compile(lambda x: model(x), inputs=[model.state])
    plain = np.array(compiled(x))
    begin_qat(model)
    assert np.allclose(compiled(x), model(x), atol=1e-5)
    assert not np.allclose(compiled(x), plain, atol=1e-3)
    end_qat(model)
    assert np.allclose(compiled(x), plain, atol=1e-5)


def test_layers_that_read_one_input_compute_their_weights_one_after_the_other():
    class Siblings(nn.Module):
        def __init__(self, count: int):
            super().__init__()
            bases = [nn.Linear(512, 512, bias=False).to_quantized(32, 4) for _ in range(count)]
            self.parts = [LoRALinear.from_base(base, factors((512, R), (R, 512)), 1.5) for base in bases]

        def __call__(self, x):
            x = mx.tanh(x)
            return sum(part(x) for part in self.parts)

    def peak(count: int) -> int:
        model = nn.Sequential(Siblings(count))
        begin_qat(model)
        step = mx.value_and_grad(lambda params, x: model.update(params)(x).sum(), argnums=(0, 1))
        mx.eval(model.parameters())
        return peak_bytes(step, model.trainable_parameters(), mx.random.normal((4, 512)), waits=False)

    assert peak(4) < 1.5 * peak(1)

"""Training kernels against mlx's own: tiled attention and the lean activation, values and every gradient."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import close, peak_bytes
from conftest import TINY, tiny_model
from mlx_lm.models import activations, base, gemma3_text, gpt_oss, llama
from tiers import by_default, named
from tiny_steps import adapted

from mlx_lora.kernels.activations import lean_swiglu, usable
from mlx_lora.kernels.attention import Tiles, tiled_attention
from mlx_lora.kernels.measure import POLYNOMIAL
from mlx_lora.kernels.table import choose_model_kernels, training_kernels
from mlx_lora.losses.check import check_kernels
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.meta import model_shape

T, S, WIDTH = 37, 37, 16
SHAPES = {"grouped": (2, 6, 2), "one key head": (1, 4, 1), "every head its own": (3, 2, 2)}  # B, H, N
MASKS = {
    "none": lambda b, h: None,
    "causal": lambda b, h: "causal",
    "window": lambda b, h: base.create_causal_mask(T, window_size=5),
    "per row": lambda b, h: (
        base.create_causal_mask(T)[None, None] & (mx.arange(T) < T - mx.arange(b)[:, None, None, None])
    ),
    "per head": lambda b, h: (
        base.create_causal_mask(T) & (mx.random.uniform(shape=(1, h, T, T)) < 0.9) | mx.eye(T, dtype=mx.bool_)
    ),
}


@pytest.mark.parametrize("tile", by_default([1, 8, 1000], 8))
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("shape", named(SHAPES, "grouped", "every head its own"))
@pytest.mark.parametrize("exponentials", by_default(["kept", "made again", POLYNOMIAL], "kept", POLYNOMIAL))
def test_attention_and_its_gradients_equal_mlx(exponentials, shape, mask, sunk, tile, monkeypatch):
    monkeypatch.setattr("mlx_lora.utils.device.keep_exponentials", lambda: exponentials == "kept")
    batch, heads, key_heads = shape
    q, d = (mx.random.normal((batch, heads, T, WIDTH)) for _ in range(2))
    k, v = (mx.random.normal((batch, key_heads, S, WIDTH)) for _ in range(2))
    sinks = [mx.random.normal((heads,))] if sunk else []
    hidden = mask(batch, heads)

    def mlx_own(q, k, v, *sinks):
        extra = {"sinks": sinks[0]} if sinks else {}
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=hidden, **extra)

    tiles = Tiles(0.3, hidden, tile, POLYNOMIAL) if exponentials == POLYNOMIAL else Tiles(0.3, hidden, tile)
    primals = [q, k, v, *sinks]
    (expected,), expected_grads = mx.vjp(lambda *p: [mlx_own(*p)], primals, [d])
    (got,), grads = mx.vjp(lambda q, k, v, *sinks: [tiled_attention(q, k, v, tiles, *sinks)], primals, [d])
    for one, other in zip([got, *grads], [expected, *expected_grads], strict=True):
        assert close(one, other, 2e-5 if exponentials == POLYNOMIAL else 1e-5)
    if exponentials == POLYNOMIAL and usable(q):  # it really is another kernel, but with sinks
        assert sunk == mx.array_equal(tiled_attention(q, k, v, Tiles(0.3, hidden, tile), *sinks), got).item()


def test_keys_before_the_queries_are_seen():
    q, k = mx.random.normal((1, 2, 9, WIDTH)), mx.random.normal((1, 2, 20, WIDTH))
    expected = mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask="causal")
    assert close(tiled_attention(q, k, k, Tiles(1.0, "causal", 4)), expected, 1e-5)
    assert not close(tiled_attention(q, k, k, Tiles(1.0, None, 4)), expected, 1e-2)


def test_sixteen_bits_stay_sixteen_bits():
    q, k, v, d = (mx.random.normal((2, 4, T, WIDTH)).astype(mx.bfloat16) for _ in range(4))
    tiles = Tiles(0.25, "causal", 8)
    (got,), grads = mx.vjp(lambda *p: [tiled_attention(*p, tiles)], [q, k, v], [d])
    exact = [a.astype(mx.float32) for a in (q, k, v, d)]
    (expected,), exact_grads = mx.vjp(lambda *p: [tiled_attention(*p, tiles)], exact[:3], exact[3:])
    for one, other in zip([got, *grads], [expected, *exact_grads], strict=True):
        assert one.dtype == mx.bfloat16
        assert close(one, other, 3e-2)


def test_memory_grows_with_the_sequence_not_its_square():
    def peak(length: int, attend) -> int:
        q, d = (mx.random.normal((1, 4, length, WIDTH)) for _ in range(2))
        return peak_bytes(lambda q, d: mx.vjp(lambda *p: [attend(*p)], [q, q, q], [d]), q, d)

    def mlx_own(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal")

    def ours(q, k, v):
        return tiled_attention(q, k, v, Tiles(1.0, "causal"))

    long, own = peak(2048, ours), peak(2048, mlx_own)
    assert long < 5 * peak(512, ours)
    assert own > 3.5 * peak(1024, mlx_own)
    assert long < 0.2 * own


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_swiglu_equals_mlx_lms(keep, compiled):
    gate, up, d = (3 * mx.random.normal((2, 5, 33)) for _ in range(3))
    wrap = mx.compile if compiled else lambda f: f
    (expected,), expected_grads = mx.vjp(lambda *p: [activations.swiglu(*p)], [gate, up], [d])
    (got,), grads = wrap(lambda *p: mx.vjp(lambda *q: [lean_swiglu(keep, *q)], list(p[:2]), [p[2]]))(gate, up, d)
    assert close(got, expected, 1e-6)
    for one, other in zip(grads, expected_grads, strict=True):
        assert close(one, other, 1e-6)


WINDOWED = {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
FAMILIES = {"llama": (llama, {}), "gemma3_text": (gemma3_text, WINDOWED)}


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_used_inside_agree_and_are_put_back(family, monkeypatch):
    module, changes = FAMILIES[family]
    config = {**TINY, "model_type": family, **changes}
    model = module.Model(module.ModelArgs.from_dict(config))
    ids = mx.arange(20)[None]
    before = model(ids)
    choice, words = check_kernels(model, config, PLAIN, choose_model_kernels(model, [128], "ours", mx.float32))
    assert choice is not None
    assert words.startswith("tiled attention (--kernels ours)")
    assert mx.array_equal(model(ids), before)
    # A wrong kernel is caught, so the right one was really called.
    monkeypatch.setattr("mlx_lora.kernels.attention.TILE_QUERIES", 8)
    with training_kernels(
        model, lambda q, k, v, tiles, sinks=None: tiled_attention(q, k, v, Tiles(1.01 * tiles.scale, tiles.mask))
    ):
        wrong = model(ids)
    assert not np.allclose(wrong, before, atol=1e-5)


def test_a_disagreeing_kernel_is_not_used(monkeypatch):
    model = adapted()
    choice = choose_model_kernels(model, [128], "ours", mx.float32)
    assert check_kernels(model, TINY, PLAIN, choice)[0] is choice
    monkeypatch.setattr("mlx_lora.kernels.table.lean_swiglu", lambda keep, gate, up: gate * up)
    use, words = check_kernels(model, TINY, PLAIN, choice)
    assert use is None
    assert "tiled attention differs by" in words


def test_a_model_with_kernels_of_its_own_keeps_them():
    class Own(nn.Module):
        def __call__(self, ids):
            return mx.zeros((*ids.shape, 288))

    choice = choose_model_kernels(Own(), [128], "ours", mx.float32)
    assert choice.classes == {}
    assert check_kernels(Own(), {"vocab_size": 288}, PLAIN, choice) == (None, "the model's own kernels")


def test_another_models_module_is_left_alone():
    q, taken = mx.zeros((1, 1, 5, WIDTH)), []

    def attend(q, k, v, tiles, sinks=None):
        taken.append(tiles.scale)
        return q

    def call(module, scale):
        module.scaled_dot_product_attention(q, q, q, None, scale, "causal")

    with training_kernels(tiny_model(), attend):
        call(llama, 1.0)
        call(gpt_oss, 2.0)
    call(llama, 3.0)
    with training_kernels(gpt_oss.Model(gpt_oss.ModelArgs()), attend):
        call(llama, 4.0)
        call(gpt_oss, 5.0)
    assert taken == [1.0, 5.0]


def test_float_masks_and_caches_keep_mlx_lms_attention():
    q = mx.random.normal((1, 2, 5, WIDTH))
    mask = mx.random.normal((1, 1, 5, 5))  # may carry a gradient, as DeepSeek's position scores do
    with training_kernels(tiny_model()):
        grad = mx.grad(lambda m: llama.scaled_dot_product_attention(q, q, q, None, 1.0, m).square().sum())(mask)
    expected = mx.grad(lambda m: base.scaled_dot_product_attention(q, q, q, None, 1.0, m).square().sum())(mask)
    assert close(grad, expected, 1e-6)
    assert mx.abs(expected).max().item() > 1e-3


def test_a_plan_knows_the_activation_of_a_model_whose_kernels_were_exchanged():
    model = adapted()
    with training_kernels(model):
        model(mx.arange(20)[None])
    assert {block.gated for block in model_shape(model, TINY).blocks} == {"silu"}

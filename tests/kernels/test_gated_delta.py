"""The chunked gated delta rule against mlx-lm's loop: values, last state and every gradient; and where it is used."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture
from comparing import close, peak_bytes
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta as mlx_lms
from mlx_lm.models import kimi_linear, olmo_hybrid, qwen3_5
from tiers import by_default, named
from tiny_steps import batch, with_adapter

from mlx_lora.compat.functions import original
from mlx_lora.kernels import gated_delta
from mlx_lora.kernels.gated_delta import (
    Decay,
    chunked_gated_delta_update,
    fused_gated_delta_update,
    lower_triangle,
    unit_lower_inverse,
)
from mlx_lora.kernels.table import training_kernels
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

LENGTHS = [1, 2, 5, 37, 64, 65, 150]
SHAPES = {
    "grouped": (2, 2, 6, 16, 8),
    "one head": (1, 1, 1, 8, 24),
    "each its own": (3, 2, 2, 8, 8),
}  # B, Hk, Hv, Dk, Dv
GATES = {"per head": False, "per channel": True}


def given(tokens: int, shape=SHAPES["grouped"], per_channel: bool = False, dtype=mx.float32) -> list[mx.array]:
    """Return q, k, v, a, b, A_log, dt_bias and a state, as the models make them."""
    batch_size, key_heads, heads, width, v_width = shape
    mx.random.seed(tokens)
    q, k = (mx.random.normal((batch_size, tokens, key_heads, width)) for _ in range(2))
    q, k = mlx_lms.normalize_qk(q, k, inv_scale=width**-0.5, eps=1e-6)
    v = mx.random.normal((batch_size, tokens, heads, v_width))
    a = mx.random.normal((batch_size, tokens, heads, *([width] if per_channel else [])))
    b = mx.random.normal((batch_size, tokens, heads))
    rate, bias = mx.random.normal((heads, *([1] if per_channel else []))), mx.random.normal(a.shape[2:])
    state = mx.random.normal((batch_size, heads, v_width, width))
    return [*(x.astype(dtype) for x in (q, k, v, a, b)), rate, bias, state]


def differentiated(update, primals: list[mx.array], mask: mx.array | None = None, compiled: bool = False, **options):
    """Return y, the last state and the gradient of each primal, for cotangents that depend on shapes alone."""

    def run(*primals: mx.array) -> tuple[list[mx.array], list[mx.array]]:
        q, _, v, *_, state = primals
        d_y = mx.random.normal(v.shape, key=mx.random.key(1)).astype(q.dtype)
        d_y = d_y if mask is None else mx.where(mask[..., None, None], d_y, 0)
        d_state = mx.random.normal(state.shape, key=mx.random.key(2))
        return mx.vjp(lambda *p: list(update(*p, mask, use_kernel=False, **options)), list(primals), [d_y, d_state])

    (y, state), grads = (mx.compile(run) if compiled else run)(*primals)
    return [y if mask is None else mx.where(mask[..., None, None], y, 0), state, *grads]


def assert_close(got: list[mx.array], expected: list[mx.array], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert close(one, other, tolerance)


@pytest.mark.parametrize("per_channel", GATES.values(), ids=GATES)
@pytest.mark.parametrize("tokens", by_default(LENGTHS, 1, 65, 150))
def test_every_length_equals_the_loop(tokens, per_channel):
    primals = given(tokens, per_channel=per_channel)
    expected = differentiated(mlx_lms.gated_delta_update, primals)
    assert_close(differentiated(chunked_gated_delta_update, primals), expected, 5e-6)
    # The paired inequality: a gate moved by 1% shows in all of them.
    moved = [x * 1.01 if n == 3 else x for n, x in enumerate(primals)]
    other = differentiated(chunked_gated_delta_update, moved)
    assert not any(close(one, two, 1e-5) for one, two in zip(other[:2], expected[:2], strict=True))


@pytest.mark.parametrize("options", [{}, {"allow_neg_eigval": True}, {"lower_bound": -5.0}])
@pytest.mark.parametrize("per_channel", GATES.values(), ids=GATES)
@pytest.mark.parametrize("shape", named(SHAPES, "grouped", "each its own"))
def test_every_shape_and_option_equals_the_loop(shape, per_channel, options):
    primals = given(70, shape, per_channel)
    expected = differentiated(mlx_lms.gated_delta_update, primals, **options)
    assert_close(differentiated(chunked_gated_delta_update, primals, **options), expected, 5e-6)


def test_compiled_it_is_the_same():
    primals = given(70)
    expected = differentiated(mlx_lms.gated_delta_update, primals)
    assert_close(differentiated(chunked_gated_delta_update, primals, compiled=True), expected, 5e-6)


@pytest.mark.parametrize("per_channel", GATES.values(), ids=GATES)
def test_many_segments_are_one_sequence(per_channel, monkeypatch):
    primals = given(150, per_channel=per_channel)
    monkeypatch.setattr(gated_delta, "SEGMENT_HEAD_TOKENS", 1)
    monkeypatch.setattr(gated_delta, "CHUNK", 16)
    expected = differentiated(mlx_lms.gated_delta_update, primals)
    assert_close(differentiated(chunked_gated_delta_update, primals), expected, 5e-6)


@pytest.mark.parametrize("per_channel", GATES.values(), ids=GATES)
def test_hidden_tokens_leave_the_state_alone(per_channel):
    primals = given(70, per_channel=per_channel)
    mask = mx.random.uniform(shape=(2, 70)) < 0.8
    expected = differentiated(mlx_lms.gated_delta_update, primals, mask)
    got = differentiated(chunked_gated_delta_update, primals, mask)
    assert_close(got, expected, 5e-6)
    y, _ = chunked_gated_delta_update(*primals, mask)
    assert mx.abs(mx.where(mask[..., None, None], 0, y)).max().item() == 0
    assert not close(differentiated(chunked_gated_delta_update, primals)[1], expected[1], 1e-2)


@pytest.mark.parametrize("per_channel", GATES.values(), ids=GATES)
def test_sixteen_bits_stay_sixteen_bits(per_channel):
    primals = given(70, per_channel=per_channel, dtype=mx.bfloat16)
    got = differentiated(chunked_gated_delta_update, primals)
    exact = differentiated(mlx_lms.gated_delta_update, [x.astype(mx.float32) for x in primals])
    assert [x.dtype for x in got[2:]] == [x.dtype for x in primals]
    assert [x.dtype for x in got[:2]] == [mx.bfloat16, mx.float32]
    for one, other in zip(got, exact, strict=True):
        assert close(one, other, 1e-2)
    assert not close(got[0], exact[0], 1e-5)


@pytest.mark.parametrize("per_channel", GATES.values(), ids=GATES)
def test_decay_to_nothing_costs_no_digits(per_channel):
    """A few tokens forget everything (log of the gate -1e4); what follows must be as exact as what precedes."""
    primals = given(100, per_channel=per_channel)
    strong = (mx.arange(100) % 23 == 7).reshape(1, 100, *[1] * (primals[3].ndim - 2))
    primals[3] = mx.where(strong, 1e4, primals[3] - 6.0)
    expected = differentiated(mlx_lms.gated_delta_update, primals)
    got = differentiated(chunked_gated_delta_update, primals)
    assert all(mx.isfinite(x).all().item() for x in got)
    # In the gradients of a, A_log and dt_bias stands 1e4 times a number that is 0.
    assert_close(got, expected, 5e-6)


def test_alike_keys_do_not_break_the_inverse():
    """With keys alike and beta at 2 the inverse is at most 2; the powers of A reach 1e28."""
    direction = mx.random.normal((1, 32), key=mx.random.key(0))
    keys = direction + 0.1 * mx.random.normal((64, 32), key=mx.random.key(1))
    keys = keys / mx.linalg.norm(keys, axis=-1, keepdims=True)
    lower = lower_triangle(2.0 * keys @ keys.T, strict=True)
    exact = np.linalg.inv(np.eye(64) + np.array(lower, dtype=np.float64))
    assert np.abs(np.array(unit_lower_inverse(lower)) - exact).max() < 2e-4
    doubled, power = mx.eye(64) - lower, lower @ lower
    for _ in range(5):
        doubled, power = doubled @ (mx.eye(64) + power), power @ power
    assert not np.abs(np.array(doubled) - exact).max() < 1.0


def test_products_by_halves_are_the_sums_that_they_stand_for():
    log = -3 * mx.random.uniform(shape=(2, 16, 5), key=mx.random.key(0))
    a, b = (mx.random.normal((2, 16, 5), key=mx.random.key(n)) for n in (1, 2))
    total = np.cumsum(np.array(log, dtype=np.float64), axis=1)
    between = np.exp(np.minimum(total[:, :, None] - total[:, None], 0))
    expected = np.tril(np.einsum("ntd,nid,ntid->nti", np.array(a), np.array(b), between))
    assert np.allclose(lower_triangle(Decay.of(log).products(a, b)), expected, atol=1e-5)
    assert not np.allclose(lower_triangle(Decay.of(log[..., :1]).products(a, b)), expected, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 2, 4, 128, 128), SHAPES["grouped"]])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_form_equals_the_loop(shape, masked):
    primals = given(20, shape)
    mask = mx.arange(20) < mx.array([20] * (shape[0] - 1) + [13])[:, None] if masked else None
    expected = differentiated(mlx_lms.gated_delta_update, primals, mask)
    assert_close(differentiated(fused_gated_delta_update, primals, mask), expected, 5e-6)
    per_channel = given(20, shape, per_channel=True)
    expected = differentiated(mlx_lms.gated_delta_update, per_channel)
    assert_close(differentiated(fused_gated_delta_update, per_channel), expected, 5e-6)


def test_memory_grows_with_the_sequence_by_far_less_than_the_loops():
    def peaks(update) -> list[int]:
        primals = [given(tokens, (1, 2, 2, 64, 64)) for tokens in (64, 256)]
        return [peak_bytes(lambda *p: differentiated(update, list(p)), *one) for one in primals]

    ours, loop = peaks(chunked_gated_delta_update), peaks(mlx_lms.gated_delta_update)
    assert ours[1] < 4.2 * ours[0]
    assert ours[1] - ours[0] < 0.1 * (loop[1] - loop[0])


# --- in models


def tiny_qwen() -> nn.Module:
    return with_adapter(tiny_architecture("qwen3_5"), 0.05)


def model_gradients(mode: str, kernels: bool, monkeypatch) -> dict[str, mx.array]:
    """Return the factors' gradients, and check who computed the rule."""
    model = tiny_qwen()
    calls: list[int] = []
    inner = gated_delta.gated_delta
    monkeypatch.setattr(gated_delta, "gated_delta", lambda *args: calls.append(1) or inner(*args))
    tape = apply_checkpointing(model, mode)
    with training_kernels(model, *([tape.attend] if tape else [])) if kernels else nullcontext():
        _, grads = nn.value_and_grad(model, plain_loss)(model, token_arrays(batch(2, 70, seed=1)))
    mx.eval(grads)
    assert bool(calls) == kernels
    return dict(tree_flatten(grads))


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_a_model_trains_with_it_in_every_checkpointing(mode, monkeypatch):
    expected = model_gradients("none", False, monkeypatch)
    got = model_gradients(mode, True, monkeypatch)
    assert got.keys() == expected.keys()
    assert any("linear_attn.in_proj_a" in name for name in got)
    for name, value in expected.items():
        assert mx.abs(value).max().item() > 0, name
        assert close(got[name], value, 1e-4), name


def test_generation_keeps_mlx_lms_own(monkeypatch):
    model = tiny_qwen().eval()
    cache = model.language_model.make_cache()
    ids = mx.array([[5, 6, 7, 8]])
    whole = model(mx.array([[5, 6, 7, 8, 9]]))[:, -1]
    called: list[int] = []
    own = mlx_lms.gated_delta_update

    def watched(*args, **options):
        called.append(1)
        return own(*args, **options)

    monkeypatch.setattr(mlx_lms, "gated_delta_update", watched)
    monkeypatch.setattr(qwen3_5, "gated_delta_update", watched)
    with training_kernels(model):
        model(ids, cache=cache)
        assert not called  # no state yet: the whole prompt goes through ours, which hands on the state
        last = model(mx.array([[9]]), cache=cache)[:, -1]
        assert called
    assert close(last, whole, 1e-4)


@pytest.mark.parametrize("module", [qwen3_5, kimi_linear, olmo_hybrid])
def test_every_family_calls_it_by_the_name_that_is_exchanged(module):
    assert original(module, "gated_delta_update") is original(mlx_lms, "gated_delta_update") is not None

"""Recurrent layers in spans and the chunked gated delta rule against mlx-lm's own: outputs, states, every gradient, and what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from comparing import close, peak_bytes
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta as mlx_lms
from mlx_lm.models import kimi_linear, olmo_hybrid, qwen3_5, ssm
from mlx_lm.models.cache import make_prompt_cache
from tiers import by_default, named
from tiny_recurrent import RECURRENT, recurrent_model
from tiny_steps import batch, with_adapter

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.compat.functions import original
from mlx_lora.kernels import gated_delta, recurrent
from mlx_lora.kernels.choose import POSITIONWISE, choose_model_kernels, training_kernels
from mlx_lora.kernels.gated_delta import (
    Decay,
    chunked_gated_delta_update,
    fused_gated_delta_update,
    lower_triangle,
    unit_lower_inverse,
)
from mlx_lora.kernels.recurrent import in_lanes, linear_scan, out_of_lanes, selective_scan, state_space_dual
from mlx_lora.losses import agree as losses
from mlx_lora.losses.agree import check_kernels, choose_loss
from mlx_lora.losses.cross_entropy import PLAIN, plain_loss, token_arrays
from mlx_lora.planner.memory import RECURRENT_CHECK_TOKENS
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

Arrayed = Callable[..., Sequence[mx.array]]
WORDS = {
    "state space": 5, "selective scan": 3, "lightning attention": 1, "gated recurrence": 1, "RWKV-7's recurrence": 1,
}  # fmt: skip


@pytest.fixture
def small_spans(monkeypatch):
    """Make a short sequence several spans of several chunks."""
    monkeypatch.setattr(recurrent, "CHUNK", 8)
    monkeypatch.setattr(recurrent, "MAX_CHUNKS", 2)
    monkeypatch.setattr(recurrent, "SCAN_TOKENS", (7, 11))
    monkeypatch.setattr(recurrent, "WKV_TOKENS", 9)


def difference(got: mx.array, expected: mx.array) -> float:
    """Return the largest difference, in the largest number expected."""
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(got - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-6)).item()


def worst(ours: Arrayed, theirs: Arrayed, primals: list[mx.array], compiled: bool = False) -> float:
    """Return the worst difference among outputs and gradients."""
    mx.random.seed(1)
    cotangents = [mx.random.normal(out.shape).astype(out.dtype) for out in theirs(*primals)]

    def both(function: Arrayed, *arrays: mx.array) -> list[mx.array]:
        outs, gradients = mx.vjp(lambda *p: list(function(*p)), list(arrays), cotangents)
        return [*outs, *gradients]

    run = mx.compile(lambda *p: both(ours, *p)) if compiled else lambda *p: both(ours, *p)
    return max(difference(g, e) for g, e in zip(run(*primals), both(theirs, *primals), strict=True))


def dual_inputs(b: int, t: int, h: int, p: int, g: int, n: int, strength: float = 1.0) -> list[mx.array]:
    """Return x, A_log, B, C, D, dt, dt_bias, state as mlx-lm's `ssm_attn` takes them."""
    mx.random.seed(0)
    a_log = mx.log(strength * mx.random.uniform(0.5, 4.0, (h,)))
    shapes = [(b, t, h, p), (b, t, g, n), (b, t, g, n), (h,), (b, t, h), (h,), (b, h, p, n)]
    x, b_, c, d, dt, bias, state = (mx.random.normal(shape) for shape in shapes)
    return [x, a_log, b_, c, d, dt - 1.0, bias, state]


def theirs_dual(x, a_log, b, c, d, dt, bias, state):
    return ssm.ssm_attn(x, a_log, b, c, d, dt, bias, state, (0.0, 100.0))


def ours_dual(x, a_log, b, c, d, dt, bias, state):
    dt = ssm.compute_dt(dt, bias, (0.0, 100.0))
    return state_space_dual(x, dt, dt * -mx.exp(a_log.astype(mx.float32)), b, c, d, state)


DUAL_SHAPES = {
    "one group": (2, 37, 4, 8, 1, 16),
    "groups": (1, 50, 6, 5, 2, 3),
    "a group each": (2, 16, 3, 4, 3, 8),
    "one token": (2, 1, 4, 8, 2, 16),
    "one chunk": (1, 5, 2, 4, 1, 4),
}


def test_a_weak_decay_behind_a_strong_one_is_not_lost():
    log_decay = mx.where(mx.arange(64) == 3, -5000.0, -1e-3)
    between = np.array(recurrent._decay_between(log_decay))
    assert np.allclose(between[60, 4:60], np.exp(-1e-3 * np.arange(56, 0, -1)), rtol=1e-6)
    assert not between[60, :3].any()
    total = np.array(mx.cumsum(log_decay))
    assert not np.allclose(np.exp(total[60] - total[4:60]), np.exp(-1e-3 * np.arange(56, 0, -1)), rtol=1e-6)


def naive_scan(x, dt, a, b, c, skip, state):
    """The definition (arXiv 2312.00752, equation 2 with the discretization of mlx-lm's Mamba), a token at a time."""
    ys = []
    for t in range(x.shape[1]):
        state = mx.exp(dt[:, t, :, None] * a) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        ys.append((state * c[:, t, None]).sum(axis=-1) + skip * x[:, t])
    return mx.stack(ys, axis=1), state


def scan_inputs(b: int, t: int, w: int, n: int, strength: float = 1.0) -> list[mx.array]:
    """Return x, dt, a, b, c, skip, state."""
    mx.random.seed(0)
    x, dt, b_, c, skip, state = (
        mx.random.normal(shape) for shape in [(b, t, w), (b, t, w), (b, t, n), (b, t, n), (w,), (b, w, n)]
    )
    return [x, nn.softplus(dt - 1.0), -strength * mx.random.uniform(0.5, 4.0, (w, n)), b_, c, skip, state]


SCAN_SHAPES = {"odd": (2, 37, 6, 5), "one state": (1, 23, 8, 1), "one token": (2, 1, 6, 4), "one span": (3, 6, 5, 3)}


# Ours, the definition, the inputs of a shape, shapes of which the first two run by default, and the places of decay and state.
RULES = {
    "dual": (ours_dual, theirs_dual, dual_inputs, DUAL_SHAPES, (1, 7)),
    "selective": (selective_scan, naive_scan, scan_inputs, SCAN_SHAPES, (2, 6)),
}
each_rule = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize(
    ("rule", "shape"),
    by_default(
        [(rule, shape) for rule, (*_, shapes, _) in RULES.items() for shape in shapes],
        ("dual", "one group"), ("dual", "groups"), ("selective", "odd"), ("selective", "one state"),
    ),
)  # fmt: skip
@pytest.mark.parametrize("strength", by_default([1e-3, 1.0, 300.0], 1.0, 300.0))
def test_outputs_states_and_gradients_equal_the_definition(rule, shape, strength, small_spans):
    ours, theirs, inputs, shapes, _ = RULES[rule]
    assert worst(ours, theirs, inputs(*shapes[shape], strength)) < 1e-5


@pytest.mark.parametrize(
    ("rule", "shape", "compiled"),
    by_default(  # for the compiled, MLX has a compiler make some thirty kernels
        [
            ("dual", (1, 150, 2, 8, 1, 4), True),
            ("selective", (1, 280, 3, 2), False),
            ("selective", (1, 280, 3, 2), True),
        ],
        ("selective", (1, 280, 3, 2), False),
    ),
)
def test_so_do_spans_of_their_own_length_and_compiled_ones(rule, shape, compiled):
    ours, theirs, inputs, *_ = RULES[rule]
    assert worst(ours, theirs, inputs(*shape), compiled=compiled) < 1e-5


@each_rule
def test_decay_and_state_are_read(rule, small_spans):
    ours, _, inputs, shapes, places = RULES[rule]
    primals = inputs(*list(shapes.values())[rule == "dual"], strength=0.01)
    y, last = ours(*primals)
    for place in places:
        changed = [1.1 * array + 0.1 * (rule == "dual") if n == place else array for n, array in enumerate(primals)]
        other, other_last = ours(*changed)
        assert difference(other, y) > 1e-3
        assert difference(other_last, last) > 1e-3


@pytest.mark.parametrize("lanes", [1, 3, 5, 23])
def test_lanes_do_not_change_a_scan(lanes):
    mx.random.seed(0)
    decay, added, state = (
        mx.random.uniform(0.0, 1.0, (2, 23, 4)),
        mx.random.normal((2, 23, 4)),
        mx.random.normal((2, 4)),
    )

    def loop(decay, added, state):
        states = []
        for t in range(decay.shape[1]):
            state = decay[:, t] * state + added[:, t]
            states.append(state)
        return [mx.stack(states, axis=1)]

    def ours(decay, added, state):
        return [out_of_lanes(linear_scan(in_lanes(decay, lanes), in_lanes(added, lanes), state), 23)]

    assert worst(ours, loop, [decay, added, state]) < 1e-6
    assert difference(ours(decay * 0.99, added, state)[0], loop(decay, added, state)[0]) > 1e-4


@each_rule
def test_sixteen_bits_stay_sixteen_bits(rule, small_spans):
    ours, exact, inputs, *_ = RULES[rule]
    *rest, state = inputs(*((2, 37, 4, 8, 1, 16) if rule == "dual" else (2, 37, 6, 5)))
    halves = [array.astype(mx.bfloat16) for array in rest]
    y, last = ours(*halves, state)
    assert (y.dtype, last.dtype) == (mx.bfloat16, mx.float32)
    rounded = [array.astype(mx.float32) for array in halves]
    expected, expected_last = exact(*rounded, state)
    # One rounding of the output; the state is not rounded at all, but for the time step that bfloat16 gave.
    assert difference(y, expected) < 8e-3
    assert difference(last, expected_last) < 8e-3
    d = mx.random.normal(y.shape).astype(mx.bfloat16)
    grads = mx.vjp(lambda *p: [ours(*p, state)[0]], halves, [d])[1]
    exact_grads = mx.vjp(lambda *p: [exact(*p, state)[0]], rounded, [d.astype(mx.float32)])[1]
    for one, other in zip(grads, exact_grads, strict=True):
        assert one.dtype == mx.bfloat16
        assert difference(one, other) < 2e-2


def adapted(kind: str) -> nn.Module:
    return with_adapter(recurrent_model(kind)[0], 0.05)


def gradients(kind: str, exchange: bool, mode: str = "none") -> dict[str, mx.array]:
    model = adapted(kind)
    arrays = token_arrays(batch(2, 29, seed=1))
    own = nn.value_and_grad(model, plain_loss)
    if not exchange:
        return dict(tree_flatten(own(model, arrays)[1]))
    tape = apply_checkpointing(model, mode)
    with training_kernels(model, *([tape.attend] if tape else [])):
        return dict(tree_flatten(own(model, arrays)[1]))


@pytest.mark.parametrize("kind", RECURRENT)
def test_every_model_has_the_gradients_of_mlx_lms_own_layers(kind, small_spans):
    with mx.stream(mx.cpu):  # mlx-lm's own kernel for Metal has no gradient
        expected = gradients(kind, exchange=False)
        mx.eval(expected)
    assert all(mx.abs(value).max().item() > 0 for value in expected.values())
    for mode in ("none", "selective", "block"):
        got = gradients(kind, exchange=True, mode=mode)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert difference(got[name], value) < 3e-5, (mode, name)


def test_each_of_mlx_lms_functions_is_exchanged():
    counts = Counter()
    for kind in RECURRENT:
        with training_kernels(recurrent_model(kind)[0]) as names:
            counts.update({*names} - {*POSITIONWISE, "gated delta"})
    assert counts == WORDS


@pytest.mark.parametrize("kind", RECURRENT)
def test_generation_is_mlx_lms_own(kind):
    model, _ = recurrent_model(kind)
    ids = mx.random.randint(0, 288, (1, 9))
    cache = make_prompt_cache(model)
    expected = [model(ids[:, :5], cache=cache), model(ids[:, 5:6], cache=cache)]
    with training_kernels(model):
        cache = make_prompt_cache(model)
        first = model(ids[:, :5], cache=cache)
        second = model(ids[:, 5:6], cache=cache)  # from the state that ours left
    assert difference(first, expected[0]) < 1e-5
    assert difference(second, expected[1]) < 1e-5
    assert difference(second, expected[0][:, -1:]) > 1e-4


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba"])
def test_the_check_before_a_run_accepts_them_and_finds_a_wrong_one(kind, monkeypatch):
    model, config = recurrent_model(kind)
    choice = choose_model_kernels(model, [128], "ours", mx.float32)
    taken, words = check_kernels(model, config, PLAIN, choice)
    assert taken is choice
    assert {"mamba2": "state space", "mamba": "selective scan", "jamba": "selective scan"}[kind] in words
    own = recurrent.run_in_spans

    def wrong(*args, **kwargs):
        out, last = own(*args, **kwargs)
        return out + 0.3 * mx.abs(out), last

    monkeypatch.setattr(recurrent, "run_in_spans", wrong)
    taken, words = check_kernels(model, config, PLAIN, choice)
    assert taken is None
    assert "differs" in words


@pytest.mark.slow
def test_memory_grows_with_a_tenth_of_what_a_state_per_token_takes():
    def peak(function: Arrayed, primals: list[mx.array]) -> int:
        # An array is released when mlx's threads get to it: on a busy machine later, so the least of three counts.
        d = mx.ones_like(primals[0])
        return min(
            peak_bytes(lambda d, *p: mx.vjp(lambda *p: [function(*p)[0]], list(p), [d]), d, *primals) for _ in range(3)
        )

    def slope(function: Arrayed, make: Callable[[int], list[mx.array]], short: int, long: int) -> float:
        return (peak(function, make(long)) - peak(function, make(short))) / (long - short)

    def dual(t: int) -> list[mx.array]:
        return dual_inputs(1, t, 8, 16, 1, 16)

    def scan(t: int) -> list[mx.array]:
        return scan_inputs(1, t, 128, 16)

    assert slope(ours_dual, dual, 1024, 2048) < 0.1 * slope(theirs_dual, dual, 512, 1024)
    assert slope(selective_scan, scan, 512, 1536) < 0.1 * slope(naive_scan, scan, 32, 96)


@pytest.mark.parametrize("kind", ["mamba", "llama"])
def test_the_check_differentiates_a_loop_over_few_tokens(kind, monkeypatch):
    """mlx-lm's own loop keeps states of each token: over a real model's layers, 128 tokens would take gigabytes."""
    model, config = (tiny_architecture("llama"), tiny_config("llama")) if kind == "llama" else recurrent_model(kind)
    model.freeze()
    inject(model, select_targets(model).paths, rank=4, scale=2.0, seed=0)
    own, own_probe, called, seen = type(model).__call__, losses.probe, [], []

    def spy(model, loss, gradient, strategy):
        called.clear()
        found = own_probe(model, loss, gradient, strategy)
        seen.extend((gradient, length) for length in called)
        return found

    monkeypatch.setattr(losses, "probe", spy)
    monkeypatch.setattr(
        type(model), "__call__", lambda self, ids, *rest: called.append(ids.shape[1]) or own(self, ids, *rest)
    )
    choose_loss(model, config)
    differentiated = {length for gradient, length in seen if gradient}
    assert differentiated == {losses.LOSS_TOKENS if kind == "llama" else RECURRENT_CHECK_TOKENS}
    assert losses.LOSS_TOKENS in {length for _, length in seen}


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
def test_sixteen_bits_stay_sixteen_bits_of_gated_delta(per_channel):
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
        primals = [given(tokens, (1, 2, 2, 64, 64)) for tokens in (64, 192)]
        return [peak_bytes(lambda *p: differentiated(update, list(p)), *one) for one in primals]

    ours, loop = peaks(chunked_gated_delta_update), peaks(mlx_lms.gated_delta_update)
    assert ours[1] < 3.2 * ours[0]
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

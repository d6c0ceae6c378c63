"""Training kernels against mlx's own: tiled attention, windows, long rows and the lean activation, values and every gradient."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from bound import bind
from comparing import assert_equal, by_dtype, close, peak_bytes
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.models import activations, base, gemma3_text, gpt_oss, llama
from tiers import by_default, named
from tiny_steps import adapted, with_adapter

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels import attention as kernel
from mlx_lora.kernels import choose as long_rows
from mlx_lora.kernels.activations import lean_swiglu, usable
from mlx_lora.kernels.attention import AttentionCall, Tiles, attend, tiled_attention
from mlx_lora.kernels.choose import (
    LONG_ROW,
    attention_class,
    choose_model_kernels,
    kernel_rows,
    long_row_kernels,
    recorded_calls,
    training_kernels,
)
from mlx_lora.kernels.measure import MLX, POLYNOMIAL
from mlx_lora.losses.agree import check_kernels, choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.graph import as_on_gpu
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import rotate_by_token, shared_caches
from mlx_lora.objectives.table import objective_of
from mlx_lora.planner.memory import TILE_QUERIES, RunShape, tile_queries
from mlx_lora.planner.speed import count_step, find_chip
from mlx_lora.trainer.evaluate import mean_loss
from mlx_lora.trainer.fit import trace_blocks
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.utils import device

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

    long, own = peak(2048, ours), peak(1024, mlx_own)
    assert long < 5 * peak(512, ours)
    assert own > 3.5 * peak(512, mlx_own)
    assert long < 0.8 * own  # which has a quarter of the scores


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
    monkeypatch.setattr("mlx_lora.kernels.choose.lean_swiglu", lambda keep, gate, up: gate * up)
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


TILE = 8


def arrays(queries: int, keys: int) -> tuple[list[mx.array], mx.array]:
    q, d = (mx.random.normal((2, 4, queries, WIDTH)) for _ in range(2))
    k, v = (mx.random.normal((2, 2, keys, WIDTH)) for _ in range(2))
    return [q, k, v], d


def results(tiles: Tiles, primals: list[mx.array], d: mx.array) -> list[mx.array]:
    sunk = primals[3:]
    (out,), grads = mx.vjp(lambda q, k, v, *s: [tiled_attention(q, k, v, tiles, *s)], primals[:3] + sunk, [d])
    return [out, *grads]


@pytest.mark.parametrize("window", [1, 3, TILE, 13, 36, 100])
@pytest.mark.parametrize(("queries", "keys"), by_default([(37, 37), (40, 40), (7, 7), (21, 50)], (37, 37), (21, 50)))
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_window_equals_its_mask(keep, sunk, queries, keys, window, monkeypatch):
    monkeypatch.setattr("mlx_lora.utils.device.keep_exponentials", lambda: keep)
    primals, d = arrays(queries, keys)
    primals += [mx.random.normal((4,))] * sunk
    mask = base.create_causal_mask(keys, window_size=window)[keys - queries :]

    def mlx_own(q, k, v, *sinks):
        extra = {"sinks": sinks[0]} if sinks else {}
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, **extra)

    (out,), grads = mx.vjp(lambda *p: [mlx_own(*p)], primals, [d])
    expected = [out, *grads]
    for got, other in zip(results(Tiles(0.3, mask, TILE, window=window), primals, d), expected, strict=True):
        # With a window of 1 the gradients of queries and keys are 0, of terms that are as large as the others.
        assert np.allclose(got, other, atol=1e-5 * max(1.0, mx.abs(other).max().item()))
    if window < 36:
        wider = results(Tiles(0.3, mask, TILE, window=window + 1), primals, d)
        assert not close(wider[0], out, 1e-4)


def computed_scores(tiles: Tiles, length: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many scores of a head are computed in a forward and a backward pass."""
    found = []
    probabilities = kernel._probabilities

    def counted(q, k, *rest):
        found.append(q.shape[2] * k.shape[2])
        return probabilities(q, k, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_probabilities", counted)
        primals, d = arrays(length, length)
        results(tiles, primals, d)
    return sum(found)


def test_scores_grow_with_the_row_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr("mlx_lora.utils.device.keep_exponentials", lambda: False)

    def scores(length: int, window: int | None) -> int:
        mask = "causal" if window is None else base.create_causal_mask(length, window_size=window)
        return computed_scores(Tiles(1.0, mask, TILE, window=window), length, monkeypatch)

    one, two, four = (scores(64 * n, 20) for n in (1, 2, 4))
    assert four - two == 2 * (two - one)
    assert four <= 2 * 256 * (20 + TILE)  # forward, and again in the backward pass
    assert scores(256, None) > 3.5 * scores(128, None)


def gemma() -> nn.Module:
    """Return a model with one block of each kind, the first of which has a window."""
    model = tiny_architecture("gemma3_text")
    assert isinstance(model, gemma3_text.Model)
    return with_adapter(model)


def noted(windows: list[int | None], attend: AttentionCall = attend) -> AttentionCall:
    def call(q, k, v, tiles, sinks=None):
        windows.append(tiles.window)
        return attend(q, k, v, tiles, sinks)

    return call


@pytest.mark.parametrize("mode", ["none", "block"])
def test_a_models_windows_are_found(mode):
    """Also where a checkpointed block is computed again; and gradients are those of mlx's own kernels."""
    ids = mx.random.randint(0, 288, (2, 70))

    def loss(model: nn.Module) -> mx.array:
        return model(ids).square().mean()

    plain = gemma()
    _, expected = nn.value_and_grad(plain, loss)(plain)
    model = gemma()
    model.update(plain.parameters())
    tape, windows = apply_checkpointing(model, mode), []
    with training_kernels(model, noted(windows, tape.attend if tape else attend)):
        _, got = nn.value_and_grad(model, loss)(model)
    assert windows[:2] == [8, None]
    assert set(windows) == {8, None}
    assert_equal(dict(tree_flatten(got)), dict(tree_flatten(expected)))


def test_short_rows_and_shared_prefixes_have_no_window():
    model, windows = gemma(), []
    with training_kernels(model, noted(windows)):
        model(mx.zeros((1, 8), mx.int32))
        rotate_by_token(model)
        ids = mx.zeros((1, 40), mx.int32)
        model(ids, **shared_caches(model, {"inputs": ids, "starts": mx.array([[10, 25]])}))
    assert windows == [None] * 4


def test_rows_of_many_windows_are_a_shape_class(monkeypatch):
    """Whose trial is one of a window, so that a kernel that skips the rest is measured as it is used."""
    kinds = {
        length: {shape[5] for row, shape in recorded_calls(gemma(), [length]) if row.name == "attention"}
        for length in (8, 20, 70)
    }
    assert kinds == {8: {"causal"}, 20: {"causal", "array"}, 70: {"causal", "window"}}
    row = kernel_rows()[0]
    shape = next(
        shape for found, shape in recorded_calls(gemma(), [300]) if found.name == "attention" and shape[5] == "window"
    )
    trial, exact = row.trial(shape, mx.float32)
    spans: list[list[kernel.Span]] = []
    monkeypatch.setattr(Tiles, "spans", noting_spans(spans))
    for name in row.candidates:
        [got], [expected] = trial.wrap(row.candidates[name])(*trial.arrays), exact(*trial.arrays)
        assert close(got, expected, 1e-4), name
    assert spans
    assert all(span.begin > 0 for tiles in spans for span in tiles[2:])


def noting_spans(found: list[list[kernel.Span]]):
    spans = Tiles.spans

    def noted_spans(self, q, k):
        found.append(spans(self, q, k))
        return found[-1]

    return noted_spans


def test_tiles_of_a_window():
    assert tile_queries(None) == tile_queries(16) == TILE_QUERIES
    assert tile_queries(512) == 256
    assert tile_queries(4096) <= 128


def test_a_gpu_gets_few_tiles_in_short_rows_and_the_same_scores_in_long_ones(monkeypatch):
    found: list[list[kernel.Span]] = []
    monkeypatch.setattr(Tiles, "spans", noting_spans(found))
    attention = kernel_rows()[0].candidates["tiled"]
    for width in (256, 1024, 4096):
        q, k = mx.zeros((1, 32, width, 2), mx.float16), mx.zeros((1, 8, width, 2), mx.float16)
        attention(q, k, k, None, 1.0, "causal")
        with as_on_gpu():
            attention(q, k, k, None, 1.0, "causal")
    assert [len(spans) for spans in found] == [4, 2, 16, 16, 64, 64]


def test_the_planner_counts_scores_in_the_window():
    model = gemma()
    shape = model_shape(model, tiny_config("gemma3_text"))
    assert [block.window for block in shape.blocks] == [8, None]
    chip = find_chip("M2").machine(16)

    def flops(width: int, blocks: slice) -> float:
        only = shape.__class__(**{**vars(shape), "blocks": shape.blocks[blocks]})
        return count_step(only, RunShape(1, width), chip)["attention"].flops

    assert flops(32768, slice(0, 1)) < 2.01 * flops(16384, slice(0, 1))
    assert flops(32768, slice(1, 2)) > 3.9 * flops(16384, slice(1, 2))


def test_a_traced_block_with_a_window_grows_with_the_row():
    """The planner does not count a mask of all queries and keys, nor scores outside of the window."""
    local, full = trace_blocks(gemma(), tiny_config("gemma3_text"))
    bytes_at = {width: local.at(1, width, on_gpu=True) for width in (2048, 4096, 65536)}
    assert bytes_at[4096].kept < 2.02 * bytes_at[2048].kept
    assert bytes_at[65536].kept == pytest.approx(16 * bytes_at[4096].kept, rel=0.02)
    assert bytes_at[65536].window == pytest.approx(16 * bytes_at[4096].window, rel=0.1)
    assert full.at(1, 65536, on_gpu=True).window > bytes_at[65536].window


def a_row(vocabulary: int, positions: int) -> Batch:
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, positions + 1)).astype(np.int32)
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((1, positions), bool))


def measured(model, config, batch: Batch, in_tiles: bool) -> tuple[float, int]:
    """Return the loss of a batch, and the most bytes that were allocated for it."""
    loss = choose_loss(model, config, "ours")
    bound = bind(objective_of(ObjectiveSettings()), loss if in_tiles else replace(loss, measuring=nullcontext), model)
    found = []
    peak = peak_bytes(lambda: found.append(mean_loss(model, bound, [batch]).loss), waits=False)
    return found[0], peak


LONG = 2048  # tokens of a row that is long here


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_long_row_is_measured_without_all_scores(name, monkeypatch):
    monkeypatch.setattr(device, "fuses_attention", lambda width, value_width: False)
    monkeypatch.setattr(long_rows, "LONG_ROW", LONG)
    model, config = tiny_architecture(name), tiny_config(name)
    model.eval()
    batch = a_row(config["vocab_size"], LONG)
    scores = 4 * config["num_attention_heads"] * LONG**2
    loss, peak = measured(model, config, batch, in_tiles=True)
    whole, peak_of_whole = measured(model, config, batch, in_tiles=False)
    assert loss == pytest.approx(whole, rel=by_dtype(1e-5, 1e-2))
    assert peak < peak_of_whole
    if not device.on_gpu():
        assert peak < scores / 2 < peak_of_whole


def test_shorter_rows_keep_their_bits():
    model = tiny_architecture("llama")
    inputs = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    own = model(inputs)
    with long_row_kernels(model):
        assert mx.array_equal(model(inputs), own)


def test_a_fused_kernel_is_kept_unless_it_reads_a_window_of_many(monkeypatch):
    [row] = [row for row in kernel_rows() if row.name == "attention"]
    monkeypatch.setattr(device, "fuses_attention", lambda width, value_width: True)
    assert long_rows._by_length(row, attention_class(4, 2, 64, 64, 2 * LONG_ROW)) == MLX
    assert long_rows._by_length(row, attention_class(4, 2, 64, 64, 2 * LONG_ROW, "window")) == row.assumed

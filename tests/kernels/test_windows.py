"""Attention with a sliding window: it equals the masked dense one, and reads the keys in the window alone."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from comparing import assert_equal, close
from mlx.utils import tree_flatten
from mlx_lm.models import base, gemma3_text
from tiers import by_default
from tiny_steps import with_adapter

from mlx_lora.kernels import attention as kernel
from mlx_lora.kernels.attention import AttentionCall, Tiles, attend, tiled_attention
from mlx_lora.kernels.table import kernel_rows, traced_calls, training_kernels
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import rotate_by_token, shared_caches
from mlx_lora.planner.memory import TILE_QUERIES, tile_queries
from mlx_lora.planner.shapes import RunShape
from mlx_lora.planner.speed import count_step, find_chip
from mlx_lora.trainer.fit import trace_blocks
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

WIDTH, TILE = 16, 8


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
        length: {shape[5] for row, shape in traced_calls(gemma(), [length]) if row.name == "attention"}
        for length in (8, 20, 70)
    }
    assert kinds == {8: {"causal"}, 20: {"causal", "array"}, 70: {"causal", "window"}}
    row = kernel_rows()[0]
    shape = next(
        shape for found, shape in traced_calls(gemma(), [300]) if found.name == "attention" and shape[5] == "window"
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

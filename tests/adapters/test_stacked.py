"""Layers that compute rows of several adapters with one product: outputs and gradients of each row are those of its own layer."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.adapters.lora import DoRALinear, LoRALinear, QALoRALinear
from mlx_lora.adapters.stacked import RowRouting, Share, StackedLinear, parts_of
from mlx_lora.data.batch import Batch
from mlx_lora.planner.memory import most_that_fit
from mlx_lora.trainer.stacked_step import SAVED_POSITIONS, RunBatch, grouped, joint_arrays

IN, OUT = 64, 48
# Runs of other row counts and widths, in one batch of the widest.
SHARES = [Share(0, 2, 9, 5), Share(1, 3, 7, 4), Share(4, 1, 9, 3)]
KINDS: dict[str, Sequence[type[AdapterLayer] | None]] = {
    "lora": (LoRALinear, LoRALinear, LoRALinear),
    "dora": (DoRALinear, DoRALinear, DoRALinear),
    "qa-lora": (QALoRALinear, QALoRALinear, QALoRALinear),
    "mixed": (LoRALinear, DoRALinear, QALoRALinear),
    "one without": (LoRALinear, None, LoRALinear),
}


def base(bias: bool = True) -> nn.Module:
    mx.random.seed(3)
    layer = nn.Linear(IN, OUT, bias=bias)
    layer = nn.QuantizedLinear.from_linear(layer, 32, 4)
    layer.freeze()
    return layer


def layer_of(kind: type[AdapterLayer], linear: nn.Module, number: int, dropout: float = 0.0) -> AdapterLayer:
    """Return a layer with a rank and scale of its own."""
    rank, key = 2 + 3 * number, mx.random.split(mx.random.key(number))
    width, out = kind.factor_dims(linear)
    a, b = mx.random.normal((width, rank), key=key[0]), mx.random.normal((rank, out), key=key[1])
    return kind.from_base(linear, (a * 0.3, b * 0.3), 0.5 + number, dropout)


def stacked(kinds, dropout: float = 0.0) -> tuple[StackedLinear, list[AdapterLayer | None]]:
    linear = base()
    layers = [None if kind is None else layer_of(kind, linear, n, dropout) for n, kind in enumerate(kinds)]
    own = {share.run: layer for share, layer in zip(SHARES, layers, strict=True) if layer is not None}
    return StackedLinear(linear, own, RowRouting(SHARES)), layers


def inputs(form: str) -> tuple[mx.array, int, list[int]]:
    """Return activations in one of the forms that a model's layers get, the axis of the runs' parts, and their lengths."""
    rows, width, slots = sum(s.rows for s in SHARES), 9, sum(s.slots for s in SHARES)
    shape, axis, lengths = {
        "rows": ((rows, width, IN), 0, [s.rows for s in SHARES]),
        "flat": ((rows * width, IN), 0, [s.rows * width for s in SHARES]),
        "picked": ((1, slots, IN), 1, [s.slots for s in SHARES]),
    }[form]
    return mx.random.normal(shape, key=mx.random.key(7)), axis, lengths


def gradients(layer: AdapterLayer, loss) -> dict[str, np.ndarray]:
    names = layer.trained
    arrays = [layer[name] for name in names]

    def of(arrays):
        for name, array in zip(names, arrays, strict=True):
            layer[name] = array
        return loss()

    found = mx.grad(of)(arrays)
    for name, array in zip(names, arrays, strict=True):
        layer[name] = array
    return {name: np.array(array) for name, array in zip(names, found, strict=True)}


@pytest.mark.parametrize("form", ["rows", "flat", "picked"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_rows_and_gradients_are_those_of_their_own_layers(kinds, form):
    joint, layers = stacked(kinds)
    x, axis, lengths = inputs(form)
    found = np.split(np.array(joint(x)), np.cumsum(lengths)[:-1], axis)
    for layer, own, part in zip(layers, np.split(np.array(x), np.cumsum(lengths)[:-1], axis), found, strict=True):
        expected = (joint.linear if layer is None else layer)(mx.array(own))
        np.testing.assert_allclose(part, np.array(expected), atol=2e-5)
        if layer is None:
            continue
        together = gradients(layer, lambda: mx.square(joint(x)).sum())
        alone = gradients(layer, lambda layer=layer, own=own: mx.square(layer(mx.array(own))).sum())
        for name, gradient in together.items():
            np.testing.assert_allclose(gradient, alone[name], atol=1e-4 * np.abs(alone[name]).max())
            assert np.abs(gradient).max() > 0.1
    if form == "rows":
        joint._routing.shares = [Share(4, 2, 9, 5), SHARES[1], Share(0, 1, 9, 3)]
        assert np.abs(np.array(joint(x))[:2] - found[0]).max() > 0.01  # the rows' own run decides


def test_without_shares_only_the_base_computes():
    joint, _ = stacked(KINDS["lora"])
    joint._routing.shares = ()
    x, *_ = inputs("rows")
    assert mx.array_equal(joint(x), joint.linear(x)).item()


@pytest.mark.parametrize("kinds", [KINDS["lora"], KINDS["dora"], KINDS["mixed"]], ids=["lora", "dora", "mixed"])
def test_infinite_factors_stay_with_their_own_rows(kinds):
    joint, layers = stacked(kinds)
    x, _, lengths = inputs("rows")
    before = np.split(np.array(joint(x)), np.cumsum(lengths)[:-1])
    others = [gradients(layers[n], lambda: mx.square(joint(x)).sum()) for n in (0, 2)]
    layers[1].lora_b = mx.full(layers[1].lora_b.shape, mx.inf)
    after = np.split(np.array(joint(x)), np.cumsum(lengths)[:-1])
    assert not np.isfinite(after[1]).all()
    for n in (0, 2):
        np.testing.assert_array_equal(before[n], after[n])
    # As its own step would: from the loss of its own rows.
    cut = [0, *np.cumsum(lengths)]
    for n, expected in zip((0, 2), others, strict=True):
        found = gradients(layers[n], lambda n=n: sum(mx.square(joint(x)[cut[k] : cut[k + 1]]).sum() for k in range(3)))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5 * np.abs(expected[name]).max())


def test_dropout_draws_what_a_run_alone_would():
    joint, layers = stacked(KINDS["lora"], dropout=0.3)
    joint._routing.keys = {share.run: mx.random.key(share.run + 10) for share in SHARES}
    x, _, lengths = inputs("rows")
    found = np.split(np.array(joint(x)), np.cumsum(lengths)[:-1])
    for layer, share, own, part in zip(
        layers, SHARES, np.split(np.array(x), np.cumsum(lengths)[:-1]), found, strict=True
    ):
        mx.random.seed(share.run + 10)
        expected = np.array(layer(mx.array(own[:, : share.width])))
        np.testing.assert_allclose(part[:, : share.width], expected, atol=2e-5)
        np.testing.assert_array_equal(np.array(joint._routing.keys[share.run]), np.array(mx.random.state[0]))
        mx.random.seed(share.run + 11)
        assert np.abs(np.array(layer(mx.array(own[:, : share.width]))) - expected).max() > 0.01


def test_parts_have_the_gradient_of_the_whole():
    x = mx.arange(12, dtype=mx.float32).reshape(6, 2)
    weights = [1.0, 2.0, 3.0]

    def loss(x):
        return sum(w * mx.square(part).sum() for w, part in zip(weights, parts_of(x, [1, 3, 2]), strict=True))

    expected = 2 * np.array(x) * np.repeat(weights, [1, 3, 2])[:, None]
    np.testing.assert_array_equal(np.array(mx.grad(loss)(x)), expected)


# Groups


def batch(rows: int, width: int, slots: int = 8, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    ids = random.integers(1, 90, (rows, width + 1)).astype(np.int32)
    mask = np.zeros((rows, width), bool)
    mask[:, -1] = True
    return Batch.of(ids[:, :-1], ids[:, 1:], mask, slots)


def test_batches_of_similar_width_are_one_group():
    parts = [RunBatch(n, batch(4, width)) for n, width in enumerate((30, 200, 32, 190, 31))]
    assert [sorted(p.run for p in group) for group in grouped(parts)] == [[1, 3], [0, 2, 4]]
    assert 4 * (200 - 190) <= SAVED_POSITIONS < 4 * (190 - 32)
    apart = [RunBatch(n, batch(4, 30), picks=bool(n)) for n in range(2)]  # one needs its whole last block
    assert len(grouped(apart)) == 2
    heavy = [RunBatch(n, batch(4, 30), bytes_per_position=100.0) for n in range(4)]
    assert [len(group) for group in grouped(heavy, room_bytes=2 * 4 * 30 * 100)] == [2, 2]


def test_a_joint_batch_keeps_each_runs_rows_and_targets():
    parts = [RunBatch(0, batch(2, 5, seed=1)), RunBatch(3, batch(3, 8, seed=2))]
    inputs, targets, mask, positions, weights = (np.array(array) for array in joint_arrays(parts).values())
    assert inputs.shape == (5, 8)
    for part, first, slots in ((parts[0], 0, slice(0, 8)), (parts[1], 2, slice(8, 16))):
        rows, own = slice(first, first + part.rows), part.batch
        np.testing.assert_array_equal(inputs[rows, : part.width], own.inputs)
        np.testing.assert_array_equal(targets.reshape(-1)[positions[slots]], own.targets.reshape(-1)[own.positions])
        np.testing.assert_array_equal(weights[slots], own.weights)
        assert (
            (positions[slots] // 8 >= first) & (positions[slots] // 8 < first + part.rows)
        ).all()  # unused slots, too
        assert not mask[rows, part.width :].any()


def test_how_many_runs_fit():
    assert most_that_fit(100, [10] * 8, [30] * 8, 160) == 3
    assert most_that_fit(100, [10] * 8, [30] * 8, 139) == 0
    assert most_that_fit(100, [10] * 8, [30] * 8, 210) == 8
    assert most_that_fit(100, [10, 10, 10], [30, 30, 60], 165) == 2  # the third needs a larger step

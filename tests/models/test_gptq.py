"""Rounding with error feedback: below plain rounding's error in a layer's outputs, and GPTQ as a plain float64 loop has it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.models.gptq import Curvature, Grid, feedback_codes, round_weight
from mlx_lora.models.quantize import QuantFormat

AFFINE = [QuantFormat(bits, group) for bits, group in ((2, 64), (3, 32), (4, 64), (5, 32), (6, 32), (8, 64))]
FIXED = [QuantFormat(4, 32, "mxfp4"), QuantFormat(4, 16, "nvfp4"), QuantFormat(8, 32, "mxfp8")]


def correlated(inputs: int, tokens: int = 900, seed: int = 0) -> mx.array:
    """Return X X^T of inputs that depend on each other."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(inputs, inputs)) @ draw.normal(size=(inputs, tokens)) * draw.gamma(1.0, size=(inputs, 1))
    return mx.array((x @ x.T / inputs).astype(np.float32))


def weights(outputs: int, inputs: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32) * 0.05)


def plain_gptq(weight, hessian, order, scales, biases, size, most):
    """GPTQ in float64, one column at a time, each time with the inverse of what is left of H (equations 2 and 3)."""
    weight, found = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    left = list(order)
    while left:
        j = left[0]
        inverse = np.linalg.inv(hessian.astype(np.float64)[np.ix_(left, left)])
        group = j // size
        step = np.where(scales[:, group] == 0, 1, scales[:, group])
        code = np.clip(np.round((weight[:, j] - biases[:, group]) / step), 0, most)
        found[:, j] = code
        error = (weight[:, j] - (biases[:, group] + scales[:, group] * code)) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
        left = left[1:]
    return found


@pytest.mark.parametrize("shape", [(5, 96), (33, 160)])
def test_codes_are_those_of_a_plain_loop_in_float64(shape):
    quantization = QuantFormat(4, 32)
    weight, curvature = weights(*shape), Curvature.of(correlated(shape[1]))
    grid = Grid.of_weight(weight, quantization, mx.float32)
    codes, values = feedback_codes(weight, curvature, grid)
    arrays = [np.array(a) for a in (weight, curvature.hessian)]
    wanted = plain_gptq(*arrays, curvature.order, np.array(grid.scales), np.array(grid.biases), 32, 15)
    assert (np.array(codes) == wanted).mean() > 0.98  # a tie that rounds otherwise moves what follows
    error = curvature.error(weight - values).sum().item()
    assert error == pytest.approx(curvature.error(weight - grid.values(mx.array(wanted))).sum().item(), rel=0.02)
    plain = np.clip(np.round((arrays[0] - np.repeat(grid.biases, 32, 1)) / np.repeat(grid.scales, 32, 1)), 0, 15)
    assert (plain == wanted).mean() < 0.9


@pytest.mark.parametrize("quantization", [*AFFINE, *FIXED], ids=str)
def test_the_outputs_error_is_below_plain_roundings(quantization):
    weight, curvature = weights(24, 192), Curvature.of(correlated(192))
    rounded = round_weight(weight, curvature, [Grid.of_weight(weight, quantization, mx.float32)])
    stored = rounded.packed.dequantize().astype(mx.float32)
    plain = quantization.quantize(weight).dequantize().astype(mx.float32)
    error, of_plain = (curvature.error(weight - w).sum().item() for w in (stored, plain))
    assert error == pytest.approx(rounded.error.sum().item(), rel=1e-3)  # what is packed is what was measured
    assert error < 0.75 * of_plain
    # Each weight for itself is rounded worse: the gain is of the outputs, and only for these inputs.
    assert mx.square(weight - stored).sum().item() > mx.square(weight - plain).sum().item()
    independent = Curvature.of(mx.eye(192))
    assert independent.error(weight - stored).sum().item() > independent.error(weight - plain).sum().item()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_grid_of_more_bits_has_the_old_weight_exactly(bits):
    packed = QuantFormat(4, 32).quantize(weights(7, 96))
    old = packed.dequantize()
    grid = Grid.of_layer(packed.arrays[1], packed.arrays[2], packed.quantization).refined(bits)
    curvature = Curvature.of(correlated(96))
    codes, _ = feedback_codes(old, curvature, grid)
    assert mx.allclose(grid.packed(codes).dequantize(), old, atol=1e-6)
    moved = old + 0.01 * weights(7, 96, seed=2)
    assert not mx.allclose(grid.packed(feedback_codes(moved, curvature, grid)[0]).dequantize(), moved, atol=1e-6)


def test_scales_are_the_best_for_their_codes():
    weight, curvature = weights(3, 64), Curvature.of(correlated(64))
    grid = Grid.of_weight(weight, QuantFormat(3, 32), mx.float32)
    codes, _ = feedback_codes(weight, curvature, grid)
    fitted = grid.fitted(codes, weight, curvature.hessian)
    best = curvature.error(weight - fitted.values(codes))
    assert (best < curvature.error(weight - grid.values(codes))).all()
    q, h = np.array(codes, np.float64), np.array(curvature.hessian, np.float64)
    for row in range(3):
        features = np.zeros((64, 4))
        for group in range(2):
            own = slice(32 * group, 32 * (group + 1))
            features[own, group], features[own, 2 + group] = q[row, own], 1
        half = np.linalg.cholesky(h).T
        solved = np.linalg.lstsq(half @ features, half @ np.array(weight, np.float64)[row], rcond=None)[0]
        wanted = ((half @ (features @ solved - np.array(weight, np.float64)[row])) ** 2).sum()
        assert best[row].item() == pytest.approx(wanted, rel=1e-2)


def test_inputs_that_are_always_zero_do_no_harm():
    weight = weights(4, 64)
    hessian = correlated(64)
    hessian[3] = 0.0
    hessian[:, 3] = 0.0
    for one in (hessian, mx.zeros((64, 64))):
        found = round_weight(weight, Curvature.of(one), [Grid.of_weight(weight, QuantFormat(4, 32), mx.float32)])
        assert mx.isfinite(found.packed.dequantize()).all()
        assert mx.abs(found.packed.dequantize() - weight).max().item() < 0.2

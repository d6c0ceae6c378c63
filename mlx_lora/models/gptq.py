"""Round a weight so that the outputs of its layer change little, instead of each single weight.

For inputs X, rounding W to V changes the outputs by (W - V) X. With H = X X^T, the sum of their squares is

    error(V) = tr (W - V) H (W - V)^T

GPTQ rounds one column after the other and moves the columns that are not rounded yet, so that they make up for the error
of those that are. With H^-1 = U^T U, U upper triangular (arXiv 2210.17323, equations 2 and 3):

    e = (w_j - v_j) / U_jj         w_k <- w_k - e U_jk  for k > j

Columns go in the order of falling H_jj. The scales s and biases b of affine groups are then fitted to the codes q: error is
quadratic in them, so that a row's best ones solve a linear equation. With F = [q by group, ones by group]:

    F^T H F [s b]^T = F^T H w^T

A row begins on the grid that the layer had before the update, which has the old weight in it exactly, or on the one that
`mx.quantize` chooses for the new weight, whichever rounds it better. Scales are fitted, columns are rounded, and scales are
fitted again. An update is small: on the old grid only the update is rounded, and not the whole weight once more.

Shapes: O outputs (rows of the weight), I inputs (its columns), g columns of a group, G = I / g groups, R rows at a time.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.quant import awq, dwq, gptq

from mlx_lora.config.rules import check_options
from mlx_lora.models.folder import FOREIGN_ERRORS, short
from mlx_lora.models.quantize import MICROSCALING, PackedWeight, QuantFormat, pack_codes, quantize_model
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal; GPTQ's
BLOCK = 64  # columns whose errors are fed to all later columns together
FIT_BYTES = 30_000_000  # of the largest array of some rows while scales are fitted
FIT_DAMPING = 1e-4  # of the diagonal: a group with equal codes has scale and bias in one direction


@dataclass(frozen=True)
class Curvature:
    """H of a layer's inputs, and what rounding needs of it.

    Attributes:
        hessian: (I, I) float32, damped.
        order: (I,) columns by falling diagonal.
        factor: (I, I) U, of the columns in this order.
    """

    hessian: mx.array
    order: np.ndarray
    factor: mx.array

    @classmethod
    def of(cls, hessian: mx.array, damping: float = DAMPING) -> Curvature:
        """Damp X X^T, so that it can be inverted, and factor the inverse."""
        mean = mx.diag(hessian).mean().item()
        hessian = hessian + (damping * mean if mean > 0 else 1.0) * mx.eye(hessian.shape[0])
        order = np.argsort(-np.array(mx.diag(hessian)), kind="stable")
        columns = mx.array(order)
        with mx.stream(mx.cpu):  # Metal has neither function
            lower = mx.linalg.cholesky(hessian[columns][:, columns])
            factor = mx.linalg.cholesky(mx.linalg.cholesky_inv(lower), upper=True)
        mx.eval(hessian, factor)
        return cls(hessian, order, factor)

    def error(self, difference: mx.array) -> mx.array:
        """Return (O,): the summed squares of each output's change, for a change (O, I) of the weight."""
        return ((difference @ self.hessian) * difference).sum(axis=1)


@dataclass(frozen=True)
class Grid:
    """The values that a quantized weight can have: `biases + scales * levels`, per group.

    Attributes:
        quantization: how the weight is packed.
        scales, biases: (O, G) float32; the biases of the microscaling modes are zero.
        stored: the scales as the microscaling modes pack them; None: affine.
        dtype: of stored affine scales and biases, to which `scales` and `biases` are rounded.
    """

    quantization: QuantFormat
    scales: mx.array
    biases: mx.array
    stored: mx.array | None
    dtype: mx.Dtype

    @classmethod
    def of_weight(cls, weight: mx.array, quantization: QuantFormat, dtype: mx.Dtype) -> Grid:
        """Return the grid that `mx.quantize` chooses for a weight."""
        _, scales, *biases = mx.quantize(weight.astype(dtype), **quantization.layout)
        return cls.of_layer(scales, biases[0] if biases else None, quantization)

    @classmethod
    def of_layer(cls, scales: mx.array, biases: mx.array | None, quantization: QuantFormat) -> Grid:
        """Return the grid of a quantized layer's scales and biases."""
        if biases is not None:
            return cls(quantization, scales.astype(mx.float32), biases.astype(mx.float32), None, scales.dtype)
        width = scales.shape[1] * quantization.group_size
        ones = pack_codes(
            np.full((scales.shape[0], width), MICROSCALING[quantization.mode].one, np.uint8), quantization.bits
        )
        values = quantization.dequantize(mx.array(ones), scales).astype(mx.float32)
        values = values[:, :: quantization.group_size]
        return cls(quantization, values, mx.zeros_like(values), scales, mx.float32)

    def refined(self, bits: int) -> Grid:
        """Return an affine grid of more bits that has all values of this one: its steps are halved for each bit."""
        more = bits - self.quantization.bits
        return replace(self, quantization=replace(self.quantization, bits=bits), scales=self.scales / 2**more)

    @classmethod
    def joined(cls, grids: list[Grid]) -> Grid:
        """Return the grid of several weights, one below the other."""
        scales, biases = (mx.concatenate(arrays) for arrays in ([g.scales for g in grids], [g.biases for g in grids]))
        stored = [grid.stored for grid in grids if grid.stored is not None]
        return cls(grids[0].quantization, scales, biases, mx.concatenate(stored) if stored else None, grids[0].dtype)

    def levels(self) -> tuple[mx.array, mx.array]:
        """Return the values of a microscaling mode's codes for a scale of 1, ascending, and the codes."""
        quantization = self.quantization
        codes = np.resize(np.arange(2**quantization.bits, dtype=np.uint8), (1, max(32, 2**quantization.bits)))
        one_scale = MICROSCALING[quantization.mode].one_scale
        scales = mx.full((1, codes.shape[1] // quantization.group_size), one_scale, mx.uint8)
        values = quantization.dequantize(mx.array(pack_codes(codes, quantization.bits)), scales)
        values = np.array(values.astype(mx.float32))[0, : 2**quantization.bits]
        usable = np.flatnonzero(np.isfinite(values))
        usable = usable[np.argsort(values[usable], kind="stable")]
        return mx.array(values[usable]), mx.array(usable.astype(np.float32))

    def values(self, codes: mx.array) -> mx.array:
        """Return the (O, I) weights of (O, I) affine codes."""
        size = self.quantization.group_size
        return mx.repeat(self.biases, size, 1) + mx.repeat(self.scales, size, 1) * codes

    def fitted(self, codes: mx.array, weight: mx.array, hessian: mx.array) -> Grid:
        """Return the grid whose scales and biases are the best for these codes, rounded to their dtype.

        Args:
            codes: (O, I) affine.
            weight: (O, I) float32, to be approximated.
            hessian: (I, I), damped.
        """
        size, groups = self.quantization.group_size, self.scales.shape[1]
        rows = max(1, FIT_BYTES // (4 * groups * len(hessian)))
        left = (weight - self.values(codes)) @ hessian  # (O, I)
        # (G, I, g), in order: a product would else copy all of H for each few rows.
        by_group = mx.contiguous(hessian.reshape(-1, groups, size).swapaxes(0, 1))
        ones = hessian.reshape(groups, size, groups, size).sum(axis=(1, 3))  # (G, G): F^T H F of the biases
        changes = []
        for start in range(0, len(codes), rows):
            q = codes[start : start + rows].reshape(-1, groups, size)  # (R, G, g)
            half = (by_group @ q.transpose(1, 2, 0)).reshape(groups, groups, size, -1)  # H q: (G', G, g, R)
            both = (half * q.transpose(1, 2, 0)).sum(axis=2).transpose(2, 1, 0)  # (R, G, G'): scales with scales
            mixed = half.sum(axis=2).transpose(2, 0, 1)  # (R, G', G): scales with biases
            upper = mx.concatenate([both, mixed], axis=2)
            plain = mx.broadcast_to(ones, (len(q), groups, groups))
            lower = mx.concatenate([mixed.swapaxes(1, 2), plain], axis=2)
            matrix = mx.concatenate([upper, lower], axis=1)  # (R, 2 G, 2 G)
            e = left[start : start + rows].reshape(q.shape)
            wanted = mx.concatenate([(e * q).sum(axis=2), e.sum(axis=2)], axis=1)
            diagonal = mx.diagonal(matrix, axis1=1, axis2=2)
            eased = FIT_DAMPING * (diagonal + 1e-3 * diagonal.mean(axis=1, keepdims=True))
            with mx.stream(mx.cpu):
                change = mx.linalg.solve(matrix + eased[..., None] * mx.eye(2 * groups), wanted[..., None])
            mx.eval(change)
            changes.append(change[..., 0])
        change = mx.concatenate(changes)
        scales, biases = self.scales + change[:, :groups], self.biases + change[:, groups:]
        stored = [a.astype(self.dtype).astype(mx.float32) for a in (scales, biases)]
        return replace(self, scales=stored[0], biases=stored[1])

    def packed(self, codes: mx.array) -> PackedWeight:
        """Pack (O, I) codes with the scales and biases."""
        words = mx.array(pack_codes(np.array(codes).astype(np.uint8), self.quantization.bits))
        own = [self.scales.astype(self.dtype), self.biases.astype(self.dtype)] if self.stored is None else [self.stored]
        return PackedWeight([words, *own], self.quantization)

    def coder(self) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
        """Return a function from (weight - bias) / scale to the code of the nearest level, and that level, as float32."""
        most = 2**self.quantization.bits - 1
        if self.stored is None:

            def affine(step: mx.array) -> tuple[mx.array, mx.array]:
                code = mx.clip(mx.round(step), 0, most)
                return code, code

            return affine
        levels, codes = self.levels()
        between = (levels[1:] + levels[:-1]) / 2

        def nearest(step: mx.array) -> tuple[mx.array, mx.array]:
            index = (step[..., None] > between).sum(axis=-1)
            return codes[index], levels[index]

        return nearest

    def rounded(self, weight: mx.array) -> tuple[mx.array, mx.array]:
        """Return the (O, I) codes and values of a weight, each rounded for itself."""
        size = self.quantization.group_size
        scales, biases = mx.repeat(self.scales, size, 1), mx.repeat(self.biases, size, 1)
        codes, levels = self.coder()((weight - biases) / mx.where(scales == 0, 1, scales))
        return codes, biases + scales * levels


def feedback_codes(weight: mx.array, curvature: Curvature, grid: Grid) -> tuple[mx.array, mx.array]:
    """Round a weight column by column, with the error fed to the columns that follow.

    Args:
        weight: (O, I) float32.
        curvature: of the layer's inputs.
        grid: whose scales stay as they are.

    Returns:
        (O, I) codes as float32, and (O, I) the values that they have.
    """
    size, columns, order = grid.quantization.group_size, weight.shape[1], curvature.order
    rest = weight.T[mx.array(order)]  # (I, O), in order: a column is contiguous
    scales, biases = grid.scales.T, grid.biases.T  # (G, O)
    divisors, code_of = mx.where(scales == 0, 1, scales), grid.coder()
    codes, values = [], []
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        own, square, errors = rest[: end - start], curvature.factor[start:end, start:end], []
        for k in range(end - start):
            group = int(order[start + k]) // size
            code, level = code_of((own[k] - biases[group]) / divisors[group])
            value = biases[group] + scales[group] * level
            errors.append((own[k] - value) / square[k, k])
            own = own - square[k][:, None] * errors[-1]  # the columns before k have zeros in the factor
            codes.append(code)
            values.append(value)
        rest = rest[end - start :] - curvature.factor[start:end, end:].T @ mx.stack(errors)
        mx.eval(rest, codes, values)
    back = mx.array(np.argsort(order))
    return mx.stack(codes)[back].T, mx.stack(values)[back].T


def round_weight(weight: mx.array, curvature: Curvature, grids: list[Grid]) -> tuple[PackedWeight, mx.array]:
    """Round a weight for the outputs of its layer, and return it packed, with (O,) the `Curvature.error` of that.

    Args:
        weight: (O, I) float32.
        curvature: of the layer's inputs.
        grids: to begin with, all with the same quantization; each row takes the one that rounds it best.
    """
    grid, *others = grids
    least = curvature.error(weight - grid.rounded(weight)[1])
    for other in others:
        error = curvature.error(weight - other.rounded(weight)[1])
        wins = (error < least)[:, None]
        scales, biases = mx.where(wins, other.scales, grid.scales), mx.where(wins, other.biases, grid.biases)
        stored = None
        if other.stored is not None and grid.stored is not None:
            stored = mx.where(wins, other.stored, grid.stored)
        grid, least = replace(grid, scales=scales, biases=biases, stored=stored), mx.minimum(error, least)
    if grid.stored is not None:
        codes, values = feedback_codes(weight, curvature, grid)
    else:
        grid = grid.fitted(grid.rounded(weight)[0], weight, curvature.hessian)
        codes, _ = feedback_codes(weight, curvature, grid)
        grid = grid.fitted(codes, weight, curvature.hessian)
        values = grid.values(codes)
    return grid.packed(codes), curvature.error(weight - values)


# Quantize a float model with mlx-lm's own learned quantizers, on rows of text instead of by rounding alone.
#
#     dwq    plain rounding, then gradient steps on scales and biases until the logits are the float model's
#     awq    scales of input channels and clipped weights, searched block by block (arXiv 2306.00978)
#     gptq   rounding with error feedback (arXiv 2210.17323); other layers, such as embeddings, get 6 bits
#
# mlx-lm's functions are called as its commands call them, but with the user's rows; what they need and do not have is refused
# before the work.

log = logging.getLogger(__name__)

WINDOW_TOKENS = 512  # mlx-lm's
FEWEST_TOKENS = 64
BATCH_ROWS = 4
DWQ_RATE = 1e-6  # mlx-lm's
GPTQ_OTHER_BITS = 6
Rows = Sequence[np.ndarray]
"""Token ids of each row."""


def check_quantizer(name: str, config: dict[str, Any], quantization: QuantFormat) -> None:
    """Refuse what mlx-lm's quantizer cannot do, before weights are read.

    Args:
        name: a key of QUANTIZERS.
        config: the model's config.json.
        quantization: that is asked for.

    Raises:
        InputError: with the reason.
    """
    flag, kind = f"--quantizer {name}", config.get("model_type")
    check_options(
        "convert", {"quantizer": name, "calibrate": True, "mode": quantization.mode, "bits": quantization.bits}
    )
    if name == "gptq" and kind == "afm7":
        raise InputError(f"{flag}: mlx-lm cannot load afm7's joined layers as its gptq packs them; use --quantizer dwq")
    if name == "awq" and kind not in awq.AWQ_MODEL_CONFIGS:
        known = ", ".join(sorted(awq.AWQ_MODEL_CONFIGS))
        raise InputError(f"{flag}: mlx-lm's awq knows {known}, and not {kind}; use --quantizer dwq or gptq")


def learn_quantization(
    model: nn.Module, config: dict[str, Any], quantization: QuantFormat, name: str, rows: Rows
) -> nn.Module:
    """Return a float model quantized by one of mlx-lm's quantizers.

    Args:
        model: float; changed.
        config: its config.json.
        quantization: affine.
        name: a key of QUANTIZERS, checked.
        rows: to learn from.

    Raises:
        InputError: there are too few tokens, or mlx-lm's code cannot do this model.
    """
    tokens = sum(map(len, rows))
    if tokens < 2 * FEWEST_TOKENS:
        raise InputError(f"--calibrate: the rows have {counted(tokens, 'token')}; give at least {2 * FEWEST_TOKENS}")
    log.info(f"Learning the quantization with mlx-lm's {name}, on {tokens:,} tokens of {counted(len(rows), 'row')}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # standard output belongs to the command
            model = QUANTIZERS[name](model, config, quantization, rows)
        mx.eval(model.parameters())
    except FOREIGN_ERRORS as error:
        others = " or ".join(other for other in QUANTIZERS if other != name)
        raise InputError(
            f"--quantizer {name}: mlx-lm's {name} cannot quantize this {config.get('model_type')} model ({short(error)}); "
            f"try {others}, or leave it out"
        ) from error
    return model


def _windows(rows: Rows) -> mx.array:
    """Return (N, T): the rows one after the other, cut into windows."""
    joined = np.concatenate(rows)
    width = min(WINDOW_TOKENS, len(joined) // 2)
    return mx.array(joined[: len(joined) // width * width].reshape(-1, width).astype(np.int32))


def _dwq(model: nn.Module, config: dict[str, Any], quantization: QuantFormat, rows: Rows) -> nn.Module:
    student = copy.deepcopy(model)
    student, *_ = quantize_model(student, dict(config), quantization)
    dtype = max(
        (p.dtype for _, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)),
        key=lambda dtype: dtype.size,
    )
    width = min(WINDOW_TOKENS, sum(map(len, rows)) // 2)  # some are held out
    cut = [(row[start : start + width], 0) for row in rows for start in range(0, len(row), width)]
    cut = [row for row in cut if len(row[0]) > 1]
    if len(cut) < 2:
        raise InputError("--calibrate: the rows are single tokens; give texts")
    held_out = max(1, len(cut) // 10)
    batch = min(BATCH_ROWS, held_out, len(cut) - held_out)
    model.freeze()
    student.freeze()
    dwq.dwq_quantize(
        student,
        lambda ids, _, split: model(ids),
        optimizers.Adam(learning_rate=DWQ_RATE, bias_correction=True),
        cut[held_out:],
        cut[:held_out],
        batch_size=max(1, batch),
        max_seq_length=WINDOW_TOKENS + 1,
        seed=0,
        dtype=dtype,
    )
    student.eval()
    return student


def _awq(model: nn.Module, config: dict[str, Any], quantization: QuantFormat, rows: Rows) -> nn.Module:
    awq.awq_quantize(
        model,
        _windows(rows),
        awq.AWQ_MODEL_CONFIGS[config["model_type"]],
        group_size=quantization.group_size,
        bits=quantization.bits,
        embed_group_size=quantization.group_size,
        embed_bits=quantization.bits,
    )
    return model


QUANTIZERS: dict[str, Callable[[nn.Module, dict[str, Any], QuantFormat, Rows], nn.Module]] = {
    "dwq": _dwq,
    "awq": _awq,
    "gptq": lambda model, _, to, rows: gptq.gptq_quantize(
        model, _windows(rows), to.bits, to.group_size, GPTQ_OTHER_BITS, to.group_size
    )[0],
}

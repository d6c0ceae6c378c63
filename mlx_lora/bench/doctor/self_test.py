"""Test whether this machine computes a training step's products correctly, and list its measured kernels, for `doctor`.

Small products are correct on machines where a model's shapes return garbage, so the test uses shapes with known faults:

    mlx#3797   half-precision products with a long inner side, from M N = 2048^2 on (M5)
    mlx#4411   float32 products with 11 bits (M5): two rows and more, never one
    mlx#4201   a quantized product whose weight is not transposed: the backward pass of every quantized base
    mlx#3586   a 6-bit product of 720 rows
    mlx#3854   nvfp4 with few rows and a long inner side
    mlx#3585   attention over more than eight positions

A sample of each result's rows is compared with numpy in float64. Shapes: (M, K) by (K, N).

The table of kernels has all candidates measured on this machine, with time, memory and error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.kernels.measure import Figures, ShapeClass, choose, read_figures, read_store
from mlx_lora.kernels.table import activation_class, attention_class, choose_among, kernel_rows
from mlx_lora.losses.fused import NAME, choose_kernel, head_words, loss_figures
from mlx_lora.models.head import Head
from mlx_lora.rollouts.generator import NAME as WEIGHTS
from mlx_lora.rollouts.generator import TOKEN, choose_form, kind_words, product_figures
from mlx_lora.utils import device

# Products

SAMPLED_ROWS = 32
# Relative to the largest exact number: a few roundings of the dtype. Float32 with 11 bits would reach 5e-4.
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 2e-2, mx.float16: 3e-3}
# Products above this many operations are for a GPU: mlx's CPU has no fast 16-bit kernel.
MOST_CPU_OPERATIONS = 4e9
MOST_CPU_HALF_OPERATIONS = 4e8


@dataclass(frozen=True)
class ProductCheck:
    """One comparison: what was computed, the largest error relative to the largest exact number, and its bound."""

    what: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound


def self_test() -> Iterator[ProductCheck]:
    """Yield all comparisons that this backend can make within seconds."""
    on_cpu = device.current_device().backend == "cpu"
    key = mx.random.key(0)  # a separate key, so that the run's random numbers do not change
    for m, k, n in ((8, 256, 1024), (720, 2048, 2048), (1024, 12288, 4096), (2048, 576, 1536)):
        for dtype in (mx.float32, mx.bfloat16, mx.float16):
            most = MOST_CPU_OPERATIONS if dtype == mx.float32 else MOST_CPU_HALF_OPERATIONS
            if not on_cpu or 2 * m * k * n <= most:
                yield _product(m, k, n, dtype, key)
    rows = 64 if on_cpu else 720
    for bits, group_size, mode in (
        (4, 64, "affine"),
        (6, 64, "affine"),
        (8, 32, "affine"),
        (4, 32, "mxfp4"),
        (4, 16, "nvfp4"),
    ):
        for transpose in (True, False):
            yield _quantized(rows, 2048 if not on_cpu else 512, bits, group_size, mode, transpose, key)
    yield _quantized(4, 4096 if not on_cpu else 1024, 4, 16, "nvfp4", True, key)
    yield _attention(key)


def _product(m: int, k: int, n: int, dtype: mx.Dtype, key: mx.array) -> ProductCheck:
    one, other = mx.random.split(key)
    x, w = _normal((m, k), dtype, one), _normal((n, k), dtype, other)
    return _compare(
        f"{m} x {k} by {k} x {n}, {_name(dtype)}", x @ w.T, lambda rows: _exact(x)[rows] @ _exact(w).T, TOLERANCE[dtype]
    )


def _quantized(
    m: int, side: int, bits: int, group_size: int, mode: str, transpose: bool, key: mx.array
) -> ProductCheck:
    dtype = device.compute_dtype()
    one, other = mx.random.split(key)
    x, w = _normal((m, side), dtype, one), _normal((side, side), dtype, other)
    packed = mx.quantize(w, group_size=group_size, bits=bits, mode=mode)
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    dense = mx.dequantize(*packed, **quantization, dtype=dtype)
    made = mx.quantized_matmul(x, *packed, transpose=transpose, **quantization)
    what = f"{m} x {side} by {side} x {side}, {bits}-bit {mode}, {'forward' if transpose else 'backward'}"

    def exact(rows: np.ndarray) -> np.ndarray:
        return _exact(x)[rows] @ (_exact(dense).T if transpose else _exact(dense))

    return _compare(what, made, exact, max(TOLERANCE[dtype], 1e-4))


def _attention(key: mx.array, heads: int = 2, length: int = 128, width: int = 64) -> ProductCheck:
    dtype = device.compute_dtype()
    q, k, v = (_normal((1, heads, length, width), dtype, key) for key in mx.random.split(key, 3))
    made = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width), mask="causal")

    def exact(rows: np.ndarray) -> np.ndarray:
        scores = _exact(q) @ _exact(k).swapaxes(-1, -2) / math.sqrt(width)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) @ _exact(v)).reshape(-1, width)[rows]

    return _compare(
        f"causal attention over {length} positions, {_name(dtype)}", made.reshape(-1, width), exact, TOLERANCE[dtype]
    )


def _compare(what: str, made: mx.array, exact: Callable[[np.ndarray], np.ndarray], bound: float) -> ProductCheck:
    rows = np.unique(np.linspace(0, len(made) - 1, SAMPLED_ROWS).astype(int))
    wanted = exact(rows)
    error = np.abs(_exact(made)[rows] - wanted).max() / np.abs(wanted).max()
    return ProductCheck(what, float(error) if np.isfinite(error) else math.inf, bound)


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> mx.array:
    return mx.random.normal(shape, key=key).astype(dtype)


def _exact(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def changing_gradients(rounds: int = 4) -> list[str]:
    """Compute gradients that are summed by scattering several times, and return the names of those that vary.

    Embeddings and experts add the gradients of many positions to one row. A GPU may add them in any order; two runs with
    one seed then only agree up to rounding.
    """
    dtype = device.compute_dtype()
    one, two, three, four = mx.random.split(mx.random.key(1), 4)
    table, ids = _normal((64, 256), dtype, one), mx.random.randint(0, 64, (4096,), key=two)
    pulls = _normal((4096, 256), dtype, three)
    experts, chosen = _normal((4, 32, 256), dtype, four), mx.sort(ids[:512] % 4)

    def embedded(weight: mx.array) -> mx.array:
        return (weight[ids] * pulls).astype(mx.float32).sum()

    def mixed(weight: mx.array) -> mx.array:
        states = pulls[:512, None, :32]  # (N, 1, in)
        made = mx.gather_mm(states, weight, rhs_indices=chosen, sorted_indices=True)
        return (made * pulls[:512, None]).astype(mx.float32).sum()

    changing = []
    for name, loss, weight in (("embeddings", embedded, table), ("experts", mixed, experts)):
        gradients = [mx.grad(loss)(weight) for _ in range(rounds)]
        mx.eval(gradients)
        if not all(mx.array_equal(gradients[0], other).item() for other in gradients[1:]):
            changing.append(name)
    return changing


# Table of kernels

# The shapes that `doctor --kernels` measures: widths of SmolLM2-135M, heads of Llama 3, recurrences of Qwen3.5 and Mamba-2.
ATTENTION = ((9, 3, 64, 256), (9, 3, 64, 1024), (32, 8, 128, 1024))
ACTIVATION = (1536, 8192)
HEAD = (49152, 576)
PACKED = ((512, 512, 4, 64, "affine"), (2048, 2048, 4, 64, "affine"))  # weights while text is generated
RECURRENT = {"gated delta": (128, 16, 32, 128, 128, "a gate per head"), "state space": (256, 24, 64, 1, 128)}


def measure_usual() -> None:
    """Measure kernels in common shapes, unless they were measured before."""
    dtype, rows = device.compute_dtype(), {row.name: row for row in kernel_rows()}
    calls = [
        (rows["attention"], attention_class(heads, key_heads, width, width, keys))
        for heads, key_heads, width, keys in ATTENTION
    ]
    calls += [(rows["gated activation"], activation_class(width)) for width in ACTIVATION]
    calls += [(rows[name], shape) for name, shape in RECURRENT.items()]
    choose_among(calls, "auto", dtype, measure=True)
    head = nn.Embedding(*HEAD)
    head.weight = head.weight.astype(dtype)
    head.freeze()
    mx.eval(head.weight)
    loss_figures(Head(nn.Module(), head), dtype, measure=True)
    for kind in PACKED:
        product_figures(kind, TOKEN, dtype)


def known_table() -> list[dict[str, Any]]:
    """Return the measurements on this machine with this mlx: kernel, shape, dtype, choice, and each candidate's figures."""
    before = f"{device.measured_on()}|"
    words = {row.name: row.words for row in kernel_rows()} | {NAME: head_words, WEIGHTS: kind_words}
    rules = {NAME: choose_kernel, WEIGHTS: choose_form}
    table = []
    for key in sorted(read_store("kernels")):
        figures = read_figures(key) if key.startswith(before) else None
        dtype, _, rest = key.removeprefix(before).partition("|")
        kernel, _, of = rest.partition("|")
        if not figures or kernel not in words:
            continue
        shape: ShapeClass = tuple(int(part) if part.isdecimal() else part for part in of.split(","))
        table.append(
            {
                "kernel": kernel,
                "shape": words[kernel](shape),
                "dtype": dtype,
                "chosen": rules.get(kernel, choose)(figures) or "none is right",
                "candidates": {name: {**asdict(one), "correct": one.correct} for name, one in figures.items()},
            }
        )
    return table


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """Return the table as text, one line per candidate, with the chosen one marked."""
    lines = [f"{'':2}{'kernel and shape':<75}{'candidate':<10}{'ms':>9}{'kept MB':>9}{'peak MB':>9}{'error':>9}"]
    for row in table:
        title = f"{row['kernel']}, {row['shape']}, {row['dtype']}"
        for name, one in row["candidates"].items():
            mark = "*" if name == row["chosen"] else " "
            figures = Figures(**{key: value for key, value in one.items() if key != "correct"})
            lines.append(
                f"{mark} {title:<75}{name:<10}{figures.seconds * 1e3:>9.2f}{figures.kept_bytes / 1e6:>9.2f}"
                f"{figures.peak_bytes / 1e6:>9.2f}{figures.error:>9.0e}{'' if figures.correct else '  wrong'}"
            )
            title = ""
    return lines

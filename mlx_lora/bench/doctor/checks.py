"""The checks of `doctor --full`: functions against exact numbers on the CPU, and whole runs.

Of kernels, output and gradients are compared. The training run does the same before it takes a kernel, and does not take a
wrong one; here each is named, in shapes that published models have. Of formats, packing, unpacking, and both products of a
quantized weight are compared, forward and backward, with the same packed weight, unpacked. The definition of a layer uses the
adapted weight as a whole, in float32 on the CPU: y = x (W + D)^T, and for DoRA the rows of W + D at their trained lengths. The
layers never make that weight. Losses of whole answers take float32 numbers whatever the model computes in, and are compared with
float64. The whole model computes in the dtype of runs.

Whole runs take a step of each objective, resume exactly, generate text with what they trained, and are measured: memory, speed. A
run goes through the same function as `mlx-lora train`. It uses mlx's own kernels (`--kernels mlx`), because ours have their own
lines: a line here is red for what is wrong in the run itself. The checks of memory and speed train in a process of its own, with
`train_child`.

Of generation, a row in a batch must get the numbers that it gets alone, with and without an adapter. Logits are compared while
both decode the same tokens, so that a rounding that turns one token does not make the rest differ. In float32 the served texts
must be equal, too: there, nothing is near enough to a tie.

What may slow this machine down or change its numbers is told, too: power, heat, other programs, a virtual GPU.

The planner is checked with eight runs: their peak memory as planned before the run and as measured by MLX's allocator. The models
have random weights, and the rows are full.

The speed of training is compared with that of mlx_lm.lora's trainer and torch on the same rows, and with that after some minutes
of load. Each program runs in a process of its own, one after the other. The first pass over the rows, which compiles, is not
counted. Seconds of the counted passes are compared; tokens per second are theirs, without padding. The models have the widths of
published ones, and no more blocks than take seconds. Ratios between programs are those of the model; tokens per second are not,
because blocks are left out.

Shapes: x (N, in), weight (out, in), tokens (N,); experts (E, out, in), N rows in the experts' order; E pairs or answers, P positions
or tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import math
import queue
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters.base import QUANTIZED, SWITCH, AdapterLayer, dense_weight, with_weight
from mlx_lora.adapters.inject import adapter_class, adapter_parameters, inject, select_targets
from mlx_lora.api.base import load
from mlx_lora.api.train import train
from mlx_lora.bench.doctor.check import (
    TINY,
    CheckFinding,
    Kit,
    apart,
    bounded,
    compare_passes,
    dtype_name,
    dtypes_of,
    exact_passes,
    labeled_dtypes,
    largest_apart,
    normal,
    on_cpu,
    random_model,
    tiny_folder,
    write_model,
)
from mlx_lora.bench.machine import describe_machine, describe_power
from mlx_lora.bench.run import AFFINE, INTERRUPTED, LLAMA_1B, QWEN3_4B, QWEN3_8B, SMOLLM2, Watch, chat_rows, run_process
from mlx_lora.config.fields import flag_words
from mlx_lora.config.objectives import OBJECTIVES, PAIRS, TAUGHT, ObjectiveRow, ObjectiveSettings, row_of
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.engine.engine import Engine, Event, Limits, Request
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, load_adapter
from mlx_lora.kernels import activations as exponentials
from mlx_lora.kernels.choose import activation_class, attention_class, kernel_rows
from mlx_lora.kernels.measure import TOLERANCE, Kernel, ShapeClass
from mlx_lora.kernels.quantized_matmul import dequantized_gather_mm, dequantized_matmul, packed_arrays
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.cross_entropy import Arrays, log_sum_exp, plain_loss, token_arrays
from mlx_lora.losses.divergence import (
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    DivergenceOptions,
    Known,
    divergence_of_logits,
    likeliest,
    sampled_kl,
)
from mlx_lora.losses.fused import NAME, HeadLosses, loss_kernels
from mlx_lora.losses.grpo import RATIO_OF, PolicyOptions, SampledTokens, policy_loss
from mlx_lora.losses.preference import (
    RATED_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    RatedOptions,
    Ratings,
    bradley_terry,
)
from mlx_lora.models.generator import Sampling
from mlx_lora.models.head import Head
from mlx_lora.models.load import Base, load_base
from mlx_lora.planner.machine import loss_tile_bytes, measure_ceilings
from mlx_lora.planner.speed import known_chip, listed_ceilings
from mlx_lora.reports.run_report import FACTS_FILE
from mlx_lora.rollouts.rewards import text_of
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import GIB, package_versions

# Kernels

# Heads of SmolLM2, Llama 3, Gemma 3, DeepSeek (values narrower than keys), GPT-OSS (a window and sinks).
ATTENTION: tuple[ShapeClass, ...] = (
    attention_class(9, 3, 64, 64, 128),
    attention_class(32, 8, 128, 128, 256),
    attention_class(4, 1, 256, 256, 256),
    attention_class(4, 4, 192, 128, 128),
    attention_class(8, 1, 64, 64, 256, "array", sinks=True),
    attention_class(4, 2, 64, 64, 128, "none"),
)
ACTIVATION: tuple[ShapeClass, ...] = (activation_class(1536), activation_class(8192))
DELTA: tuple[ShapeClass, ...] = (
    (64, 2, 4, 128, 128, "a gate per head"),
    (64, 2, 2, 64, 64, "a gate per channel"),
)
SPACE: tuple[ShapeClass, ...] = ((64, 4, 64, 1, 128), (128, 8, 64, 2, 64))
SHAPES = {"attention": ATTENTION, "gated activation": ACTIVATION, "gated delta": DELTA, "state space": SPACE}
ADVICE = "training does not use it where it is wrong; with --kernels mlx it is never used; report it"
ADVICE_FOR_MLX = "mlx's own kernel: try another mlx version, and report it to mlx"


def check_kernel(name: str, shape: ShapeClass, kit: Kit) -> Iterator[CheckFinding]:
    """Compare all candidates of one row of the table in one shape."""
    row: Kernel = next(row for row in kernel_rows() if row.name == name)
    for dtype, after in labeled_dtypes(kit):
        trial, reference = row.trial(shape, dtype)
        exact = exact_passes(reference, trial.arrays, trial.cotangents)
        for candidate, function in row.candidates.items():
            label = f"{candidate} {name}{after}"
            advice = ADVICE_FOR_MLX if candidate == "mlx" else ADVICE
            # Recurrences multiply roundings over their tokens.
            times = 2.0 if name in ("gated delta", "state space") else 1.0
            yield from compare_passes(label, trial.wrap(function), exact, trial.arrays, trial.cotangents, advice, times)


def _filled(layer: Any, dtype: mx.Dtype) -> Any:
    """Return a layer with random numbers in its weight and its bias."""
    layer.weight = normal(*layer.weight.shape, seed=1, dtype=dtype, size=0.3)
    if "bias" in layer:
        layer.bias = normal(*layer.bias.shape, seed=2, dtype=dtype)
    return layer


HEADS: dict[str, Callable[[mx.Dtype], Head]] = {
    "a head with a bias": lambda dtype: Head(nn.Module(), _filled(nn.Linear(96, 4000), dtype)),
    "a 4-bit tied head": lambda dtype: Head(nn.Module(), _filled(nn.Embedding(4000, 128), dtype).to_quantized(64, 4)),
    "a tied head with a soft cap": lambda dtype: Head(
        nn.Module(), _filled(nn.Embedding(4000, 96), dtype), scale=0.5, soft_cap=30.0
    ),
    # As large as Gemma's: its inner side has ended processes on Metal (mlx#1363).
    "a vocabulary of 262,144": lambda dtype: Head(nn.Module(), _filled(nn.Embedding(262_144, 64), dtype)),
}


def check_loss(make: Callable[[mx.Dtype], Head], kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss kernels on one head with all logits at once in float32."""
    for dtype, after in labeled_dtypes(kit):
        head = make(dtype)
        width = head.dense(head.arrays, mx.float32).shape[-1]
        # mx.fast.cross_entropy adds a row's exponentials one after the other on a CPU.
        positions, times = (33, 3.0) if head.vocabulary > 10_000 else (150, 1.0)
        hidden = normal(positions, width, seed=3, dtype=dtype)
        targets = mx.array([(7919 * n) % head.vocabulary for n in range(positions)])
        weights, ones = mx.ones((positions,)), [mx.ones((positions, 1))]
        # Small tiles, so that several are joined whatever this machine's own are.
        tile_bytes = min(loss_tile_bytes(), 400_000)

        def exactly(hidden: mx.array, head: Head = head, targets: mx.array = targets) -> list[mx.array]:
            logits = head.finish(hidden @ head.dense(head.arrays, mx.float32).T, slice(None)).astype(mx.float32)
            own = mx.take_along_axis(logits, targets[:, None], axis=-1)
            return [log_sum_exp(logits)[:, None] - own]

        exact = exact_passes(exactly, [hidden], ones)
        for name, kernel in loss_kernels().items():
            made = partial(_by_kernel, kernel, head, targets, weights, tile_bytes)
            yield from compare_passes(f"{name} {NAME}{after}", made, exact, [hidden], ones, ADVICE, times)


def _by_kernel(
    kernel: HeadLosses, head: Head, targets: mx.array, weights: mx.array, tile_bytes: int, hidden: mx.array
) -> list[mx.array]:
    return [kernel(head, hidden, targets, weights, tile_bytes=tile_bytes)[:, None]]


def check_exponentials(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the polynomials for exponentials with mlx's own exponential."""
    x = normal(64, 512, seed=4, size=4.0)
    if not exponentials.usable(x) or not device.vectorizes_compiled_sums():
        yield CheckFinding("polynomials", "skipped", "used on a CPU that compiles kernels only")
        return
    made = [
        ("exp(-x)", exponentials.exp_minus(x * exponentials.SCALE), mx.exp(-mx.abs(x))),
        ("softmax", exponentials.softmax(x * exponentials.SCALE), mx.softmax(x, axis=-1)),
        ("gated SiLU", exponentials.gated_silu(x, x)[0], x * mx.sigmoid(x) * x),
    ]
    for name, found, exact in made:
        yield bounded(f"polynomial {name}", apart(found, exact), 2e-5, "float32 against mlx's exponential", ADVICE)


def check_substitutes(kit: Kit) -> Iterator[CheckFinding]:
    """Compare what device.py computes differently on each backend with its definition."""
    advice = "mlx_lora/utils/device.py chooses it by backend; report it"
    for dtype in dtypes_of(kit):
        x = normal(33, 5000, seed=5, dtype=dtype, size=2.0)
        below = -mx.abs(x)
        mx.eval(x, below)
        with on_cpu():
            wide = x.astype(mx.float32)
            exact = [
                1 / (1 + mx.exp(-wide)), mx.exp(below.astype(mx.float32)),
                mx.exp(below.astype(mx.float32)).sum(axis=-1, keepdims=True),
            ]  # fmt: skip
            mx.eval(exact)
        made = [device.sigmoid(x), device.exponential(below), device.row_sums(mx.exp(below.astype(mx.float32)))]
        for name, found, wanted in zip(("sigmoid", "exponential", "row sums"), made, exact, strict=True):
            label = f"{name}, {dtype_name(dtype)}"
            what = "the device's form against its definition on the CPU"
            yield bounded(label, apart(found, wanted), TOLERANCE[dtype], what, advice)


# Quantized formats

AFFINE_BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group, which are fixed
ROWS, WIDE, OUT = 70, 256, 128  # 70 rows: not a multiple of a tile
EXPERTS = 4
DENSE = "with --quantized-matmul packed it is never used; report it"
PACKED = "with --quantized-matmul dense it is not used for training; try another mlx version, and report it to mlx"


EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "4-bit affine": {"bits": 4, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


def check_layouts(layouts: list[dict[str, Any]], kit: Kit) -> Iterator[CheckFinding]:
    """Check formats that differ in their group size; activations and scales have each dtype.

    Args:
        layouts: `group_size`, `bits` and `mode` of each.
        kit: of the machine.
    """
    for layout, (dtype, after) in itertools.product(layouts, labeled_dtypes(kit)):
        label = f"group {layout['group_size']}{after}"
        weight, x = normal(OUT, WIDE, seed=1, dtype=dtype), normal(ROWS, WIDE, seed=2, dtype=dtype)
        cotangent = [normal(ROWS, OUT, seed=3, dtype=dtype)]
        mx.eval(weight, x, cotangent)
        with on_cpu():
            packed = list(mx.quantize(weight, **layout))
            plain = mx.dequantize(*packed, **layout, dtype=dtype).astype(mx.float32)
            mx.eval(packed, plain)
        found = mx.dequantize(*mx.quantize(weight, **layout), **layout, dtype=dtype)
        # A weight in the middle of two steps may be rounded either way.
        yield bounded(f"packing, {label}", apart(found, plain), 0.02, "the device's packing against the CPU's", PACKED)
        found, bound = mx.dequantize(*packed, **layout, dtype=dtype), TOLERANCE[dtype]
        yield bounded(f"unpacking, {label}", apart(found, plain), bound, "the device against the CPU", PACKED)
        exact = exact_passes(lambda x, plain=plain: [x @ plain.T], [x], cotangent)
        by_packed = partial(mx.quantized_matmul, transpose=True, **layout)
        yield from compare_passes(
            f"packed product, {label}",
            lambda x, run=by_packed, packed=packed: [run(x, *packed)],
            exact,
            [x],
            cotangent,
            PACKED,
        )
        few = apart(by_packed(x[:3], *packed), exact[0][0][:3])
        yield bounded(f"packed product of 3 rows, {label}", few, bound, "against float32 on the CPU", PACKED)
        yield from compare_passes(
            f"dense product, {label}",
            lambda x, packed=packed, layout=layout: [dequantized_matmul(x, packed, **layout)],
            exact,
            [x],
            cotangent,
            DENSE,
        )


def check_experts(layout: dict[str, Any], kit: Kit) -> Iterator[CheckFinding]:
    """Check quantized experts: mlx's gather of packed weights, and ours of dense ones."""
    chosen = mx.array([EXPERTS * n // ROWS for n in range(ROWS)])  # ascending, as mlx-lm sorts them
    for dtype, after in labeled_dtypes(kit):
        if not (dtype == mx.float32 or device.multiplies_16_bit_experts()):
            yield CheckFinding(f"{dtype_name(dtype)}", "skipped", "mlx has no 16-bit experts on this device")
            continue
        layer = SwitchLinear(WIDE, OUT, EXPERTS, bias=False)
        layer.weight = normal(EXPERTS, OUT, WIDE, seed=1, dtype=dtype)
        quantized = layer.to_quantized(**layout)
        packed = packed_arrays(quantized)
        mx.eval(packed)
        with on_cpu():
            plain = mx.dequantize(*packed, **layout, dtype=dtype).astype(mx.float32)  # (E, out, in)
            mx.eval(plain)
        x, cotangent = normal(ROWS, 1, WIDE, seed=2, dtype=dtype), [normal(ROWS, 1, OUT, seed=3, dtype=dtype)]
        exact = exact_passes(lambda x, w=plain: [x @ w[chosen].swapaxes(-1, -2)], [x], cotangent)
        functions = {
            "packed, sorted rows": (partial(quantized, indices=chosen, sorted_indices=True), PACKED),
            "packed, unsorted rows": (partial(quantized, indices=chosen, sorted_indices=False), PACKED),
            "dense": (partial(dequantized_gather_mm, packed=packed, indices=chosen, **layout), DENSE),
        }
        for name, (function, advice) in functions.items():
            yield from compare_passes(
                f"{name}{after}", lambda x, function=function: [function(x)], exact, [x], cotangent, advice
            )


INPUTS, OUTPUTS, TOKENS, RANK, ALPHA = 128, 96, 300, 8, 16.0
CHOSEN = mx.array([EXPERTS * n // ROWS for n in range(ROWS)])
LAYER_LAYOUT = {"bits": 4, "group_size": 32, "mode": "affine"}
LAYER_ADVICE = "do not train with this method here; mlx_lora/adapters has the layer; report it"


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        kind: of the base: `linear`, `embedding`, `tied head` or `experts`.
        method: a name in PRESETS, which gives the layer type, the scale and the further arrays.
        packed: whether the base is quantized.
        dropout: probability.
    """

    kind: str
    method: str = "lora"
    packed: bool = False
    dropout: float = 0.0

    @property
    def words(self) -> str:
        """Its name in the result."""
        kind = {"linear": "linear layer", "experts": "experts"}.get(self.kind, self.kind)
        return f"{self.method}, {'4-bit ' if self.packed else ''}{kind}{', dropout' if self.dropout else ''}"


CASES = (
    Case("linear"),
    Case("linear", packed=True),
    Case("linear", dropout=0.3),
    Case("linear", "rslora"),
    Case("linear", "dora"),
    Case("linear", "dora", packed=True),
    Case("linear", "pissa", packed=True),
    Case("linear", "adalora"),
    Case("linear", "relora", packed=True),
    Case("linear", "qa-lora", packed=True),
    Case("linear", "qa-lora", packed=True, dropout=0.3),
    Case("embedding"),
    Case("embedding", packed=True),
    Case("embedding", "dora"),
    Case("tied head"),
    Case("tied head", "dora"),
    Case("tied head", "qa-lora", packed=True),
    Case("experts"),
    Case("experts", packed=True),
    Case("experts", "dora", packed=True),
    Case("experts", "qa-lora", packed=True),
)


def check_layer(case: Case, kit: Kit) -> Iterator[CheckFinding]:
    """Compare one layer with its definition in every dtype."""
    for dtype in dtypes_of(kit):
        label, bound = dtype_name(dtype), 2 * TOLERANCE[dtype]
        if case.kind == "experts" and not (dtype == mx.float32 or device.multiplies_16_bit_experts()):
            yield CheckFinding(label, "skipped", "mlx has no 16-bit experts on this device")
            continue
        layer = build_layer(case, dtype)
        arrays = {name: layer[name] for name in layer.trained}
        if case.kind == "embedding":
            x = mx.array([(17 * n) % TOKENS for n in range(ROWS)], mx.int32)
        else:
            x = normal(*((ROWS, 1, INPUTS) if case.kind == "experts" else (ROWS, INPUTS)), seed=41, dtype=dtype)
        found = _numbers(partial(_call, case, layer), layer, arrays, x)
        with on_cpu():
            # The same numbers: weights and scales are cast up from their 16 bits.
            exact_layer = build_layer(case, dtype)
            exact_layer.base.set_dtype(mx.float32)
            wide = x if x.dtype == mx.int32 else x.astype(mx.float32)
            exact = _numbers(partial(_definition, case, exact_layer), exact_layer, arrays, wide)
        what = f"{label} against the adapted weight in float32 on the CPU"
        yield bounded(f"{label}: output", apart(found.pop("output"), exact.pop("output")), bound, what, LAYER_ADVICE)
        error, worst = largest_apart(found, exact)
        yield bounded(f"{label}: gradients", error, bound, f"{what}; the farthest: {worst}", LAYER_ADVICE)


def _call(case: Case, layer: AdapterLayer, x: mx.array) -> mx.array:
    """Return a layer's output, called as a model of its kind does."""
    if case.kind == "experts":
        return layer(x, CHOSEN, sorted_indices=True)
    if case.kind == "tied head":
        return layer.as_linear(x)  # pyright: ignore[reportAttributeAccessIssue]
    return layer(x) if case.kind == "embedding" else layer(x, key=mx.random.key(7))


def build_layer(case: Case, dtype: mx.Dtype) -> AdapterLayer:
    """Return a layer with random numbers in all its arrays."""
    base = _base(case, dtype)
    method = PRESETS[case.method]
    made = adapter_class(base, method.layer_type)
    if made is None:
        raise ValueError(f"no layer of type {method.layer_type} over {type(base).__name__}")
    layer = made.from_base(base, _factors(made, base, 1), method.scale_of(ALPHA, RANK), case.dropout)
    if case.method == "pissa":
        layer.start_a, layer.start_b = _factors(made, base, 2)
    elif case.method == "adalora":
        layer.lora_e = normal(RANK, seed=5)
    elif case.method == "relora":
        layer.merge(*_factors(made, base, 2))
    if "m" in layer:
        layer.m = layer.m * (1 + 0.2 * normal(*layer.m.shape, seed=6))
    layer.train()
    mx.eval(layer.parameters())
    return layer


def _base(case: Case, dtype: mx.Dtype) -> nn.Module:
    if case.kind == "experts":
        base: Any = SwitchLinear(INPUTS, OUTPUTS, EXPERTS, bias=False)
        base.weight = normal(EXPERTS, OUTPUTS, INPUTS, seed=11, dtype=dtype, size=0.1)
    elif case.kind == "linear":
        base = nn.Linear(INPUTS, OUTPUTS)
        base.weight = normal(OUTPUTS, INPUTS, seed=11, dtype=dtype, size=0.1)
        base.bias = normal(OUTPUTS, seed=12, dtype=dtype)
    else:
        base = nn.Embedding(TOKENS, INPUTS)
        base.weight = normal(TOKENS, INPUTS, seed=11, dtype=dtype, size=0.1)
    return base.to_quantized(**LAYER_LAYOUT) if case.packed else base


def _factors(made: type[AdapterLayer], base: nn.Module, seed: int) -> tuple[mx.array, mx.array]:
    """Return (lora_a, lora_b) in the orientation that the class has; B is not zero, or A would have no gradient."""
    rows, columns = made.factor_dims(base)
    a, b = (rows, RANK), (RANK, columns)
    if made.OVER is SWITCH:
        a, b = (EXPERTS, RANK, rows), (EXPERTS, columns, RANK)
    return normal(*a, seed=20 + seed, size=0.1), normal(*b, seed=30 + seed, size=0.1)


def _definition(case: Case, layer: AdapterLayer, x: mx.array) -> mx.array:
    """Return a layer's output by its adapted weight, float32."""
    weight = layer.weight + layer.product()
    if "m" in layer:
        weight = weight * (layer.m / mx.stop_gradient(mx.linalg.norm(weight, axis=-1)))[..., None]
    if case.kind == "experts":
        return x @ weight[CHOSEN].swapaxes(-1, -2)
    if case.kind == "embedding":
        return weight[x]
    if case.kind == "tied head":
        return x @ weight.T
    if case.dropout:
        dropped = layer.dropout(x, mx.random.key(7))
        return x @ layer.weight.T + dropped @ layer.product().T + layer.base.bias
    return x @ weight.T + layer.base.bias


def _numbers(
    function: Callable[[mx.array], mx.array], layer: AdapterLayer, arrays: dict[str, mx.array], x: mx.array
) -> dict[str, mx.array]:
    """Return a layer's output, and the gradient of its input and of each trained array, by name."""
    names = list(arrays)
    whole = x.dtype == mx.int32  # token ids have no gradient

    def call(*values: mx.array) -> list[mx.array]:
        for name, value in zip(names, values, strict=False):
            layer[name] = value
        return [function(x if whole else values[-1])]

    values = [*arrays.values(), *([] if whole else [x])]
    made = call(*values)[0]
    cotangent = normal(*made.shape, seed=50, dtype=made.dtype)
    [output], gradients = mx.vjp(call, values, [cotangent])
    mx.eval(output, gradients)
    for name, value in arrays.items():  # no traced array may stay in the layer
        layer[name] = value
    return {"output": output, **dict(zip([*names, "x"], gradients, strict=False))}


# Losses

EXAMPLES, ANSWER_TOKENS, VOCABULARY = 17, 60, 500
LOSS_ADVICE = "do not train toward this objective here; mlx_lora/objectives has the loss; report it"
MODEL_ADVICE = "the layers of mlx and mlx-lm: try other versions of them, or --dtype float32; report it"
AGAINST = "float64 on the CPU"
OTHER_PAIR_LOSSES: dict[str, PairLoss] = {
    "ORPO's odds ratio": pair_losses.odds_ratio,
    "SimPO": pair_losses.simpo,
    "CPO": pair_losses.cpo,
}


def _compare(name: str, function: Callable[..., mx.array], *arrays: mx.array) -> Iterator[CheckFinding]:
    """Compare a function of float32 arrays with itself in float64 on the CPU."""

    def outputs(*arrays: mx.array) -> list[mx.array]:
        return [function(*arrays)]

    cotangent = [normal(*function(*arrays).shape, seed=9)]
    exact = exact_passes(outputs, arrays, cotangent, double=True)
    yield from compare_passes(name, outputs, exact, arrays, cotangent, LOSS_ADVICE)


def _logps(count: int, seed: int) -> mx.array:
    """Return log-probabilities of whole answers, about -20."""
    return -mx.abs(normal(count, seed=seed, size=8.0) + 20)


def check_pair_losses(losses: dict[str, PairLoss], kit: Kit) -> Iterator[CheckFinding]:
    """Compare losses of pairs."""
    options = PairOptions(label_smoothing=0.1)
    chosen, rejected, likelihood = _logps(EXAMPLES, 1), _logps(EXAMPLES, 2), -_logps(EXAMPLES, 3)
    other_chosen, other_rejected = chosen + normal(EXAMPLES, seed=4), rejected + normal(EXAMPLES, seed=5)
    tokens, real = mx.arange(5, 5 + EXAMPLES).astype(mx.float32), mx.ones((EXAMPLES,))
    for name, loss in losses.items():

        def function(chosen: mx.array, rejected: mx.array, likelihood: mx.array, loss: PairLoss = loss) -> mx.array:
            pairs = Pairs(chosen, rejected, other_chosen, other_rejected, tokens, tokens[::-1], likelihood, real)
            return loss(pairs, options)

        yield from _compare(name, function, chosen, rejected, likelihood)


def check_rated_losses(kit: Kit) -> Iterator[CheckFinding]:
    """Compare losses of answers that are rated good or bad."""
    good = mx.array([float(n % 2) for n in range(EXAMPLES)])
    for name, loss in RATED_LOSSES.items():

        def function(ratio: mx.array, loss=loss) -> mx.array:
            return loss(Ratings(ratio, good, mx.array(0.3)), RatedOptions())

        yield from _compare(name, function, normal(EXAMPLES, seed=1, size=3.0))


def check_reward_loss(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss of a reward model."""
    loss = partial(bradley_terry, margin=mx.abs(normal(EXAMPLES, seed=3)), center=0.01)
    yield from _compare("Bradley-Terry", loss, normal(EXAMPLES, seed=1), normal(EXAMPLES, seed=2))


def check_policy_losses(kit: Kit) -> Iterator[CheckFinding]:
    """Compare losses of sampled answers."""
    answers = 6
    of = mx.array([answers * n // ANSWER_TOKENS for n in range(ANSWER_TOKENS)])
    old, reference = _logps(ANSWER_TOKENS, 2) / 10, _logps(ANSWER_TOKENS, 3) / 10
    logps = old + normal(ANSWER_TOKENS, seed=1, size=0.2)
    rest = (mx.ones((ANSWER_TOKENS,)), of, normal(answers, seed=5), mx.array(answers / ANSWER_TOKENS))
    for name in RATIO_OF:
        options = PolicyOptions(name, beta=0.05, compares=True)

        def function(logps: mx.array, options: PolicyOptions = options) -> mx.array:
            return policy_loss(SampledTokens(logps, old, reference, *rest), options)[0]

        yield from _compare(name, function, logps)
    yield from _compare("sampled KL", lambda logps: sampled_kl(logps, old, reference), logps)


def check_divergences(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the divergences from a teacher, with its likeliest tokens and with all."""
    student, teacher = (
        normal(ANSWER_TOKENS, VOCABULARY, seed=1, size=2.0),
        normal(ANSWER_TOKENS, VOCABULARY, seed=2, size=2.0),
    )
    for name in (FORWARD_KL, REVERSE_KL, JSD):
        for top_k in (16, 0):
            options = DivergenceOptions(name, top_k=top_k, temperature=1.5)
            known = likeliest(teacher, options)

            def function(logits: mx.array, known: Known = known, options: DivergenceOptions = options) -> mx.array:
                return divergence_of_logits(logits, known, options)[0]

            yield from _compare(f"{name}, {f'{top_k} tokens' if top_k else 'all tokens'}", function, student)


def check_model(layout: dict[str, Any] | None, kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss of a model of two blocks, and the gradient of each factor of its adapter."""
    random = np.random.default_rng(0)
    ids = random.integers(0, TINY["vocab_size"], (2, 41)).astype(np.int32)
    arrays = token_arrays(Batch.of(ids[:, :-1], ids[:, 1:], random.random((2, 40)) < 0.5))
    mx.eval(arrays)
    for dtype in dtypes_of(kit):
        found = _model_numbers(_adapted(dtype, layout), arrays)
        with on_cpu():
            model = _adapted(dtype, layout)
            packed = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, QUANTIZED)]
            model.update_modules(tree_unflatten([(path, with_weight(one, dense_weight(one))) for path, one in packed]))
            model.freeze()
            model.unfreeze(keys=["lora_a", "lora_b"], strict=False)
            model.set_dtype(mx.float64)
            exact = _model_numbers(model, arrays)
        label, bound = dtype_name(dtype), 2 * TOLERANCE[dtype]
        what = f"{label} against {AGAINST}"
        yield bounded(f"{label}: loss", apart(found.pop("loss"), exact.pop("loss")), bound, what, MODEL_ADVICE)
        error, worst = largest_apart(found, exact)
        yield bounded(f"{label}: gradients", error, bound, f"{what}; the farthest: {worst}", MODEL_ADVICE)


def _adapted(dtype: mx.Dtype, layout: dict[str, Any] | None) -> nn.Module:
    """Return the tiny model with an adapter on all linear layers, whose B is not zero."""
    model = random_model(TINY, dtype, layout)
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    moved = [
        (name, normal(*value.shape, seed=number, size=0.02))
        for number, (name, value) in enumerate(sorted(adapter_parameters(model).items()))
    ]
    model.load_weights(moved, strict=False)
    mx.eval(model.parameters())
    return model


def _model_numbers(model: nn.Module, arrays: Arrays) -> dict[str, mx.array]:
    """Return the loss per token and the gradient of each factor, by name."""

    def mean(model: nn.Module) -> mx.array:
        total, count = plain_loss(model, arrays)
        return total / count

    loss, gradients = nn.value_and_grad(model, mean)(model)
    found = {"loss": loss, **dict(tree_flatten(gradients))}
    mx.eval(found)
    return found


# Runs

STEPS, STOPPED = 6, 3  # of the run that is resumed
LOSS_BOUND = 1e-3  # two steps in float32: the second sees what the first changed
COMMON = {
    "batch_size": 2, "max_seq_length": 256, "rank": 4, "learning_rate": 1e-3, "warmup": 0.0, "kernels": "mlx",
    "valid_fraction": 0.0, "val_batches": 0, "sample_tokens": 0, "steps_per_report": 1, "progress": False,
    "cache_trunk": "off", "target_modules": "all-linear",
}  # fmt: skip
RUN_ADVICE = "do not train toward this objective here; report it with these numbers"


PLAIN, SAMPLED = ObjectiveSettings.objective, {"group_size": 2, "max_new_tokens": 8}


def _settings(row: ObjectiveRow) -> dict[str, Any]:
    """Return what a run of an objective needs in addition to its rows."""
    needs: dict[str, Any] = {"teacher": True} if row.taught else {}
    if row.rewarded:
        needs |= {"reward": "letters", **SAMPLED}
    return needs | ({"batch_size": 4} if row.records == "rated" else {})


# Name -> settings of the run. Sampled answers may differ between devices by a rounding, so only their runs are checked.
SHORT_RUNS: dict[str, dict[str, Any]] = {
    **{name: {"objective": name, **_settings(row)} for name, row in OBJECTIVES.items() if not row.on_encoders},
    "sft, 4-bit base": {"packed": True},
    "sft, dora": {"method": "dora"},
    "sft, qa-lora, 4-bit base": {"method": "qa-lora", "packed": True},
    "sft, qat, 4-bit base": {"qat": 1.0, "packed": True},
    "sft, full": {"method": "full", "learning_rate": 1e-4},
    **{
        f"{name}, on policy": {"objective": name, "on_policy": True, **_settings(OBJECTIVES[name]), **SAMPLED}
        for name in TAUGHT
    },
}
QUICK = (PLAIN, "sft, 4-bit base", PAIRS[0])  # of these, in the quick share


def _rows(objective: str) -> list[dict[str, Any]]:
    """Return rows of the form that an objective reads."""
    records = row_of(objective).records
    text = chat_rows(8, (4, 8), (4, 12), pairs=records in ("pairs", "rated"))
    rows = [json.loads(line) for line in text.splitlines()]
    if records == "prompts":
        return [{"prompt": row["messages"][0]["content"], "answer": "a"} for row in rows]
    if records == "rated":  # good and bad by turns
        answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return [{**row, "label": bool(number % 2)} for number, row in enumerate(answers)]
    return rows


def letters(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return the share of letters in each answer: a reward that differs between the answers of a random model."""
    texts = [text_of(completion) for completion in completions]
    return [sum(letter.isalpha() for letter in text) / max(1, len(text)) for text in texts]


def train_tiny(kit: Kit, name: str, folder: Path, steps: int, **changes: Any) -> list[dict[str, Any]]:
    """Train from a new folder, and return the lines of metrics.jsonl."""
    asked = {**COMMON, **SHORT_RUNS[name], **changes}
    packed = asked.pop("packed", False)
    # Our dense product of a quantized weight has its own lines.
    path = "packed" if packed else "auto"
    base = load(tiny_folder(kit.work, packed), dtype=asked.pop("dtype", "auto"), quantized_matmul=path)
    if asked.pop("teacher", False):
        asked["teacher"] = str(write_model(kit.work / "tiny-teacher", TINY, seed=1))
    if asked.get("reward") == "letters":
        asked["reward"] = letters
    run = train(base, _rows(asked.get("objective", PLAIN)), folder, iters=steps, **asked)
    if run.interrupted:
        raise KeyboardInterrupt
    return [line for line in run.metrics if line["val_loss"] is None]


def check_step(name: str, kit: Kit) -> Iterator[CheckFinding]:
    """Take two steps of one objective: the loss must be finite, and the factors must move."""
    root = Path(kit.work) / f"step-{name.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(root, ignore_errors=True)
    dtype = dtype_name(device.compute_dtype())
    lines = train_tiny(kit, name, root / "a", 2)
    losses = [line["loss"] for line in lines]
    finite = len(losses) == 2 and all(loss is not None and math.isfinite(loss) for loss in losses)
    norms = [line["grad_norm"] for line in lines]
    moves = finite and all(norm is not None and math.isfinite(norm) and norm > 0 for norm in norms)
    words = f"two steps in {dtype}: losses {_listed(losses)}, gradient norms {_listed(norms)}"
    yield CheckFinding("steps", "ok" if moves else "failed", words, advice="" if moves else RUN_ADVICE)
    sampled = SHORT_RUNS[name].keys() & SAMPLED.keys()
    if sampled:
        return
    mine = train_tiny(kit, name, root / "b", 2, dtype="float32")
    if kit.on_gpu:
        with on_cpu():
            exact = train_tiny(kit, name, root / "c", 2, dtype="float32")
        what = "losses and gradient norms of two float32 steps against the CPU's"
    else:
        exact = train_tiny(kit, name, root / "c", 2, dtype="float32", grad_checkpoint="block")
        what = "losses and gradient norms of two steps against the same with --grad-checkpoint block"
    yield bounded("numbers", _farthest(mine, exact), LOSS_BOUND, what, RUN_ADVICE)


def _farthest(lines: list[dict[str, Any]], exact: list[dict[str, Any]]) -> float:
    """Return the largest relative distance of losses and gradient norms."""
    if len(lines) != len(exact):
        return math.inf
    both = [(one[key], other[key]) for one, other in zip(lines, exact, strict=True) for key in ("loss", "grad_norm")]
    if any(value is None for pair in both for value in pair):
        return math.inf
    return max(abs(found - wanted) / max(abs(wanted), 1e-3) for found, wanted in both)


def _listed(values: list[float | None]) -> str:
    return " and ".join("none" if value is None else f"{value:.4g}" for value in values)


RESUMED: dict[str, dict[str, Any]] = {
    "lora with dropout": {"dropout": 0.1},
    "dora, block checkpoints, 4-bit base": {"method": "dora", "grad_checkpoint": "block", "packed": True},
}


def check_resume(changes: dict[str, Any], kit: Kit) -> Iterator[CheckFinding]:
    """Train, and train again from a checkpoint: the stored factors must be the same bytes."""
    root = Path(kit.work) / f"resume-{changes.get('method', 'lora')}"
    shutil.rmtree(root, ignore_errors=True)
    train_tiny(kit, PLAIN, root / "whole", STEPS, save_every=STOPPED, keep=0, **changes)
    whole = (root / "whole" / WEIGHTS_FILE).read_bytes()
    shutil.copytree(root / "whole", root / "stopped")
    for checkpoint in (root / "stopped" / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > STOPPED:
            shutil.rmtree(checkpoint)
    before = (root / "stopped" / "checkpoints" / f"step-{STOPPED:06d}" / WEIGHTS_FILE).read_bytes()
    train_tiny(kit, PLAIN, root / "stopped", STEPS, save_every=STOPPED, keep=0, resume="auto", **changes)
    again = (root / "stopped" / WEIGHTS_FILE).read_bytes()
    same = again == whole and before != whole
    words = "the same bytes"
    if not same:
        stored: list[Any] = [mx.load(str(root / name / WEIGHTS_FILE)) for name in ("whole", "stopped")]
        one, other = stored
        changed = [name for name in one if not mx.array_equal(one[name], other[name]).item()]
        words = f"{len(changed)} of {len(one)} arrays differ from the run that never stopped"
    words = f"stopped after step {STOPPED} of {STEPS}: {words}"
    advice = "" if same else "train without stopping; see the line `repeats` of the group machine first; report it"
    yield CheckFinding("stored factors", "ok" if same else "failed", words, advice=advice)


# A run in a process of its own

# Nothing is held out, validated, sampled or saved: the steps alone are looked at.
QUIET = {
    "valid_fraction": 0, "val_batches": 0, "steps_per_eval": 0, "save_every": 0, "steps_per_report": 1,
    "sample_tokens": 0, "learning_rate": 1e-4, "seed": 0,
}  # fmt: skip


def train_child(
    kit: Kit, name: str, model: Path, data: Path, settings: Mapping[str, Any], seconds: float | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train in a new process, and return the lines of metrics.jsonl with a loss, and report.json.

    Args:
        kit: its work folder takes the run.
        name: of the run.
        model, data: --model and --data.
        settings: further settings by name; True is a flag without a value.
        seconds: interrupt it that long after its first step; None: never.

    Raises:
        RunError: it failed.
    """
    folder = kit.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = flag_words({"model": model, "data": data, "adapter_path": folder, **QUIET, **settings})
    watch = Watch(folder / "metrics.jsonl", seconds)
    ended = run_process([sys.executable, "-m", "mlx_lora.train", *words], kit.work / f"{name}.log", watch)
    if ended.code not in (0, INTERRUPTED):
        raise RunError(f"train ended with code {ended.code}: {ended.last_words}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return [line for line in lines if line["val_loss"] is None], facts


# Text generation

PROMPTS = ("O Romeo", "wherefore art thou, and why", "Deny thy father and refuse thy name; or if thou wilt not")
DECODED = 16
WAIT_S = 120.0
SERVING_ADVICE = (
    "serve one request at a time (--max-batch 1) and report it; mlx_lora/engine/engine.py makes the batches"
)


def check_decode(packed: bool, kit: Kit) -> Iterator[CheckFinding]:
    """Compare rows of a batch with single rows, first without an adapter, then with one, and then served texts."""
    folder, dtype = tiny_folder(kit.work, packed), device.compute_dtype()
    adapter = kit.work / f"spoken{'-4bit' if packed else ''}"
    shutil.rmtree(adapter, ignore_errors=True)
    train_tiny(kit, PLAIN, adapter, 6, packed=packed, learning_rate=3e-2)  # so far that the model says something else
    for words, path in (("without an adapter", None), ("with an adapter", adapter)):
        base = load_base(ModelSettings(model=str(folder)))
        if path is not None:
            load_adapter(base, path)
        error = _batch_error(base)
        what = f"{dtype_name(dtype)} logits of {len(PROMPTS)} rows, {DECODED} tokens each, in a batch against alone"
        yield bounded(f"logits {words}", error, TOLERANCE[dtype], what, SERVING_ADVICE)
    # The texts of a server that answers all at once, and those of `generate`, in float32.
    alone = load(folder, dtype="float32")
    wanted = {
        (name, prompt): alone.generate(prompt, adapter if name else None, max_tokens=DECODED, ignore_chat_template=True)
        for name in (None, "adapter")
        for prompt in PROMPTS
    }
    found, waiting = {}, {}
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder), dtype="float32")), Limits())
    try:
        engine.call(lambda store: store.add({"adapter": AdapterSource(adapter)})).result(WAIT_S)
        for name, prompt in wanted:
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            tokens = engine.base.hf_tokenizer.encode(prompt)
            engine.submit(Request(tokens, name, DECODED, sampling=Sampling(temperature=0), continues=True), events.put)
            waiting[name, prompt] = events
        for key, events in waiting.items():
            pieces = [events.get(timeout=WAIT_S)]
            while not pieces[-1].last:
                pieces.append(events.get(timeout=WAIT_S))
            found[key] = "".join(event.piece.text for event in pieces)
    finally:
        engine.close()
    same = sum(found[key] == text for key, text in wanted.items())
    changes = any(wanted[None, prompt] != wanted["adapter", prompt] for prompt in PROMPTS)
    words = f"{same} of {len(wanted)} texts in one batch are those of `generate`"
    words += "" if changes else "; the adapter changes none of them"
    good = same == len(wanted) and changes
    yield CheckFinding("served texts", "ok" if good else "failed", words, advice="" if good else SERVING_ADVICE)


def _batch_error(base: Base) -> float:
    """Return the largest relative distance of a row's logits in a batch from those alone, over all rows and tokens."""
    base.model.eval()
    prompts = [base.hf_tokenizer.encode(text) for text in PROMPTS]
    alone = [_decode_alone(base.model, prompt) for prompt in prompts]
    # One cache per layer, which holds all rows.
    caches = [layer[0].merge(list(layer)) for layer in zip(*(cache for _, _, cache in alone), strict=True)]
    tokens = [tokens for _, tokens, _ in alone]
    worst = 0.0
    for step in range(DECODED):
        logits = base.model(mx.array([row[step] for row in tokens])[:, None], cache=caches)[:, -1]  # (rows, V)
        worst = max(worst, *(apart(logits[n], alone[n][0][step]) for n in range(len(prompts))))
    return worst


def _decode_alone(model: nn.Module, prompt: list[int]) -> tuple[list[mx.array], list[int], list[Any]]:
    """Return the logits of each step, the tokens that each step is given, and the caches of the prompt before the first."""
    caches = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=caches)
    begun = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=begun)
    mx.eval([cache.state for cache in (*caches, *begun)])
    token, found, given = prompt[-1], [], []
    for _ in range(DECODED):
        given.append(token)
        logits = model(mx.array([[token]]), cache=caches)[0, -1]
        mx.eval(logits)
        found.append(logits)
        token = int(mx.argmax(logits).item())
    return found, given, begun


# The machine

PEER_PACKAGES = ("torch", "peft", "transformers")
BUSY_LOAD = 1.0  # per core
HOT = ("serious", "critical")
HOT_C = 95.0
# What a virtual GPU must be able to compute, or no check can run: a product, its gradient, 16 bits, random numbers.
PROBE = """
import mlx_lora, mlx.core as mx
x = mx.random.normal((64, 64)).astype(mx.bfloat16)
mx.eval(mx.grad(lambda w: mx.softmax(x @ w, axis=-1).square().sum())(x), mx.fast.rms_norm(x, x[0], 1e-5))
"""


def peer_versions() -> dict[str, str | None]:
    """Return the versions of packages that training is compared with; None for those that are not installed."""
    return package_versions(PEER_PACKAGES)


def is_virtual(here: device.Device) -> bool:
    """Return whether the GPU is that of a virtual machine, as on GitHub's runners (`Apple Paravirtual device`)."""
    return here.backend != "cpu" and "virtual" in here.name.lower()


def gpu_problem(kit: Kit) -> str:
    """Return why the GPU cannot compute, empty if it can; asked in a process of its own, which it may end."""
    ended = run_process([sys.executable, "-c", PROBE], kit.work / "probe.log")
    return "" if ended.code == 0 else f"a probe ended with code {ended.code}, {ended.last_words}"


def check_gpu(kit: Kit) -> Iterator[CheckFinding]:
    """Say which device computes, and whether it is a real one."""
    if is_virtual(kit.here):
        words = f"a virtual GPU ({kit.here.name}): its memory and speed are not those of a chip, so they are left out"
        yield CheckFinding("device", "warning", words, advice="run this on a Mac itself for memory and speed")
    elif kit.on_gpu:
        cores = describe_machine()["gpu_cores"]
        yield CheckFinding("device", "ok", f"{kit.here.header()}{f', {cores} GPU cores' if cores else ''}")
    else:
        words = f"{kit.here.header()}: no GPU, so functions are compared with their definitions on the CPU"
        yield CheckFinding("device", "ok", words)


def check_power(kit: Kit) -> Iterator[CheckFinding]:
    """Say what slows measurements down now."""
    power, cores = describe_power(), describe_machine()["cpu_cores"] or 1
    low, heat, state, load = (
        power[name] for name in ("low_power_mode", "temperature_c", "thermal_state", "load_average")
    )
    hot = state in HOT or (heat is not None and heat > HOT_C)
    warmth = state or ("not known" if heat is None else f"{heat:.0f} °C at the hottest sensor")
    lines = {
        "source": (power["source"] == "battery", power["source"] or "not known", "plug in the charger"),
        "low-power mode": (
            low is True,
            "not known" if low is None else "on" if low else "off",
            "turn it off before you compare speeds",
        ),
        "heat": (hot, warmth, "let the machine cool, then run --again --group speed"),
        "other programs": (
            load > BUSY_LOAD * cores,
            f"load {load:g} over the last minute on {cores} cores",
            "close other programs before you compare speeds",
        ),
    }
    for name, (slows, words, advice) in lines.items():
        yield CheckFinding(name, "warning" if slows else "ok", words, advice=advice if slows else "")


# The planner

BOUND = 0.10  # of the measured peak
PLAN_ADVICE = "give --memory-budget with some room; docs/development/planner.md says how the plan counts; report it with these numbers"
# SmolLM2's and Llama 3.2 1B's widths. In a much smaller model, what the plan rounds up is more than a tenth.
MODEL_ON_CPU = {**SMOLLM2.config, "num_hidden_layers": 6}
MODEL_ON_GPU = {**LLAMA_1B.config, "num_hidden_layers": 8}


# Settings of each run, and whether its base is in 4 bits.
RUNS: tuple[dict[str, Any], ...] = (
    {"rank": 8, "batch_size": 2, "grad_checkpoint": "none"},
    {"rank": 64, "batch_size": 2, "grad_checkpoint": "none"},
    {"rank": 8, "batch_size": 2, "grad_checkpoint": "block"},
    {"rank": 16, "batch_size": 4, "grad_checkpoint": "block"},
    {"rank": 16, "batch_size": 4, "grad_checkpoint": "none", "packed": True},
    {"rank": 16, "batch_size": 4, "grad_checkpoint": "block", "method": "dora", "packed": True},
    {"rank": 8, "batch_size": 2, "grad_checkpoint": "none", "objective": PAIRS[0]},
    {"rank": 8, "batch_size": 4, "grad_checkpoint": "block", "objective": PAIRS[0], "packed": True},
)


def planned_run_words(one: Mapping[str, Any]) -> str:
    """Return a run's name in the result."""
    kind, base = one.get("objective") or one.get("method", "lora"), "4-bit" if one.get("packed") else "float"
    return f"{kind}, {base} base, rank {one['rank']}, {one['batch_size']} rows, checkpointing {one['grad_checkpoint']}"


def check_peak(one: dict[str, Any], kit: Kit) -> Iterator[CheckFinding]:
    """Compare the planned with the measured peak of one run."""
    positions = 1024 if kit.as_fast_as_a_gpu else 256
    settings, path, dpo = dict(one), kit.work / "memory.jsonl", "objective" in one
    packed = settings.pop("packed", False)
    folder = kit.work / f"memory{'-4bit' if packed else ''}"
    config = MODEL_ON_GPU if kit.as_fast_as_a_gpu else MODEL_ON_CPU
    model = write_model(folder, config, device.compute_dtype(), AFFINE if packed else None)
    # Texts that each fill a row, or pairs of answers that nearly do; a token is a byte.
    if dpo:
        words = positions // 8  # of an answer, at about five bytes each, with the prompt and the template beside them
        path.write_text(chat_rows(16, (4, 5), (words, words), pairs=True), encoding="utf-8")
    else:
        rows = [json.loads(line) for line in chat_rows(16, (4, 5), (positions, positions), 0).splitlines()]
        texts = [json.dumps({"text": row["messages"][1]["content"][:positions]}) for row in rows]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    settings |= {"iters": 3, "max_seq_length": positions + 1} | ({} if dpo else {"mask_prompt": False})
    # The first run of a shape on a machine also measures kernels, and the plan is for the run alone: it may be repeated.
    planned, measured, good = None, 0, False
    for _ in range(2):
        if not good:
            records, facts = train_child(kit, f"memory-{RUNS.index(one)}", model, path, settings)
            planned, measured = facts["planned_peak_bytes"], max(record["peak_memory_bytes"] for record in records)
            good = planned is None or abs(planned / measured - 1) <= BOUND
    if planned is None:
        yield CheckFinding("peak", "failed", "the run was not planned", advice=PLAN_ADVICE)
        return
    ratio = planned / measured
    words = f"planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: {ratio:.3f} times"
    yield CheckFinding(
        "peak", "ok" if good else "warning", words, abs(ratio - 1), BOUND, "of the measured peak",
        "" if good else PLAN_ADVICE, {"planned GB": planned / 1e9, "measured GB": measured / 1e9},
    )  # fmt: skip


# Speed

BATCH, SPEED_RANK = 4, 16
FASTER = 0.95  # of a peer's speed: within the noise of two runs
STEADY = 1.10  # first speed over last
MODELS = 4


def check_rates(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the rates by which speeds are predicted for this chip with what it reaches, so that its owner can correct them."""
    if chip := known_chip(kit.here.name):
        found, assumed = measure_ceilings(rounds=3), listed_ceilings(chip, device.compute_dtype().size)
        values = {name: getattr(found, name) for name in ("flops_per_s", "bytes_per_s", "launch_s")}
        told = (
            f"products {found.flops_per_s / 1e12:.2f} TFLOPS (predictions assume {assumed.flops_per_s / 1e12:.2f}), memory "
            f"{found.bytes_per_s / 1e9:.0f} GB/s ({assumed.bytes_per_s / 1e9:.0f}), a launch {1e6 * found.launch_s:.1f} us "
            f"({1e6 * assumed.launch_s:.1f})"
        )
        yield CheckFinding("rates", "ok", told, values=values)
    else:
        yield CheckFinding("rates", "skipped", f"{kit.here.name}: no prediction is made for it")


def check_speed(number: int, kit: Kit) -> Iterator[CheckFinding]:
    """Compare our speed with the peers' on one model."""
    # Rows, passes that are counted after the first, words of an answer, and a peer's longest time in seconds.
    rows, passes, words, limit_s = (16, 3, (60, 200), 120.0) if kit.as_fast_as_a_gpu else (8, 1, (4, 14), 60.0)
    model = speed_models(kit)[number]
    folder, data = model.write(kit), kit.work / "speed.jsonl"
    data.write_text(chat_rows(rows, (3, 6), words, 0), encoding="utf-8")
    settings = {
        "batch_size": BATCH,
        "rank": SPEED_RANK,
        "alpha": 2.0 * SPEED_RANK,
        "max_seq_length": 2048,
        "epochs": 1 + passes,
    }
    records, _ = train_child(kit, f"speed-{number}", folder, data, {**settings, "grad_checkpoint": "none"})
    each = rows // BATCH
    ends = [record["elapsed_s"] for record in records]
    tokens = sum(record["real_tokens"] for record in records[each:])
    if len(ends) != each * (1 + passes):
        raise RunError(f"{len(ends)} steps were reported, not {each * (1 + passes)}")
    ours = tokens / (ends[-1] - ends[each - 1])
    yield CheckFinding(
        f"{model.words}: mlx-lora", "ok", f"{ours:,.0f} tokens/s", ours, None, "tokens/s", values={"mlx-lora": ours}
    )
    job = {
        "model": str(folder), "data": str(data), "batch_size": BATCH, "rank": SPEED_RANK, "steps": len(ends),
        "ends": str(kit.work / "peer-steps.txt"),
    }  # fmt: skip
    (kit.work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    for name, argument in PEERS.items():
        label, steps = f"{model.words}: {name}", Path(job["ends"])
        if name == "torch" and (missing := [one for one in ("torch", "peft") if peer_versions()[one] is None]):
            words = f"{' and '.join(missing)} not installed (pip install torch peft)"
            yield CheckFinding(label, "skipped", words)
            continue
        steps.unlink(missing_ok=True)
        command = [sys.executable, "-m", "mlx_lora.bench.doctor.peers", argument, str(kit.work / "job.json")]
        ended = run_process(command, kit.work / "peer.log", limit_s=limit_s)
        lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
        if len(lines) == len(ends):
            theirs = tokens / (float(lines[-1]) - float(lines[each - 1]))
            slower = ours / theirs < FASTER
            note = " in float weights, as it has no 4-bit base here" if name == "torch" and model.packed else ""
            words = f"{theirs:,.0f} tokens/s{note}; mlx-lora is {ours / theirs:.2f} times as fast"
            yield CheckFinding(
                label, "warning" if slower else "ok", words, ours / theirs, None, "times as fast",
                SLOWER if slower else "", {name: theirs},
            )  # fmt: skip
        elif ended.stopped:
            words = f"stopped after {limit_s:.0f} s, start included, at step {len(lines)} of {len(ends)}"
            yield CheckFinding(label, "ok", f"{words}; mlx-lora's steps took {ends[-1]:.1f} s")
        else:
            yield CheckFinding(label, "warning", f"it ended with code {ended.code}: {ended.last_words}"[:300])


PEERS = {"mlx_lm.lora": "mlx-lm", "torch": "torch"}  # name -> argument of peers.py
SLOWER = "run it again on a quiet machine (--again --group speed); report it with these numbers"


def check_steady(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the speed of the first minute of a steady load with that of its last minute."""
    model = speed_models(kit)[0]
    data = kit.work / "steady.jsonl"
    # Rows of one length: every step has the same shape.
    data.write_text(chat_rows(1, (6, 6), (30, 30), 0) * (8 * BATCH), encoding="utf-8")
    settings = {
        "batch_size": BATCH,
        "rank": SPEED_RANK,
        "iters": 100_000,
        "steps_per_report": 10 if kit.as_fast_as_a_gpu else 1,
    }
    records, _ = train_child(kit, "steady", model.write(kit), data, settings, seconds=60 * kit.minutes)
    after = describe_power()
    first, last = steady_speeds(records, 60 * kit.minutes)
    ratio = first / last
    state = after["thermal_state"] or (f"{after['temperature_c']:.0f} °C" if after["temperature_c"] else "not known")
    words = (
        f"{model.words}: {first:,.0f} tokens/s at first and {last:,.0f} after {kit.minutes:g} minutes, "
        f"{ratio:.2f} times as fast at first; heat afterwards: {state}"
    )
    slower = ratio > STEADY
    advice = "heat, the charger or another program: see the lines of the group machine" if slower else ""
    yield CheckFinding(
        "first over last", "warning" if slower else "ok", words, ratio, STEADY, "times", advice,
        {"first minute": first, "last minute": last},
    )  # fmt: skip


def steady_speeds(records: list[dict], seconds: float) -> tuple[float, float]:
    """Return the tokens per second of the first and of the last minute, or of halves of a shorter load.

    Args:
        records: lines of metrics.jsonl; the first two, which compile, are left out.
        seconds: of the load.

    Raises:
        RunError: there are too few steps.
    """
    steady, window = records[1:], min(60.0, seconds / 2)
    if len(steady) < 4:
        raise RunError(f"{len(records)} reports in {seconds:.0f} s are too few to compare; give more --minutes")
    begin, end = steady[0]["elapsed_s"], steady[-1]["elapsed_s"]
    early = [one for one in steady[1:] if one["elapsed_s"] <= begin + window] or steady[1:2]
    late = [one for one in steady[1:] if one["elapsed_s"] > end - window] or steady[-1:]
    before_late = steady[steady.index(late[0]) - 1]["elapsed_s"]
    return (
        sum(one["real_tokens"] for one in early) / (early[-1]["elapsed_s"] - begin),
        sum(one["real_tokens"] for one in late) / (end - before_late),
    )


# Models

SMALL_QWEN = {
    **QWEN3_4B.config,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}
SMALL_GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 32768,
}  # fmt: skip
MEMORY_FOR_LARGE = 30 * GIB  # from here, an 8B model's widths


@dataclass(frozen=True)
class SpeedModel:
    """A model.

    Attributes:
        name: as it is published.
        config: of the whole model.
        blocks: that are kept.
        packed: whether it is in 4 bits.
    """

    name: str
    config: dict[str, Any]
    blocks: int
    packed: bool

    @property
    def words(self) -> str:
        """Its name in the result."""
        whole = self.config["num_hidden_layers"]
        cut = "" if self.blocks == whole else f", {self.blocks} of {whole} blocks"
        return f"{self.name}, {'4-bit' if self.packed else 'float'}{cut}"

    def write(self, kit: Kit) -> Path:
        """Return a folder with it, written once."""
        config = {**self.config, "num_hidden_layers": self.blocks}
        folder = kit.work / f"speed-{self.name}-{self.blocks}{'-4bit' if self.packed else ''}"
        return write_model(folder, config, device.compute_dtype(), AFFINE if self.packed else None)


def speed_models(kit: Kit) -> list[SpeedModel]:
    """Return four models for this machine."""
    if not kit.as_fast_as_a_gpu:
        return [
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, False),
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, True),
            SpeedModel("Gemma-3-270M", SMALL_GEMMA, 6, False),  # its pattern of windows is six blocks long
            SpeedModel("Qwen3-0.6B", SMALL_QWEN, 2, True),
        ]
    large = QWEN3_8B if kit.here.working_set_bytes >= MEMORY_FOR_LARGE else QWEN3_4B
    return [
        SpeedModel("SmolLM2-135M", SMOLLM2.config, 30, False),
        SpeedModel("Gemma-3-270M", SMALL_GEMMA, 18, False),
        SpeedModel("Llama-3.2-1B", LLAMA_1B.config, 8, True),
        SpeedModel(large.name, large.config, 6, True),
    ]

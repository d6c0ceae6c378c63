"""Check kernels, quantized formats, adapter layers, losses and a whole model against exact numbers on the CPU.

Of kernels, output and gradients are compared. The training run does the same before it takes a kernel, and does not take a
wrong one; here each is named, in shapes that published models have. Of formats, packing, unpacking, and both products of a
quantized weight are compared, forward and backward, with the same packed weight, unpacked.

Shapes: x (N, in), weight (out, in); experts (E, out, in), N rows in the experts' order; P positions, V vocabulary.

The definition of a layer uses the adapted weight as a whole, in float32 on the CPU: y = x (W + D)^T, and for DoRA the rows of
W + D at their trained lengths. The layers never make that weight. Losses of whole answers take float32 numbers whatever the model
computes in, and are compared with float64. The whole model computes in the dtype of runs, with mlx's own kernels: ours have their
own lines.

Shapes: x (N, in), tokens (N,), experts' x (N, 1, in); E pairs or answers, P tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters.base import QUANTIZED, SWITCH, AdapterLayer, dense_weight, with_weight
from mlx_lora.adapters.inject import adapter_class, adapter_parameters, inject, select_targets
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
)
from mlx_lora.config.presets import PRESETS
from mlx_lora.data.batch import Batch
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
from mlx_lora.losses.policy import RATIO_OF, PolicyOptions, SampledTokens, policy_loss
from mlx_lora.losses.preference import (
    RATED_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    RatedOptions,
    Ratings,
    bradley_terry,
)
from mlx_lora.models.head import Head
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.utils import device

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


ROWS, INPUTS, OUTPUTS, TOKENS, EXPERTS, RANK, ALPHA = 70, 128, 96, 300, 4, 8, 16.0
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

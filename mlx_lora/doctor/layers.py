"""Check every adapter layer: outputs and the gradient of each trained array, against the layer's definition.

The definition uses the adapted weight as a whole, in float32 on the CPU: y = x (W + D)^T, and for DoRA the rows of W + D at
their trained lengths. The layers never make that weight.

Shapes: x (N, in), tokens (N,), experts' x (N, 1, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters.base import EMBEDDING, SWITCH, AdapterLayer
from mlx_lora.adapters.targets import adapter_class
from mlx_lora.config.presets import PRESETS
from mlx_lora.doctor.check import (
    Finding,
    Kit,
    KitCheck,
    apart,
    bounded,
    dtype_name,
    dtypes_of,
    largest_apart,
    normal,
    on_cpu,
)
from mlx_lora.kernels.measure import TOLERANCE
from mlx_lora.utils import device

ROWS, WIDE, OUT, TOKENS, EXPERTS, RANK, ALPHA = 70, 128, 96, 300, 4, 8, 16.0
PACKED = {"bits": 4, "group_size": 32, "mode": "affine"}
ADVICE = "do not train with this method here; mlx_lora/adapters has the layer; report it"


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
    Case("embedding"),
    Case("embedding", packed=True),
    Case("embedding", "dora"),
    Case("tied head"),
    Case("tied head", "dora"),
    Case("experts"),
    Case("experts", packed=True),
    Case("experts", "dora", packed=True),
)


def layer_checks() -> list[KitCheck]:
    """Return a check for each case."""
    return [KitCheck("adapters", case.words, partial(check_layer, case)) for case in CASES]


def check_layer(case: Case, kit: Kit) -> Iterator[Finding]:
    """Compare one layer with its definition in every dtype."""
    for dtype in dtypes_of(kit):
        label = dtype_name(dtype)
        if case.kind == "experts" and not (dtype == mx.float32 or device.multiplies_16_bit_experts()):
            yield Finding(label, "skipped", "mlx has no 16-bit experts on this device")
            continue
        yield from _compare_layer(case, dtype)


def _compare_layer(case: Case, dtype: mx.Dtype) -> Iterator[Finding]:
    label = dtype_name(dtype)
    layer = build_layer(case, dtype)
    arrays = {name: layer[name] for name in layer.trained}
    x, call = _input(case, dtype)
    found = _numbers(lambda x, layer=layer, call=call: call(layer, x), layer, arrays, x)
    with on_cpu():
        # The same numbers: weights and scales are cast up from their 16 bits.
        exact_layer = build_layer(case, dtype)
        exact_layer.base.set_dtype(mx.float32)
        wide = x if x.dtype == mx.int32 else x.astype(mx.float32)
        exact = _numbers(lambda x: _definition(case, exact_layer, x), exact_layer, arrays, wide)
    bound = 2 * TOLERANCE[dtype]
    what = f"{label} against the adapted weight in float32 on the CPU"
    yield bounded(f"{label}: output", apart(found.pop("output"), exact.pop("output")), bound, what, ADVICE)
    error, worst = largest_apart(found, exact)
    yield bounded(f"{label}: gradients", error, bound, f"{what}; the farthest: {worst}", ADVICE)


def build_layer(case: Case, dtype: mx.Dtype) -> AdapterLayer:
    """Return a layer with random numbers in all its arrays."""
    base = _base(case, dtype)
    method = PRESETS[case.method]
    made = adapter_class(base, method.layer_type)
    if made is None:
        raise ValueError(f"no layer of type {method.layer_type} over {type(base).__name__}")
    layer = made.from_base(base, _factors(made, 1), method.scale_of(ALPHA, RANK), case.dropout)
    if case.method == "pissa":
        layer.start_a, layer.start_b = _factors(made, 2)
    elif case.method == "adalora":
        layer.lora_e = normal(RANK, seed=5)
    elif case.method == "relora":
        layer.merge(*_factors(made, 2))
    if "m" in layer:
        layer.m = layer.m * (1 + 0.2 * normal(*layer.m.shape, seed=6))
    layer.train()
    mx.eval(layer.parameters())
    return layer


def _base(case: Case, dtype: mx.Dtype) -> nn.Module:
    if case.kind == "experts":
        base: Any = SwitchLinear(WIDE, OUT, EXPERTS, bias=False)
        base.weight = normal(EXPERTS, OUT, WIDE, seed=11, dtype=dtype, size=0.1)
    elif case.kind == "linear":
        base = nn.Linear(WIDE, OUT)
        base.weight = normal(OUT, WIDE, seed=11, dtype=dtype, size=0.1)
        base.bias = normal(OUT, seed=12, dtype=dtype)
    else:
        base = nn.Embedding(TOKENS, WIDE)
        base.weight = normal(TOKENS, WIDE, seed=11, dtype=dtype, size=0.1)
    return base.to_quantized(**PACKED) if case.packed else base


def _factors(made: type[AdapterLayer], seed: int) -> tuple[mx.array, mx.array]:
    """Return (lora_a, lora_b) in the orientation that the class has; B is not zero, or A would have no gradient."""
    if made.OVER is SWITCH:
        a, b = (EXPERTS, RANK, WIDE), (EXPERTS, OUT, RANK)
    elif made.OVER is EMBEDDING:
        a, b = (TOKENS, RANK), (RANK, WIDE)
    else:
        a, b = (WIDE, RANK), (RANK, OUT)
    return normal(*a, seed=20 + seed, size=0.1), normal(*b, seed=30 + seed, size=0.1)


def _input(case: Case, dtype: mx.Dtype) -> tuple[mx.array, Callable[[AdapterLayer, mx.array], mx.array]]:
    """Return the input of a layer, and how it is called with it."""
    if case.kind == "experts":
        return normal(ROWS, 1, WIDE, seed=41, dtype=dtype), lambda layer, x: layer(x, _chosen(), sorted_indices=True)
    if case.kind == "embedding":
        tokens = mx.array([(17 * n) % TOKENS for n in range(ROWS)], mx.int32)
        return tokens, lambda layer, x: layer(x)
    x = normal(ROWS, WIDE, seed=41, dtype=dtype)
    if case.kind == "tied head":
        return x, lambda layer, x: layer.as_linear(x)  # pyright: ignore[reportAttributeAccessIssue]
    return x, lambda layer, x: layer(x, key=mx.random.key(7))


def _chosen() -> mx.array:
    return mx.array([EXPERTS * n // ROWS for n in range(ROWS)])


def _definition(case: Case, layer: AdapterLayer, x: mx.array) -> mx.array:
    """Return a layer's output by its adapted weight, float32."""
    weight = layer.weight + layer.product()
    if "m" in layer:
        weight = weight * (layer.m / mx.stop_gradient(mx.linalg.norm(weight, axis=-1)))[..., None]
    if case.kind == "experts":
        return x @ weight[_chosen()].swapaxes(-1, -2)
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

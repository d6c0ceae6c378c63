"""Define the base class of all adapter layers: a frozen layer, a low-rank pair of factors, and their export to each format.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: LoRALinear(linear: the same object, lora_a, lora_b)

A new layer type needs a subclass in `_CLASSES` (adapters/inject.py) for each kind of base that it wraps. The subclass computes
the output (`__call__`) and what is added to the weight (`delta`), and names the arrays that it trains in addition to the
factors (`BESIDE`). Serving and the exports to PEFT and llama.cpp refuse it until the class says that they support it.

The factors are float32 masters with mlx-lm's names and orientation. They are cast to the activation's dtype inside the call, or
by the step for all layers at once: mlx-lm's float32 factors turn all later bfloat16 activations into float32, with twice the
memory traffic.

While a method trains, a layer may have more arrays:

    lora_e             (r,) trained gains, one per rank: D = scale A diag(e) B (AdaLoRA, arXiv 2303.10512, eq. 3)
    start_a, start_b   frozen initial A and B: D = scale (A B - A0 B0) (PiSSA, arXiv 2404.02948, over the whole base)
    fixed_a, fixed_b   frozen factors of ReLoRA's finished cycles, with the scale in fixed_b (arXiv 2307.05695)

`plain_factors` returns all of them as one pair, so the stored adapter is LoRA for every method.

Shapes: r rank, R the rank of all pairs joined; in and out are the base's widths. `lora_a` is (in, r) and `lora_b` (r, out),
where an embedding's in is its vocabulary; for E experts they are (E, r, in) and (E, out, r).
Source: LoRA, arXiv 2106.09685, eq. 3: h = W0 x + (alpha / r) B A x.
"""

from __future__ import annotations

from typing import Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_lora.kernels.quantized_matmul import MEASURED
from mlx_lora.models.quantize import AFFINE, QuantFormat, dequantized_weight
from mlx_lora.utils.errors import InputError

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
_PLAIN = {measured: plain for plain, measured in MEASURED.items()}
Factors = tuple[mx.array, mx.array]


class AdapterLayer(nn.Module):
    """A frozen layer with trained factors.

    Attributes:
        LAYER_TYPE: the registry's name of the type.
        STORED_TYPE: the type that the stored factors have, `fine_tune_type` in adapter_config.json; empty: LAYER_TYPE.
        OVER: the kind of base that it wraps: LINEAR, EMBEDDING or SWITCH.
        BESIDE: names of arrays that are trained and stored in addition to the factors.
        CAST_ONCE: whether a call reads nothing of the trained arrays but A and scale * B in the activation's dtype.
        KEEPS_PRODUCT: whether the backward pass needs the layer's output before it is scaled; the planner counts it.
        NOT_IN_PEFT, NOT_IN_GGUF, NOT_FOR_A_ROW: why PEFT, llama.cpp's adapters or a row of a served batch cannot use
            this layer, as the end of a sentence that begins with the layer's name; None if they can.
        adapts_head: False if an embedding's adapter does not adapt the output head tied to it.
    """

    LAYER_TYPE: str
    STORED_TYPE: str = ""
    OVER: tuple[type, ...]
    BESIDE: tuple[str, ...] = ()
    CAST_ONCE = KEEPS_PRODUCT = False
    NOT_IN_PEFT: str | None = "is of a type that PEFT does not have"
    NOT_IN_GGUF: str | None = "is of a type that llama.cpp's adapters do not have"
    NOT_FOR_A_ROW: str | None = "cannot be served row by row"
    adapts_head = True

    def __init__(self, base: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `base`.

        Args:
            base: of a kind in OVER; not changed.
            lora_a, lora_b: float32, in the orientation that the module's docstring describes.
            scale: alpha / r, or what the method's scaling rule gives.
            dropout: probability with which an input feature of the adapter is dropped while training.
        """
        super().__init__()
        self[self.holds] = base
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)

    @classmethod
    def from_base(cls, base: nn.Module, factors: Factors, scale: float, dropout: float = 0.0) -> Self:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Return why this type cannot wrap a base of its kind, as the end of a sentence that begins with its path."""
        return None

    @classmethod
    def factor_dims(cls, base: nn.Module) -> tuple[int, int]:
        """Return the outer widths of the factors: the rows of A and the columns of B."""
        return base_dims(base)

    @classmethod
    def initial_gain(cls, base: nn.Module) -> float:
        """Return what Kaiming's initial A is multiplied by, so that A x is as large as LoRA's."""
        return 1.0

    @property
    def holds(self) -> str:
        """The attribute with the frozen layer, named as in mlx-lm."""
        return "embedding" if self.OVER is EMBEDDING else "linear"

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self[self.holds]

    @property
    def weight(self) -> mx.array:
        """The frozen layer's weight in float32: (out, in), (vocabulary, width) or (E, out, in)."""
        return exact_weight(self.base)

    @property
    def dims(self) -> tuple[int, int]:
        """The widths (in, out) of the whole layer, also where this rank's base is a part of it."""
        if self.OVER is SWITCH:
            return self.lora_a.shape[2], self.lora_b.shape[1]
        return self.lora_a.shape[0], self.lora_b.shape[1]

    @property
    def rank(self) -> int:
        """The rank r of the trained factors."""
        return self.lora_a.shape[1]

    @property
    def rank_axes(self) -> dict[str, int]:
        """The rank axis of each factor."""
        return {"lora_a": 1, "lora_b": 2 if self.OVER is SWITCH else 0}

    @property
    def cast_to(self) -> mx.Dtype | None:
        """The dtype in which a call reads A and scale * B; None if it reads more of what is trained, or more exactly."""
        return float_dtype(self.base) if self.CAST_ONCE and not self.keys() & {"start_a", "lora_e"} else None

    @property
    def trained(self) -> list[str]:
        """Names of the arrays that training changes."""
        return [name for name in ("lora_a", "lora_b", "lora_e", *self.BESIDE) if name in self]

    def _side_by_side(self, *pairs: Factors) -> Factors:
        """Return one pair of factors, whose product is the sum of the pairs' products."""
        a_axis, b_axis = self.rank_axes.values()
        return mx.concatenate([a for a, _ in pairs], axis=a_axis), mx.concatenate([b for _, b in pairs], axis=b_axis)

    def effective_factors(self) -> Factors:
        """Return the trained factors as one pair with R ranks, float32, without the scale and the fixed factors.

        A B - A0 B0 is computed as A (B - B0) + (A - A0) B0: it is zero at the start in any dtype, and in 16 bits the
        updates are not lost to rounding of the large factors.
        """
        a, b = self.lora_a, self.lora_b
        if "start_a" in self:
            a, b = self._side_by_side((a, b - self.start_b), (a - self.start_a, self.start_b))
        if "lora_e" in self:
            b = mx.expand_dims(self.lora_e, 1) * b
        return a, b

    def times_scale(self, b: mx.array) -> mx.array:
        """Return scale * b; in a step, which multiplies the factors beforehand, the scale is 1."""
        return b if self.scale == 1 else self.scale * b

    def plain_factors(self) -> Factors:
        """Return one pair with R ranks, float32, so that scale * A B is the sum of all products that the layer adds."""
        a, b = self.effective_factors()
        if "fixed_a" in self:
            a, b = self._side_by_side((a, b), (self.fixed_a, self.fixed_b / self.scale))
        return a, b

    def merge(self, a: mx.array, b: mx.array) -> None:
        """Add a cycle's factors to the frozen ones (ReLoRA).

        Frozen factors with more ranks than the layer's narrower side are replaced by one product, which is the same
        function, so that memory does not grow with the number of cycles.
        """
        b = self.scale * b
        if "fixed_a" in self:
            a, b = self._side_by_side((self.fixed_a, self.fixed_b), (a, b))
        wide, tall = (b, a) if self.OVER is SWITCH else (a, b)  # experts' factors are transposed: the product is B A
        rows, columns = wide.shape[-2], tall.shape[-1]
        if wide.shape[-1] > min(rows, columns):
            unit = mx.broadcast_to(mx.eye(min(rows, columns)), (*wide.shape[:-2], *[min(rows, columns)] * 2))
            wide, tall = (unit, wide @ tall) if rows <= columns else (wide @ tall, unit)
            a, b = (tall, wide) if self.OVER is SWITCH else (wide, tall)
        self.fixed_a, self.fixed_b = a, b
        self.freeze(keys=["fixed_a", "fixed_b"], recurse=False)

    def product(self) -> mx.array:
        """Return scale * A B in the orientation of the weight, float32."""
        a, b = self.plain_factors()
        if self.OVER is SWITCH:
            return self.scale * (b @ a)
        return self.scale * (a @ b if self.OVER is EMBEDDING else (a @ b).T)

    def delta(self) -> mx.array:
        """Return the adapter's change of the weight, in the weight's shape, float32."""
        return self.product()

    def merged(self) -> mx.array:
        """Return the weight with the adapter folded in, float32."""
        return self.weight + self.delta()

    def fuse(self) -> nn.Module:
        """Return a dense layer of the base's kind with the adapter folded in, in the base's float dtype."""
        return with_weight(self.base, self.merged())

    def check_tied_head(self, path: str, tied: bool) -> None:
        """Refuse to fold in an adapter that does not adapt the tied head.

        Args:
            path: of the layer, for the error.
            tied: whether the model's output head is its embedding.

        Raises:
            InputError: one weight cannot be both adapted and not.
        """
        if tied and not self.adapts_head:
            raise InputError(
                f"{path}: its adapter changes the embedding but not the tied head, which share one weight; keep the adapter separate"
            )

    def finish(self) -> None:
        """Compute, once after training, what no longer changes."""

    def stored(self, scale: float) -> dict[str, mx.array]:
        """Return this layer's arrays in adapters.safetensors, by name.

        Args:
            scale: the factor on the stored product; a different scale of the layer is multiplied into B. Ranks that
                AdaLoRA switched off are not stored; if all are off, one is, because no reader supports rank zero.
        """
        a, b = self.plain_factors()
        if "lora_e" in self:
            on = self.lora_e.reshape(-1, self.lora_e.shape[-1]).any(axis=0).tolist()  # for experts: on in any of them
            kept = mx.array([rank for rank, is_on in enumerate(on) if is_on] or [0])
            a, b = (mx.take(factor, kept, axis) for factor, axis in zip((a, b), self.rank_axes.values(), strict=True))
        b = b if self.scale == scale else b * (self.scale / scale)
        return {"lora_a": mx.contiguous(a), "lora_b": mx.contiguous(b), **{name: self[name] for name in self.BESIDE}}

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that one of the trained arrays has in adapters.safetensors."""
        return self[name].shape

    def from_stored(self, name: str, array: mx.array) -> mx.array:
        """Return a stored array in the shape in which this layer trains it.

        Raises:
            ValueError: this type of layer cannot represent it.
        """
        return array

    def transposed_factors(self) -> Factors:
        """Return the factors in PEFT's and llama.cpp's orientation: (r, in) and (out, r), for experts with E in front."""
        a, b = self.plain_factors()
        return (a, b) if self.OVER is SWITCH else (a.T, b.T)

    def to_peft(self, name: str, row_factors: mx.array | None, tied: bool) -> dict[str, dict[str, mx.array]]:
        """Return this layer's tensors in PEFT's format: module -> name within it -> tensor.

        Experts are bare tensors in PEFT; exporters/peft.py joins them.

        Args:
            name: of the layer in transformers.
            row_factors: (out, 1), the factors by which mlx-lm multiplies the base's rows on loading; None for none.
            tied: whether this layer is an embedding that is the model's output head, too.
        """
        a, b = self.transposed_factors()
        return {name: {"lora_A.weight": a, "lora_B.weight": b if row_factors is None else b / row_factors}}

    def serving_factors(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array | None]:
        """Return the arrays for a row of a served batch: (in, r), (r, out) times the scale, and (out,) gains or None."""
        a, b = self.plain_factors()
        return mx.contiguous(a.astype(dtype)), mx.contiguous((self.scale * b).astype(dtype)), None


def is_parameter(module: nn.Module | None, name: str) -> bool:
    """Return whether a module itself has an array of this name; the name may come from a file."""
    return module is not None and isinstance(module.get(name), mx.array)


# Kinds of base


def is_exactly(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Return whether a module's type is exactly one of `kinds`, or our measured variant of one.

    Other subclasses may do anything: mlx-lm's AFM has a linear layer that returns a list.
    """
    return _PLAIN.get(type(module), type(module)) in kinds


def base_dims(base: nn.Module) -> tuple[int, int]:
    """Return (input width, output width) of a linear, expert or embedding base, quantized or not.

    A packed row has in * bits / 32 words. Multiply before dividing: mlx-lm's DoRA divides first (`32 // bits`), which is
    wrong for 3, 5 and 6 bits.
    """
    rows, columns = base.weight.shape[-2:]
    width = columns * 32 // base.bits if isinstance(base, QUANTIZED) else columns
    return (rows, width) if isinstance(base, EMBEDDING) else (width, rows)


def dense_weight(base: nn.Module) -> mx.array:
    """Return the base's weight as floats: (out, in), for experts (E, out, in), for an embedding (vocabulary, width)."""
    return dequantized_weight(base) if isinstance(base, QUANTIZED) else base.weight


def exact_weight(base: nn.Module) -> mx.array:
    """Return the base's weight in float32; 16-bit scales are widened before they multiply, not their rounded products."""
    if isinstance(base, QUANTIZED) and base.mode == AFFINE:
        scales, biases = (base[name].astype(mx.float32) for name in ("scales", "biases"))
        return QuantFormat.of(base).dequantize(base.weight, scales, biases)
    return dense_weight(base).astype(mx.float32)


def float_dtype(base: nn.Module) -> mx.Dtype:
    """Return the dtype that `dense_weight` has: of the weight, or of affine scales; bfloat16 for most microscaling modes."""
    if not isinstance(base, QUANTIZED):
        return base.weight.dtype
    if base.mode == AFFINE:
        return base.scales.dtype
    return mx.float32 if "global_scale" in base else mx.bfloat16


def with_weight(base: nn.Module, weight: mx.array, dtype: mx.Dtype | None = None) -> nn.Module:
    """Return a dense layer of the base's kind with this weight and the base's bias.

    Args:
        base: linear, experts or embedding, quantized or not.
        weight: in the shape that dense_weight returns, with any float dtype.
        dtype: of the result; None: the base's float dtype.
    """
    if isinstance(base, EMBEDDING):
        dense = nn.Embedding(*weight.shape)
    elif isinstance(base, SWITCH):
        dense = SwitchLinear(weight.shape[2], weight.shape[1], weight.shape[0], bias="bias" in base)
    else:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in base)
    if "bias" in base:
        dense.bias = base.bias
    dense.weight = weight.astype(dtype or float_dtype(base))
    return dense


# Dropout


class Dropout(nn.Module):
    """Dropout with a separate random draw, so that the same draw can be used twice.

    A checkpointed block runs again in the backward pass and must drop the same features; mlx's own layer would draw
    again, so that the loss and its gradient would belong to different functions.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    @property
    def active(self) -> bool:
        """Whether features are dropped now."""
        return self.training and self.probability > 0

    def draw(self) -> mx.array:
        """Return a random key, (2,) uint32."""
        return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Drop features of `x` by `key`, or by a key drawn here."""
        if not self.active:
            return x
        kept = 1 - self.probability
        return mx.random.bernoulli(kept, x.shape, key=self.draw() if key is None else key) * x * (1 / kept)


def joined_experts(layers: list[AdapterLayer | None], in_turns: bool) -> tuple[mx.array, mx.array, float]:
    """Return one adapter, (E, R, in) and (E, out, R), and its scale, for layers whose rows are stored together."""
    scale = next(layer.scale for layer in layers if layer is not None)
    pairs = [None if layer is None else (*layer.plain_factors(), layer.scale / scale) for layer in layers]
    if len(pairs) == 1 and (only := pairs[0]):
        return only[0], only[1], scale
    a = mx.concatenate([pair[0] for pair in pairs if pair is not None], axis=1)
    experts, out = next(pair[1].shape[:2] for pair in pairs if pair is not None)
    parts, start = [], 0
    for pair in pairs:
        b = mx.zeros((experts, out, a.shape[1]))
        if pair is not None:
            rank = pair[0].shape[1]
            b[..., start : start + rank] = pair[1] * pair[2]
            start += rank
        parts.append(b)
    b = mx.stack(parts, axis=2).flatten(1, 2) if in_turns else mx.concatenate(parts, axis=1)
    return a, b, scale

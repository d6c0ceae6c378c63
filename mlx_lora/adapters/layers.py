"""LoRA layers over any frozen base: what is stored, computed, and folded back.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: LoRALinear(linear: the same object, lora_a, lora_b)

Shapes: B batch, T time, r rank; in and out are the base's own widths. The factors are float32 masters in
mlx-lm's names and orientation, `lora_a` (in, r) and `lora_b` (r, out), so stock mlx-lm loads them; they
are cast to the activation's dtype inside the call. Left float32 against bfloat16 activations, as mlx-lm
has them, they would turn every later activation into float32 at twice the memory traffic.

While a method trains, a layer may hold more:

    lora_e             (r,) trained gains, one per rank: D = scale A diag(e) B (AdaLoRA, arXiv 2303.10512, eq. 3)
    start_a, start_b   frozen, where A and B began: D = scale (A B - A0 B0) (PiSSA, 2404.02948, over the whole base)
    fixed_a, fixed_b   frozen factors beside the trained ones, the scale in fixed_b: the cycles that ReLoRA has
                       merged (2307.05695)

`plain_factors` writes all of it as one pair, so what is stored is LoRA whatever the method was.

Source: LoRA, arXiv 2106.09685, eq. 3: h = W0 x + (alpha / r) B A x.
"""

from __future__ import annotations

from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.parts import Dropout, dense_weight, with_weight

# What training changes, wherever a layer has it.
TRAINED = ("lora_a", "lora_b", "lora_e", "m")


def effective_factors(layer: nn.Module) -> tuple[mx.array, mx.array]:
    """Return the trained pair as one product, (in, R), (R, out) float32, without the scale and the fixed factors.

    A B - A0 B0 is taken as A (B - B0) + (A - A0) B0: zero at the start in any dtype, and in 16 bits the updates
    are not lost beside the large factors that they belong to.
    """
    a, b = layer.lora_a, layer.lora_b
    if "start_a" in layer:
        a = mx.concatenate([a, a - layer.start_a], axis=layer.RANK_AXES["lora_a"])
        b = mx.concatenate([b - layer.start_b, layer.start_b], axis=layer.RANK_AXES["lora_b"])
    if "lora_e" in layer:
        b = mx.expand_dims(layer.lora_e, 1) * b
    return a, b


def joined_factors(layer: nn.Module) -> tuple[mx.array, mx.array]:
    """Return one pair (in, R), (R, out) float32 with scale * A B = all that the layer adds."""
    a, b = effective_factors(layer)
    if "fixed_a" in layer:
        a = mx.concatenate([a, layer.fixed_a], axis=layer.RANK_AXES["lora_a"])
        b = mx.concatenate([b, layer.fixed_b / layer.scale], axis=layer.RANK_AXES["lora_b"])
    return a, b


def merge_factors(layer: nn.Module, a: mx.array, b: mx.array) -> None:
    """Join a cycle's factors (in, r), (r, out) to the frozen ones of `layer`.

    Frozen factors wider than the layer itself are written as one product, which is the same function: a
    run of many cycles does not grow without end.
    """
    b = layer.scale * b
    if "fixed_a" in layer:
        a = mx.concatenate([layer.fixed_a, a], axis=layer.RANK_AXES["lora_a"])
        b = mx.concatenate([layer.fixed_b, b], axis=layer.RANK_AXES["lora_b"])
    wide, tall = (b, a) if a.ndim == 3 else (a, b)  # experts' are stored transposed: the product is B A
    rows, columns = wide.shape[-2], tall.shape[-1]
    if wide.shape[-1] > min(rows, columns):
        unit = mx.broadcast_to(mx.eye(min(rows, columns)), (*wide.shape[:-2], *[min(rows, columns)] * 2))
        wide, tall = (unit, wide @ tall) if rows <= columns else (wide @ tall, unit)
        a, b = (tall, wide) if a.ndim == 3 else (wide, tall)
    layer.fixed_a, layer.fixed_b = a, b
    layer.freeze(keys=["fixed_a", "fixed_b"], recurse=False)


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * (x A) B."""

    RANK_AXES = MappingProxyType({"lora_a": 1, "lora_b": 0})

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `linear`.

        Args:
            linear: nn.Linear or nn.QuantizedLinear; kept as it is.
            lora_a: (in, r) float32.
            lora_b: (r, out) float32.
            scale: alpha / r, or whatever the method's scale axis says.
            dropout: probability with which an input feature of the adapter is dropped while training.
        """
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)

    @classmethod
    def from_base(
        cls, base: nn.Module, factors: tuple[mx.array, mx.array], scale: float, dropout: float = 0.0
    ) -> LoRALinear:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Apply the layer.

        Args:
            x: (..., in).
            key: of the dropout; drawn here when None.
        """
        y = self.linear(x)  # (..., out)
        a, b = effective_factors(self)
        z = self.dropout(x, key) @ a.astype(x.dtype)  # (..., r)
        # One pass over the output instead of two.
        y = mx.addmm(y, z, (self.scale * b).astype(x.dtype))
        if "fixed_a" not in self:
            return y
        return mx.addmm(y, x @ self.fixed_a.astype(x.dtype), self.fixed_b.astype(x.dtype))

    def plain_factors(self) -> tuple[mx.array, mx.array]:
        """Return one pair (in, R), (R, out) float32 with delta = scale * (A B)^T."""
        return joined_factors(self)

    def merge(self, a: mx.array, b: mx.array) -> None:
        """Freeze a cycle's factors beside the base (ReLoRA)."""
        merge_factors(self, a, b)

    def delta(self) -> mx.array:
        """Return what the adapter adds to the weight, (out, in) float32."""
        a, b = joined_factors(self)
        return self.scale * (a @ b).T

    def fuse(self) -> nn.Linear:
        """Return a dense linear layer with the adapter folded in, in the base's float dtype."""
        return with_weight(self.linear, dense_weight(self.linear).astype(mx.float32) + self.delta())


class LoRAEmbedding(nn.Module):
    """A frozen embedding plus scale * A[tokens] B; as a tied output head it adds scale * (x B^T) A^T.

    `adapts_head = False` leaves the tied head as it was: PEFT adapts the two apart.
    """

    RANK_AXES = MappingProxyType({"lora_a": 1, "lora_b": 0})

    def __init__(self, embedding: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `embedding`.

        Args:
            embedding: nn.Embedding or nn.QuantizedEmbedding; kept as it is.
            lora_a: (vocabulary, r) float32.
            lora_b: (r, width) float32.
            scale, dropout: as in LoRALinear.
        """
        super().__init__()
        self.embedding = embedding
        self.adapts_head = True
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)

    @classmethod
    def from_base(
        cls, base: nn.Module, factors: tuple[mx.array, mx.array], scale: float, dropout: float = 0.0
    ) -> LoRAEmbedding:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)  # (B, T, width)
        a, b = effective_factors(self)
        z = self.dropout(a[tokens].astype(y.dtype))  # (B, T, r)
        y = y + z @ (self.scale * b).astype(y.dtype)
        return y + (self.fixed_a[tokens] @ self.fixed_b).astype(y.dtype) if "fixed_a" in self else y

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, vocabulary)
        if not self.adapts_head:
            return y
        a, b = effective_factors(self)
        z = self.dropout(x) @ (self.scale * b).T.astype(x.dtype)  # (B, T, r)
        y = y + z @ a.T.astype(x.dtype)
        if "fixed_a" not in self:
            return y
        return y + (x @ self.fixed_b.T.astype(x.dtype)) @ self.fixed_a.T.astype(x.dtype)

    def plain_factors(self) -> tuple[mx.array, mx.array]:
        """Return one pair (vocabulary, R), (R, width) float32 with delta = scale * A B."""
        return joined_factors(self)

    def merge(self, a: mx.array, b: mx.array) -> None:
        """Freeze a cycle's factors beside the base (ReLoRA)."""
        merge_factors(self, a, b)

    def delta(self) -> mx.array:
        """Return what the adapter adds to the weight, (vocabulary, width) float32."""
        a, b = joined_factors(self)
        return self.scale * (a @ b)

    def fuse(self) -> nn.Embedding:
        """Return a dense embedding with the adapter folded in, in the base's float dtype."""
        return with_weight(self.embedding, dense_weight(self.embedding).astype(mx.float32) + self.delta())

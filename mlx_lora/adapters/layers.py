"""LoRA and DoRA layers over any frozen base: what is stored, computed, and folded back.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: LoRALinear(linear: the same object, lora_a, lora_b)

Shapes: B batch, T time, r rank; in and out are the base's own widths. The factors are float32 masters in
mlx-lm's names and orientation, `lora_a` (in, r) and `lora_b` (r, out), so stock mlx-lm loads them; they
are cast to the activation's dtype inside the call. Left float32 against bfloat16 activations, as mlx-lm
has them, they would turn every later activation into float32 at twice the memory traffic.

Source: LoRA, arXiv 2106.09685, eq. 3: h = W0 x + (alpha / r) B A x.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.moe import DoRASwitchLinear, LoRASwitchLinear
from mlx_lora.adapters.parts import EMBEDDING, LINEAR, SWITCH, Dropout, dense_weight


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * (x A) B."""

    TRAINED = ("lora_a", "lora_b")

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
        z = self.dropout(x, key) @ self.lora_a.astype(x.dtype)  # (..., r)
        # One pass over the output instead of two.
        return mx.addmm(y, z, (self.scale * self.lora_b).astype(x.dtype))

    def delta(self) -> mx.array:
        """Return scale * (A B)^T, (out, in) float32: what the adapter adds to the weight."""
        return self.scale * (self.lora_a @ self.lora_b).T

    def fuse(self) -> nn.Linear:
        """Return a dense linear layer with the adapter folded in, in the base's float dtype."""
        return _dense_linear(self.linear, dense_weight(self.linear).astype(mx.float32) + self.delta())


class DoRALinear(nn.Module):
    """A frozen linear layer whose rows turn by a low-rank update and whose row lengths m are trained:

        y = m / |W + D| (W x + D x) + bias,  D = scale (A B)^T

    |W + D| are the row lengths, through which no gradient goes. They come from |W|^2, which never changes, and
    products with the factors, so neither W nor D is made dense:

        |W + D|^2 = |W|^2 + 2 scale sum_r (W A) B^T + scale^2 sum_r (B^T A^T A) B^T      (each per row)

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3 (no gradient through the length).
    """

    TRAINED = ("lora_a", "lora_b", "m")

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `linear`; arguments as in LoRALinear. `m` (out,) starts as the rows' own lengths, float32."""
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)
        self._squares = mx.square(dense_weight(linear).astype(mx.float32)).sum(axis=-1)  # (out,)
        self.m = mx.sqrt(self._squares)
        self._kept_lengths: mx.array | None = None
        mx.eval(self._squares, self.m)

    @classmethod
    def from_base(
        cls, base: nn.Module, factors: tuple[mx.array, mx.array], scale: float, dropout: float = 0.0
    ) -> DoRALinear:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Apply the layer; arguments as in LoRALinear."""
        z = self.dropout(x, key) @ self.lora_a.astype(x.dtype)  # (..., r)
        y = mx.addmm(self._without_bias(x), z, (self.scale * self.lora_b).astype(x.dtype))  # (..., out)
        lengths = self.row_lengths(x.dtype) if self._kept_lengths is None else self._kept_lengths
        y = y * (self.m / lengths).astype(x.dtype)
        return y + self.linear.bias if "bias" in self.linear else y

    def keep_lengths(self) -> None:
        """Compute |W + D| once and for all, for an adapter that is no longer trained: generation calls per token."""
        self._kept_lengths = self.row_lengths(mx.float32)
        mx.eval(self._kept_lengths)

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |W + D|, (out,) float32, without a gradient; the product with W is computed in `dtype`."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = self._without_bias(a.T.astype(dtype)).astype(mx.float32)  # (r, out)
        squares = self._squares + (self.scale * b * (2 * across + self.scale * (a.T @ a) @ b)).sum(axis=0)
        return mx.sqrt(mx.maximum(squares, 1e-30))

    def _without_bias(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return y - self.linear.bias if "bias" in self.linear else y

    def _turned(self) -> mx.array:
        """Return m / |W + D| (W + D), (out, in) float32."""
        turned = dense_weight(self.linear).astype(mx.float32) + self.scale * (self.lora_a @ self.lora_b).T
        return turned * (self.m / mx.linalg.norm(turned, axis=-1))[:, None]

    def delta(self) -> mx.array:
        """Return what the adapter adds to the weight, (out, in) float32."""
        return self._turned() - dense_weight(self.linear).astype(mx.float32)

    def fuse(self) -> nn.Linear:
        """Return a dense linear layer with the adapter folded in, in the base's float dtype."""
        return _dense_linear(self.linear, self._turned())


def _dense_linear(base: nn.Module, weight: mx.array) -> nn.Linear:
    """Return a linear layer with this weight, and the base's bias and float dtype."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in base)
    dense.weight = weight.astype(dense_weight(base).dtype)
    if "bias" in base:
        dense.bias = base.bias
    return dense


class LoRAEmbedding(nn.Module):
    """A frozen embedding plus scale * A[tokens] B; as a tied output head it adds scale * (x B^T) A^T.

    `adapts_head = False` leaves the tied head as it was: PEFT adapts the two apart.
    """

    TRAINED = ("lora_a", "lora_b")

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
        z = self.dropout(self.lora_a[tokens].astype(y.dtype))  # (B, T, r)
        return y + z @ (self.scale * self.lora_b).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, vocabulary)
        if not self.adapts_head:
            return y
        z = self.dropout(x) @ (self.scale * self.lora_b).T.astype(x.dtype)  # (B, T, r)
        return y + z @ self.lora_a.T.astype(x.dtype)

    def delta(self) -> mx.array:
        """Return scale * A B, (vocabulary, width) float32."""
        return self.scale * (self.lora_a @ self.lora_b)

    def fuse(self) -> nn.Embedding:
        """Return a dense embedding with the adapter folded in, in the base's float dtype."""
        weight = dense_weight(self.embedding)
        fused = nn.Embedding(*weight.shape)
        fused.weight = (weight.astype(mx.float32) + self.delta()).astype(weight.dtype)
        return fused


ADAPTERS = (LoRALinear, DoRALinear, LoRAEmbedding, LoRASwitchLinear, DoRASwitchLinear)
WITH_DROPOUT_KEY = (LoRALinear, DoRALinear, LoRASwitchLinear, DoRASwitchLinear)
# Form -> the layer for a linear base, an embedding, a mixture's experts.
FORMS = {
    "lora": (LoRALinear, LoRAEmbedding, LoRASwitchLinear),
    "dora": (DoRALinear, None, DoRASwitchLinear),
}
Adapter = LoRALinear | DoRALinear | LoRAEmbedding | LoRASwitchLinear | DoRASwitchLinear


def adapter_class(base: nn.Module, form: str = "lora") -> type[Adapter] | None:
    """Return the layer that wraps `base` in a form of FORMS, or None when none fits it."""
    for kinds, layer in zip((LINEAR, EMBEDDING, SWITCH), FORMS[form], strict=True):
        if isinstance(base, kinds):
            return layer
    return None

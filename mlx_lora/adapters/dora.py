"""DoRA layers over any frozen base: the direction of each row turns by a low-rank update, its length is trained.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: DoRALinear(linear: the same object, lora_a, lora_b, m)

Shapes: r rank; in and out are the base's own widths. Stored names are mlx-lm's.
"""

from __future__ import annotations

from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.parts import Dropout, dense_weight, with_weight


class DoRALinear(nn.Module):
    """A frozen linear layer whose rows turn by a low-rank update and whose row lengths m are trained:

        y = m / |W + D| (W x + D x) + bias,  D = scale (A B)^T

    |W + D| are the row lengths, through which no gradient goes. They come from |W|^2, which never changes, and
    products with the factors, so neither W nor D is made dense:

        |W + D|^2 = |W|^2 + 2 scale sum_r (W A) B^T + scale^2 sum_r (B^T A^T A) B^T      (each per row)

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3 (no gradient through the length).
    """

    RANK_AXES = MappingProxyType({"lora_a": 1, "lora_b": 0})

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

    def plain_factors(self) -> tuple[mx.array, mx.array]:
        """Return the factors as they are stored; `m` is stored beside them."""
        return self.lora_a, self.lora_b

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
        return with_weight(self.linear, self._turned())


class DoRAEmbedding(nn.Module):
    """A frozen embedding whose rows turn by a low-rank update and whose row lengths m are trained, one per token:

        row(t) = m_t / |E_t + D_t| (E_t + D_t),  D = scale A B

    No gradient goes through the lengths. As a tied head it multiplies by these same rows. This is mlx-lm's form;
    PEFT instead has one length per column of an embedding, which is another function.

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
    """

    RANK_AXES = MappingProxyType({"lora_a": 1, "lora_b": 0})

    def __init__(self, embedding: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `embedding`; arguments as in LoRAEmbedding. `m` (vocabulary,) starts as the rows' own lengths, float32."""
        super().__init__()
        self.embedding = embedding
        self.adapts_head = True
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)
        self._squares = mx.square(dense_weight(embedding).astype(mx.float32)).sum(axis=-1)  # (V,)
        self.m = mx.sqrt(self._squares)
        self._kept_lengths: mx.array | None = None
        mx.eval(self._squares, self.m)

    @classmethod
    def from_base(
        cls, base: nn.Module, factors: tuple[mx.array, mx.array], scale: float, dropout: float = 0.0
    ) -> DoRAEmbedding:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)  # (B, T, width)
        z = self.dropout(self.lora_a[tokens].astype(y.dtype))  # (B, T, r)
        turned = y + z @ (self.scale * self.lora_b).astype(y.dtype)
        if self._kept_lengths is not None:
            lengths = self._kept_lengths[tokens]
        else:
            # The rows at hand only: not the whole vocabulary for a few tokens.
            whole = y + (self.lora_a[tokens] @ (self.scale * self.lora_b)).astype(y.dtype)
            lengths = mx.stop_gradient(mx.linalg.norm(whole.astype(mx.float32), axis=-1))
        return turned * (self.m[tokens] / mx.maximum(lengths, 1e-15)).astype(y.dtype)[..., None]

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, V)
        z = self.dropout(x) @ (self.scale * self.lora_b).T.astype(x.dtype)  # (B, T, r)
        lengths = self.row_lengths(x.dtype) if self._kept_lengths is None else self._kept_lengths
        return (y + z @ self.lora_a.T.astype(x.dtype)) * (self.m / lengths).astype(x.dtype)

    def keep_lengths(self) -> None:
        """Compute the lengths once and for all, for an adapter that is no longer trained."""
        self._kept_lengths = self.row_lengths(mx.float32)
        mx.eval(self._kept_lengths)

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |E + D| per row, (V,) float32, without a gradient; the product with E is computed in `dtype`."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = self.embedding.as_linear(b.astype(dtype)).T.astype(mx.float32)  # (V, r)
        squares = self._squares + (self.scale * a * (2 * across + self.scale * a @ (b @ b.T))).sum(axis=-1)
        return mx.sqrt(mx.maximum(squares, 1e-30))

    def plain_factors(self) -> tuple[mx.array, mx.array]:
        """Return the factors as they are stored; `m` is stored beside them."""
        return self.lora_a, self.lora_b

    def _turned(self) -> mx.array:
        turned = dense_weight(self.embedding).astype(mx.float32) + self.scale * (self.lora_a @ self.lora_b)
        return turned * (self.m / mx.maximum(mx.linalg.norm(turned, axis=-1), 1e-15))[:, None]

    def delta(self) -> mx.array:
        """Return what the adapter adds to the weight, (vocabulary, width) float32."""
        return self._turned() - dense_weight(self.embedding).astype(mx.float32)

    def fuse(self) -> nn.Embedding:
        """Return a dense embedding with the adapter folded in, in the base's float dtype."""
        return with_weight(self.embedding, self._turned())

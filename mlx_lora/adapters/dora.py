"""DoRA layers: a low-rank update changes the direction of each row of a frozen weight, and its length is trained.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: DoRALinear(linear: the same object, lora_a, lora_b, m)

Shapes: B batch, T time, V vocabulary, r rank; in and out are the base's widths. Stored names are mlx-lm's.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.adapter_layer import AdapterLayer
from mlx_lora.adapters.parts import EMBEDDING, LINEAR


class DoRALayer(AdapterLayer):
    """The common part of all DoRA layers: the trained lengths, and the adapted weight.

        W' = m / |W + D| (W + D),  D = scale A B, |.| the length of each row

    `m` is initialized to the rows' lengths, float32: (out,), (vocabulary,) or (E, out).
    """

    LAYER_TYPE = "dora"
    BESIDE = ("m",)
    KEEPS_PRODUCT = True
    NOT_IN_GGUF = "is a DoRA layer"

    def __init__(self, base: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `base`; arguments as in AdapterLayer."""
        super().__init__(base, lora_a, lora_b, scale, dropout)
        self._squares = mx.square(self.weight).sum(axis=-1)
        self.m = mx.sqrt(self._squares)
        self._kept_lengths: mx.array | None = None
        mx.eval(self._squares, self.m)

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |W + D| in the shape of m, float32, without gradient; products with W are computed in `dtype`."""
        raise NotImplementedError

    def lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return `row_lengths`, newly computed or as kept by `finish`."""
        return self.row_lengths(dtype) if self._kept_lengths is None else self._kept_lengths

    def finish(self) -> None:
        """Compute |W + D| once, because generation calls the layer for every token."""
        self._kept_lengths = self.row_lengths(mx.float32)
        mx.eval(self._kept_lengths)

    def merged(self) -> mx.array:
        """Return the adapted weight, float32."""
        turned = self.weight + self.product()
        return turned * (self.m / mx.maximum(mx.linalg.norm(turned, axis=-1), 1e-15))[..., None]

    def delta(self) -> mx.array:
        """Return the change of the weight, float32."""
        return self.merged() - self.weight


class DoRALinear(DoRALayer):
    """A frozen linear layer with a low-rank update of its rows' directions and trained row lengths m:

        y = m / |W + D| (W x + D x) + bias,  D = scale (A B)^T

    |W + D| are the row lengths, which get no gradient. They are computed from |W|^2, which never changes, and
    products with the factors, so neither a dense W nor D is needed:

        |W + D|^2 = |W|^2 + 2 scale sum_r (W A) B^T + scale^2 sum_r (B^T A^T A) B^T      (each per row)

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3 (no gradient through the length).
    """

    OVER = LINEAR
    NOT_IN_PEFT = NOT_FOR_A_ROW = None

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Apply the layer; arguments as in LoRALinear."""
        z = self.dropout(x, key) @ self.lora_a.astype(x.dtype)  # (..., r)
        y = mx.addmm(self._without_bias(x), z, (self.scale * self.lora_b).astype(x.dtype))  # (..., out)
        y = y * (self.m / self.lengths(x.dtype)).astype(x.dtype)
        return y + self.linear.bias if "bias" in self.linear else y

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |W + D|, (out,)."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = self._without_bias(a.T.astype(dtype)).astype(mx.float32)  # (r, out)
        squares = self._squares + (self.scale * b * (2 * across + self.scale * (a.T @ a) @ b)).sum(axis=0)
        return mx.sqrt(mx.maximum(squares, 1e-30))

    def _without_bias(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return y - self.linear.bias if "bias" in self.linear else y

    def to_peft(self, name: str, row_factors: mx.array | None, tied: bool) -> dict[str, dict[str, mx.array]]:
        """Return the factors and the lengths in PEFT's format."""
        own = super().to_peft(name, row_factors, tied)[name]
        return {name: {**own, "lora_magnitude_vector": self.m if row_factors is None else self.m / row_factors[:, 0]}}

    def serving_factors(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array | None]:
        """Return the arrays for a row of a served batch; the gains are m / |W + D|."""
        a, b, _ = super().serving_factors(dtype)
        return a, b, (self.m / self.row_lengths(mx.float32)).astype(dtype)


class DoRAEmbedding(DoRALayer):
    """A frozen embedding with a low-rank update of its rows' directions and trained row lengths m, one per token:

        row(t) = m_t / |E_t + D_t| (E_t + D_t),  D = scale A B

    The lengths |E + D| get no gradient. As a tied head it multiplies by the same rows, as in mlx-lm;
    PEFT has one length per column of an embedding instead, which is another function.

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
    """

    OVER = EMBEDDING
    NOT_IN_PEFT = "is a DoRA with a length for each token, while PEFT's has one for each column"
    NOT_IN_GGUF = "is an embedding"
    NOT_FOR_A_ROW = "is a DoRA over an embedding"

    def __call__(self, tokens: mx.array, key: mx.array | None = None) -> mx.array:
        """Look up tokens; arguments as in LoRAEmbedding."""
        y = self.embedding(tokens)  # (B, T, width)
        z = self.dropout(self.lora_a[tokens].astype(y.dtype), key)  # (B, T, r)
        turned = y + z @ (self.scale * self.lora_b).astype(y.dtype)
        if self._kept_lengths is not None:
            lengths = self._kept_lengths[tokens]
        else:
            # Only these tokens' rows, not the whole vocabulary.
            whole = y + (self.lora_a[tokens] @ (self.scale * self.lora_b)).astype(y.dtype)
            lengths = mx.stop_gradient(mx.linalg.norm(whole.astype(mx.float32), axis=-1))
        return turned * (self.m[tokens] / mx.maximum(lengths, 1e-15)).astype(y.dtype)[..., None]

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, V)
        z = self.dropout(x) @ (self.scale * self.lora_b).T.astype(x.dtype)  # (B, T, r)
        return (y + z @ self.lora_a.T.astype(x.dtype)) * (self.m / self.lengths(x.dtype)).astype(x.dtype)

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |E + D| per row, (V,)."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = self.embedding.as_linear(b.astype(dtype)).T.astype(mx.float32)  # (V, r)
        squares = self._squares + (self.scale * a * (2 * across + self.scale * a @ (b @ b.T))).sum(axis=-1)
        return mx.sqrt(mx.maximum(squares, 1e-30))

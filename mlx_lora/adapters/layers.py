"""LoRA layers over a frozen linear layer or embedding, quantized or not."""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.adapters.adapter_layer import AdapterLayer
from mlx_lora.adapters.parts import EMBEDDING, LINEAR


class LoRALinear(AdapterLayer):
    """A frozen linear layer plus scale * (x A) B."""

    LAYER_TYPE, OVER = "lora", LINEAR
    NOT_IN_PEFT = NOT_IN_GGUF = NOT_FOR_A_ROW = None

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Apply the layer.

        Args:
            x: (..., in).
            key: random key of the dropout; None: a new one is drawn.
        """
        y = self.linear(x)  # (..., out)
        a, b = self.called_factors()
        z = self.dropout(x, key) @ a.astype(x.dtype)  # (..., r)
        # This takes one pass over the output instead of two.
        y = mx.addmm(y, z, (self.scale * b).astype(x.dtype))
        if "fixed_a" not in self:
            return y
        a, b = self.called_fixed()
        return mx.addmm(y, x @ a.astype(x.dtype), b.astype(x.dtype))


class LoRAEmbedding(AdapterLayer):
    """A frozen embedding plus scale * A[tokens] B; as a tied output head it adds scale * (x B^T) A^T.

    With `adapts_head = False` the tied head is not adapted: PEFT adapts the two separately.
    """

    LAYER_TYPE, OVER = "lora", EMBEDDING
    NOT_IN_PEFT = NOT_FOR_A_ROW = None
    NOT_IN_GGUF = "is an embedding"

    def __call__(self, tokens: mx.array, key: mx.array | None = None) -> mx.array:
        """Look up tokens (B, T); `key` is the random key of the dropout; None: a new one is drawn."""
        y = self.embedding(tokens)  # (B, T, width)
        a, b = self.effective_factors()
        z = self.dropout(a[tokens].astype(y.dtype), key)  # (B, T, r)
        y = y + z @ (self.scale * b).astype(y.dtype)
        return y + (self.fixed_a[tokens] @ self.fixed_b).astype(y.dtype) if "fixed_a" in self else y

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, vocabulary)
        if not self.adapts_head:
            return y
        a, b = self.effective_factors()
        z = self.dropout(x) @ (self.scale * b).T.astype(x.dtype)  # (B, T, r)
        y = y + z @ a.T.astype(x.dtype)
        if "fixed_a" not in self:
            return y
        return y + (x @ self.fixed_b.T.astype(x.dtype)) @ self.fixed_a.T.astype(x.dtype)

    def to_peft(self, name: str, row_factors: mx.array | None, tied: bool) -> dict[str, dict[str, mx.array]]:
        """Return the tensors in PEFT's format; it adapts a tied head separately, so the head gets a copy of the factors."""
        ((a, b),) = (own.values() for own in super().to_peft(name, row_factors, tied).values())
        head = {"lm_head": {"lora_A.weight": b.T, "lora_B.weight": a.T}} if tied and self.adapts_head else {}
        return {name: {"lora_embedding_A": a, "lora_embedding_B": b}, **head}

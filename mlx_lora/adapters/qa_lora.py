"""QA-LoRA: low-rank layers whose update merges into the biases of a quantized base, so that fusing changes no packed number.

MLX's affine weights have a scale and a bias for every group of g numbers of a row:

    w[o, i] = scales[o, i // g] * q[o, i] + biases[o, i // g]

An update D that is constant within each group, D[o, i] = d[o, i // g], changes only the biases, by d. This layer's A reads
the sum of its input over each group, so that its D has that form:

    y = W x + scale * (P x) A B,   (P x)[j] = sum of x over group j      A: (G, r), B: (r, out), d = scale (A B)^T

The stored factors are those of an ordinary LoRA: each row of A is repeated for all inputs of its group. So mlx-lm, PEFT and
llama.cpp load them, and whoever finds rows that are constant within the base's groups can fuse them exactly
(`group_update`). For an embedding, whose rows are divided into groups along its width, B is summed instead:

    row(t) = E_t + scale * A_t repeat(B)      B: (r, G);      as a tied head: scale * (P x) B^T A^T

Shapes: G groups of a row, g numbers of a group, E experts, r rank, N rows (a token has one for each of its experts).
Source: QA-LoRA, arXiv 2309.14717, section 3.3 and algorithm 1.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDING, LINEAR, QUANTIZED, SWITCH, AdapterLayer, Factors, base_dims
from mlx_lora.adapters.lora import through_experts
from mlx_lora.models.quantize import AFFINE


class QALoRALayer(AdapterLayer):
    """The common part: what is stored, and which bases have biases to merge into."""

    LAYER_TYPE, STORED_TYPE = "qa-lora", "lora"
    NOT_IN_PEFT = NOT_IN_GGUF = NOT_FOR_A_ROW = None

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        if not isinstance(base, QUANTIZED):
            return "is not quantized; use --method lora, which fuses without loss there, or leave it out of --target-modules"
        if base.mode != AFFINE:
            return (
                f"is in {base.mode}, which has no biases to merge into; convert the model with --bits 4 (affine), or use "
                "--method lora --qat"
            )
        return None

    @classmethod
    def factor_dims(cls, base: nn.Module) -> tuple[int, int]:
        width, out = base_dims(base)
        return (width, out // base.group_size) if cls.OVER is EMBEDDING else (width // base.group_size, out)

    @classmethod
    def initial_gain(cls, base: nn.Module) -> float:
        # The sum of a group is as large as the root of its size; with LoRA's rates, a larger A learns too fast.
        return 1.0 if cls.OVER is EMBEDDING else base.group_size**-0.5

    @property
    def dims(self) -> tuple[int, int]:
        return base_dims(self.base)

    @property
    def grouped(self) -> tuple[str, int]:
        """The factor that has a row for each group instead of each feature, and its axis of groups."""
        if self.OVER is EMBEDDING:
            return "lora_b", 1
        return "lora_a", 2 if self.OVER is SWITCH else 0

    def effective_factors(self) -> Factors:
        a, b = super().effective_factors()
        _, axis = self.grouped
        if self.OVER is EMBEDDING:
            return a, mx.repeat(b, self.base.group_size, axis)
        return mx.repeat(a, self.base.group_size, axis), b

    def stored_shape(self, name: str) -> tuple[int, ...]:
        shape = list(self[name].shape)
        if name == self.grouped[0]:
            shape[self.grouped[1]] *= self.base.group_size
        return tuple(shape)

    def from_stored(self, name: str, array: mx.array) -> mx.array:
        if name != self.grouped[0]:
            return array
        axis = self.grouped[1]
        kept = array[(slice(None),) * axis + (slice(None, None, self.base.group_size),)]
        if not mx.array_equal(mx.repeat(kept, self.base.group_size, axis), array).item():
            raise ValueError(
                f"{name} differs within groups of {self.base.group_size} numbers: it was not trained with --method qa-lora"
            )
        return kept

    def pooled(self, x: mx.array) -> mx.array:
        """Return the sums of x over the base's groups, (..., in) -> (..., G)."""
        return x.reshape(*x.shape[:-1], -1, self.base.group_size).sum(axis=-1)


class QALoRALinear(QALoRALayer):
    """A frozen quantized linear layer plus scale * (P x) A B, with A (G, r)."""

    OVER = LINEAR

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Apply the layer; arguments as in LoRALinear."""
        return self.onto(self.linear(x), x, key)

    def onto(self, y: mx.array, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Return the layer's output, given the base's, y (..., out)."""
        z = self.pooled(self.dropout(x, key)) @ self.lora_a.astype(x.dtype)  # (..., r)
        return mx.addmm(y, z, (self.scale * self.lora_b).astype(x.dtype))


class QALoRAEmbedding(QALoRALayer):
    """A frozen quantized embedding plus scale * A_t repeat(B), with B (r, G); as a tied head scale * (P x) B^T A^T."""

    OVER = EMBEDDING
    NOT_IN_GGUF = "is an embedding"

    def __call__(self, tokens: mx.array, key: mx.array | None = None) -> mx.array:
        """Look up tokens (B, T); `key` is the random key of the dropout; None: a new one is drawn."""
        y = self.embedding(tokens)  # (B, T, width)
        z = self.dropout(self.lora_a[tokens].astype(y.dtype), key)  # (B, T, r)
        return y + mx.repeat(z @ (self.scale * self.lora_b).astype(y.dtype), self.base.group_size, axis=-1)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, vocabulary)
        if not self.adapts_head:
            return y
        z = self.pooled(self.dropout(x)) @ (self.scale * self.lora_b).T.astype(x.dtype)  # (B, T, r)
        return y + z @ self.lora_a.T.astype(x.dtype)


class QALoRASwitchLinear(QALoRALayer):
    """Frozen quantized experts plus, for expert e, scale * (P x A_e^T) B_e^T, with A_e (r, G)."""

    OVER = SWITCH
    NOT_FOR_A_ROW = "adapts a mixture's experts"

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, key: mx.array | None = None
    ) -> mx.array:
        """Apply its expert to each row; arguments and result as in LoRASwitchLinear."""
        through = partial(through_experts, indices=indices, sorted_indices=sorted_indices)
        z = through(self.pooled(self.dropout(x, key)), self.lora_a)  # (N, 1, r)
        return self.linear(x, indices, sorted_indices=sorted_indices) + through(z, self.scale * self.lora_b)


def group_update(layer: AdapterLayer) -> mx.array | None:
    """Return what an adapter adds to the biases of its quantized base; None if its update has another form.

    The factors decide, not the method: a stored QA-LoRA is read as a LoRA.

    Args:
        layer: of any type.

    Returns:
        float32 in the biases' shape, (out, G), (vocabulary, G) or (E, out, G); None if the base has no biases, or the
        update is not constant within its groups.
    """
    base = layer.base
    if not isinstance(base, QUANTIZED) or "biases" not in base or layer.BESIDE:
        return None
    a, b = layer.plain_factors()
    size, embeds = base.group_size, layer.OVER is EMBEDDING
    grouped, axis = (b, 1) if embeds else (a, 2 if layer.OVER is SWITCH else 0)
    kept = grouped[(slice(None),) * axis + (slice(None, None, size),)]
    if not mx.array_equal(mx.repeat(kept, size, axis), grouped).item():
        return None
    if layer.OVER is SWITCH:
        return layer.scale * (b @ kept)  # (E, out, r), (E, r, G)
    return layer.scale * (a @ kept if embeds else (kept @ b).T)

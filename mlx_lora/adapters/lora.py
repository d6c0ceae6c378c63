"""LoRA and DoRA layers over a frozen linear layer, an embedding or a mixture's experts, quantized or not.

    before   self_attn.q_proj: Linear | QuantizedLinear
    LoRA     self_attn.q_proj: LoRALinear(linear: the same object, lora_a, lora_b)
    DoRA     self_attn.q_proj: DoRALinear(linear: the same object, lora_a, lora_b, m)

    before   mlp.switch_mlp.up_proj: SwitchLinear | QuantizedSwitchLinear
    LoRA     mlp.switch_mlp.up_proj: LoRASwitchLinear(linear: the same object, lora_a, lora_b)

In DoRA, the low-rank update changes the direction of each row of a frozen weight, and the row's length is trained. Experts
have one pair of factors each. `REGISTRY` has the class for each layer type and kind of base.

mlx-lm sorts the rows of experts if there are 64 or more (`sorted_indices`); then x is (N, 1, in) and indices (N,).
For fewer rows x is (B, T, 1, 1, in) and indices (B, T, k), with the same x for a token's k experts.

Shapes: B batch, T time, V vocabulary, E experts, N rows (a token has one for each expert it is sent to), r rank; in and out
are the base's widths. Stored names are mlx-lm's. `lora_a` is (in, r) and `lora_b` (r, out); for experts they are the
transposes, (E, r, in) and (E, out, r).

QA-LoRA: low-rank layers whose update merges into the biases of a quantized base, so that fusing changes no packed number.

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
from mlx_lora.models.quantize import AFFINE

# LoRA


class LoRALinear(AdapterLayer):
    """A frozen linear layer plus scale * (x A) B."""

    LAYER_TYPE, OVER = "lora", LINEAR
    CAST_ONCE = True
    NOT_IN_PEFT = NOT_IN_GGUF = NOT_FOR_A_ROW = None

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Apply the layer.

        Args:
            x: (..., in).
            key: random key of the dropout; None: a new one is drawn.
        """
        return self.onto(self.linear(x), x, key)

    def onto(self, y: mx.array, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Return the layer's output, given the base's, y (..., out)."""
        a, b = self.effective_factors()
        z = self.dropout(x, key) @ a.astype(x.dtype)  # (..., r)
        # This takes one pass over the output instead of two.
        y = mx.addmm(y, z, self.times_scale(b).astype(x.dtype))
        if "fixed_a" not in self:
            return y
        a, b = self.fixed_a, self.fixed_b
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
        y = mx.addmm(y, z, a.T.astype(x.dtype))  # one array of logits less than a sum
        if "fixed_a" not in self:
            return y
        return y + (x @ self.fixed_b.T.astype(x.dtype)) @ self.fixed_a.T.astype(x.dtype)

    def to_peft(self, name: str, row_factors: mx.array | None, tied: bool) -> dict[str, dict[str, mx.array]]:
        """Return the tensors in PEFT's format; it adapts a tied head separately, so the head gets a copy of the factors."""
        ((a, b),) = (own.values() for own in super().to_peft(name, row_factors, tied).values())
        head = {"lm_head": {"lora_A.weight": b.T, "lora_B.weight": a.T}} if tied and self.adapts_head else {}
        return {name: {"lora_embedding_A": a, "lora_embedding_B": b}, **head}


class LoRASwitchLinear(AdapterLayer):
    """Frozen experts plus, for expert e, scale * (x A_e^T) B_e^T.

    The arrays of other methods have the experts' axis first: `lora_e` is (E, r).

    Source: LoRA, arXiv 2106.09685, eq. 3; a pair per expert as in "LoRA Without Regret" (2025).
    """

    LAYER_TYPE, OVER = "lora", SWITCH
    CAST_ONCE = True
    NOT_IN_PEFT = NOT_IN_GGUF = None
    NOT_FOR_A_ROW = "adapts a mixture's experts"

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, key: mx.array | None = None
    ) -> mx.array:
        """Apply its expert to each row.

        Args:
            x: (N, 1, in), or (..., 1, 1, in) with the experts in the last axis of `indices`.
            indices: (N,) or (..., k), the expert of each row.
            sorted_indices: whether they ascend.
            key: random key of the dropout; None: a new one is drawn.

        Returns:
            (N, 1, out) or (..., k, 1, out).
        """
        through = partial(through_experts, indices=indices, sorted_indices=sorted_indices)
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        a, b = self.effective_factors()
        z = through(self.dropout(x, key), a)  # (N, 1, r)
        y = y + through(z, self.times_scale(b))
        if "fixed_a" in self:
            a, b = self.fixed_a, self.fixed_b
            y = y + through(through(x, a), b)
        return y


# DoRA


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
        lengths = mx.stop_gradient(mx.maximum(mx.linalg.norm(turned, axis=-1), 1e-15))
        return turned * (self.m / lengths)[..., None]

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
        return self.onto(self.linear(x), x, key)

    def onto(self, y: mx.array, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Return the layer's output, given the base's, y (..., out)."""
        y = y - self.linear.bias if "bias" in self.linear else y
        z = self.dropout(x, key) @ self.lora_a.astype(x.dtype)  # (..., r)
        y = mx.addmm(y, z, (self.scale * self.lora_b).astype(x.dtype))  # (..., out)
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
        lengths = self.m if row_factors is None else self.m / row_factors[:, 0]
        # PEFT itself writes the name without `.weight` and reads both; transformers finds only this one.
        return {name: {**own, "lora_magnitude_vector.weight": lengths}}

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


class DoRASwitchLinear(DoRALayer):
    """Frozen experts with low-rank updates of their rows' directions and trained row lengths m.

    As DoRALinear, for each expert: y = m / |W + D| (W x + D x) + bias, with no gradient through |W + D|.
    mlx-lm has no such layer and cannot load these adapters; to use one there, fuse it.

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
    """

    OVER = SWITCH
    NOT_IN_PEFT = "is a DoRA over experts, which PEFT does not have"
    NOT_FOR_A_ROW = "adapts a mixture's experts"

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, key: mx.array | None = None
    ) -> mx.array:
        """Apply its expert to each row; arguments and result as in LoRASwitchLinear."""
        through = partial(through_experts, indices=indices, sorted_indices=sorted_indices)
        z = through(self.dropout(x, key), self.lora_a)  # (N, 1, r)
        y = self._without_bias(x, indices, sorted_indices) + through(z, self.scale * self.lora_b)  # (N, 1, out)
        y = y * _rows_of((self.m / self.lengths(x.dtype)).astype(x.dtype), indices)
        return y + _rows_of(self.linear.bias, indices) if "bias" in self.linear else y

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |W + D|, (E, out)."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b).swapaxes(-1, -2)  # b: (E, r, out)
        every = mx.arange(a.shape[0])
        across = self._without_bias(a.astype(dtype), every, True).astype(mx.float32)  # (E, r, out)
        gram = a @ a.swapaxes(-1, -2)  # (E, r, r)
        squares = self._squares + (self.scale * b * (2 * across + self.scale * (gram @ b))).sum(axis=1)
        return mx.sqrt(mx.maximum(squares, 1e-30))

    def _without_bias(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y - _rows_of(self.linear.bias, indices) if "bias" in self.linear else y


# Rows of experts


def through_experts(x: mx.array, weight: mx.array, *, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Return x W_e^T, where e is the expert of each row; weight (E, out, in) is cast to x's dtype."""
    transposed = weight.astype(x.dtype).swapaxes(-1, -2)
    return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=sorted_indices)


def _rows_of(values: mx.array, indices: mx.array) -> mx.array:
    """Return the values of each row's expert, (E, out) -> (N, 1, out) or (..., k, 1, out)."""
    return mx.expand_dims(values[indices], -2)


# QA-LoRA


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

"""LoRA and DoRA layers over a mixture's experts, with one pair of factors for each expert.

    before   mlp.switch_mlp.up_proj: SwitchLinear | QuantizedSwitchLinear
    after    mlp.switch_mlp.up_proj: LoRASwitchLinear(linear: the same object, lora_a, lora_b)

Shapes: E experts, N rows (a token has one for each expert it is sent to), r rank; in and out are the base's widths.
`lora_a` is (E, r, in) and `lora_b` (E, out, r), the transposes of a plain layer's.

mlx-lm sorts the rows by expert if there are 64 or more (`sorted_indices`); then x is (N, 1, in) and indices (N,).
For fewer rows x is (B, T, 1, 1, in) and indices (B, T, k), with the same x for a token's k experts.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from mlx_lora.adapters.adapter_layer import AdapterLayer
from mlx_lora.adapters.dora import DoRALayer
from mlx_lora.adapters.parts import SWITCH


class LoRASwitchLinear(AdapterLayer):
    """Frozen experts plus, for expert e, scale * (x A_e^T) B_e^T.

    The arrays of other methods have the experts' axis first: `lora_e` is (E, r).

    Source: LoRA, arXiv 2106.09685, eq. 3; a pair per expert as in "LoRA Without Regret" (2025).
    """

    LAYER_TYPE, OVER = "lora", SWITCH
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
        through = partial(_through_experts, indices=indices, sorted_indices=sorted_indices)
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        a, b = self.called_factors()
        z = through(self.dropout(x, key), a)  # (N, 1, r)
        y = y + through(z, self.scale * b)
        if "fixed_a" in self:
            a, b = self.called_fixed()
            y = y + through(through(x, a), b)
        return y


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
        through = partial(_through_experts, indices=indices, sorted_indices=sorted_indices)
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


def _through_experts(x: mx.array, weight: mx.array, *, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Return x W_e^T, where e is the expert of each row; weight (E, out, in) is cast to x's dtype."""
    transposed = weight.astype(x.dtype).swapaxes(-1, -2)
    return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=sorted_indices)


def _rows_of(values: mx.array, indices: mx.array) -> mx.array:
    """Return the values of each row's expert, (E, out) -> (N, 1, out) or (..., k, 1, out)."""
    return mx.expand_dims(values[indices], -2)

"""LoRA and DoRA layers over the experts of a mixture: one pair of factors for each expert.

    before   mlp.switch_mlp.up_proj: SwitchLinear | QuantizedSwitchLinear
    after    mlp.switch_mlp.up_proj: LoRASwitchLinear(linear: the same object, lora_a, lora_b)

Shapes: E experts, N rows (a token once for each expert it is sent to), r rank; in and out are the base's own
widths. The factors are float32 masters in mlx-lm's names and orientation, `lora_a` (E, r, in) and `lora_b`
(E, out, r), the transposes of a plain layer's; they are cast to the activation's dtype inside the call.

mlx-lm sorts the rows by expert when there are 64 or more (`sorted_indices`), and then x is (N, 1, in) and
indices (N,); fewer come as x (B, T, 1, 1, in) and indices (B, T, k), the same x for a token's k experts.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters.layers import effective_factors, joined_factors, merge_factors
from mlx_lora.adapters.parts import Dropout, dense_weight, with_weight


class LoRASwitchLinear(nn.Module):
    """Frozen experts plus, for expert e, scale * (x A_e^T) B_e^T.

    The extras of other methods are those of layers.py: `lora_e` (E, r), `start_a`, `start_b`, `fixed_a`, `fixed_b`.

    Source: LoRA, arXiv 2106.09685, eq. 3; a pair per expert as in "LoRA Without Regret" (2025).
    """

    RANK_AXES = MappingProxyType({"lora_a": 1, "lora_b": 2})

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `linear`.

        Args:
            linear: mlx-lm's SwitchLinear or QuantizedSwitchLinear; kept as it is.
            lora_a: (E, r, in) float32.
            lora_b: (E, out, r) float32.
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
    ) -> LoRASwitchLinear:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, key: mx.array | None = None
    ) -> mx.array:
        """Apply to each row its expert.

        Args:
            x: (N, 1, in), or (..., 1, 1, in) with the experts in the last axis of `indices`.
            indices: (N,) or (..., k), which expert.
            sorted_indices: whether they ascend.
            key: of the dropout; drawn here when None.

        Returns:
            (N, 1, out) or (..., k, 1, out).
        """
        through = partial(_through_experts, indices=indices, sorted_indices=sorted_indices)
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        a, b = effective_factors(self)
        z = through(self.dropout(x, key), a)  # (N, 1, r)
        y = y + through(z, self.scale * b)
        if "fixed_a" in self:
            y = y + through(through(x, self.fixed_a), self.fixed_b)
        return y

    def plain_factors(self) -> tuple[mx.array, mx.array]:
        """Return one pair (E, R, in), (E, out, R) float32 with delta = scale * B A."""
        return joined_factors(self)

    def merge(self, a: mx.array, b: mx.array) -> None:
        """Freeze a cycle's factors beside the base (ReLoRA)."""
        merge_factors(self, a, b)

    def delta(self) -> mx.array:
        """Return scale * B A, (E, out, in) float32: what the adapter adds to the experts' weights."""
        a, b = self.plain_factors()
        return self.scale * (b @ a)

    def fuse(self) -> SwitchLinear:
        """Return dense experts with the adapter folded in, in the base's float dtype."""
        return with_weight(self.linear, dense_weight(self.linear).astype(mx.float32) + self.delta())


class DoRASwitchLinear(nn.Module):
    """Frozen experts whose rows turn by low-rank updates and whose row lengths m are trained.

    As DoRALinear, for each expert apart: y = m / |W + D| (W x + D x) + bias, no gradient through |W + D|.
    mlx-lm has no such layer, so it cannot load these adapters; fuse them for it.

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
    """

    RANK_AXES = MappingProxyType({"lora_a": 1, "lora_b": 2})

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        """Wrap `linear`; arguments as in LoRASwitchLinear. `m` (E, out) starts as the rows' own lengths, float32."""
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)
        self._squares = mx.square(dense_weight(linear).astype(mx.float32)).sum(axis=-1)  # (E, out)
        self.m = mx.sqrt(self._squares)
        self._kept_lengths: mx.array | None = None
        mx.eval(self._squares, self.m)

    @classmethod
    def from_base(
        cls, base: nn.Module, factors: tuple[mx.array, mx.array], scale: float, dropout: float = 0.0
    ) -> DoRASwitchLinear:
        """Wrap `base` with the factors (lora_a, lora_b)."""
        return cls(base, *factors, scale, dropout)

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, key: mx.array | None = None
    ) -> mx.array:
        """Apply to each row its expert; arguments and result as in LoRASwitchLinear."""
        through = partial(_through_experts, indices=indices, sorted_indices=sorted_indices)
        z = through(self.dropout(x, key), self.lora_a)  # (N, 1, r)
        y = self._without_bias(x, indices, sorted_indices) + through(z, self.scale * self.lora_b)  # (N, 1, out)
        lengths = self.row_lengths(x.dtype) if self._kept_lengths is None else self._kept_lengths
        y = y * _rows_of((self.m / lengths).astype(x.dtype), indices)
        return y + _rows_of(self.linear.bias, indices) if "bias" in self.linear else y

    def keep_lengths(self) -> None:
        """Compute |W + D| once and for all, for an adapter that is no longer trained: generation calls per token."""
        self._kept_lengths = self.row_lengths(mx.float32)
        mx.eval(self._kept_lengths)

    def row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Return |W + D|, (E, out) float32, without a gradient; the product with W is computed in `dtype`."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b).swapaxes(-1, -2)  # b: (E, r, out)
        every = mx.arange(a.shape[0])
        across = self._without_bias(a.astype(dtype), every, True).astype(mx.float32)  # (E, r, out)
        gram = a @ a.swapaxes(-1, -2)  # (E, r, r)
        squares = self._squares + (self.scale * b * (2 * across + self.scale * (gram @ b))).sum(axis=1)
        return mx.sqrt(mx.maximum(squares, 1e-30))

    def _without_bias(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y - _rows_of(self.linear.bias, indices) if "bias" in self.linear else y

    def plain_factors(self) -> tuple[mx.array, mx.array]:
        """Return the factors as they are stored; `m` is stored beside them."""
        return self.lora_a, self.lora_b

    def _turned(self) -> mx.array:
        """Return m / |W + D| (W + D), (E, out, in) float32."""
        turned = dense_weight(self.linear).astype(mx.float32) + self.scale * (self.lora_b @ self.lora_a)
        return turned * (self.m / mx.linalg.norm(turned, axis=-1))[..., None]

    def delta(self) -> mx.array:
        """Return what the adapter adds to the experts' weights, (E, out, in) float32."""
        return self._turned() - dense_weight(self.linear).astype(mx.float32)

    def fuse(self) -> SwitchLinear:
        """Return dense experts with the adapter folded in, in the base's float dtype."""
        return with_weight(self.linear, self._turned())


def _through_experts(x: mx.array, weight: mx.array, *, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Return x W_e^T, e the expert of each row; weight (E, out, in) is cast to x's dtype."""
    transposed = weight.astype(x.dtype).swapaxes(-1, -2)
    return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=sorted_indices)


def _rows_of(values: mx.array, indices: mx.array) -> mx.array:
    """Return each row's expert's values, (E, out) -> (N, 1, out) or (..., k, 1, out)."""
    return mx.expand_dims(values[indices], -2)

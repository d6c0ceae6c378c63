"""Layers that apply to each row of a batch its own adapter, or none.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: RoutedLinear(linear: the same object), with all adapters' factors in separate pools

The pools' `Routing` has each row's adapter. A layer that no row's adapter uses computes only the base layer.

Shapes: B rows, T tokens, n rows of one pool, r rank; in and out are the base's widths.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_lora.adapters.parts import EMBEDDING
from mlx_lora.serving.pools import Group, LayerPools, Routing


class RoutedLinear(nn.Module):
    """A frozen linear layer plus, for row i, (x_i A) B of the row's adapter, times its gain for a DoRA."""

    def __init__(self, linear: nn.Module, routing: Routing):
        super().__init__()
        self.linear = linear
        self.pools = LayerPools(routing)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer.

        Args:
            x: (..., in); the first axis has the batch's rows, or is flattened from them and more axes.
        """
        y = self.linear(x)  # (..., out)
        for group in self.pools.groups():
            y = self._applied(group, x, y)
        return y

    def _applied(self, group: Group, x: mx.array, y: mx.array) -> mx.array:
        bias = self.linear.bias if "bias" in self.linear else None
        if group.one:
            if group.gain is None:
                return mx.addmm(y, x @ group.a, group.b)
            plain = y if bias is None else y - bias
            turned = mx.addmm(plain, x @ group.a, group.b) * group.gain
            return turned if bias is None else turned + bias
        shape, count = y.shape, len(self.pools.routing.rows)
        x, y = x.reshape(count, -1, x.shape[-1]), y.reshape(count, -1, shape[-1])  # (B, T, in), (B, T, out)
        added = gathered(gathered(x, group.a, group.slots, group.rows), group.b, group.slots)  # (n, T, out)
        if group.gain is not None:
            # gain (W x + D x) + bias = y + (gain - 1) (y - bias) + gain D x
            own = y if group.rows is None else y[group.rows]
            gain = group.gain[group.slots][:, None]  # (n, 1, out)
            added = added * gain + (own if bias is None else own - bias) * (gain - 1)
        y = y + added if group.rows is None else y.at[group.rows].add(added)
        return y.reshape(shape)


class RoutedEmbedding(nn.Module):
    """A frozen embedding plus A[tokens] B of each row's adapter; as a tied output head it adds (x B^T) A^T."""

    def __init__(self, embedding: nn.Module, routing: Routing):
        super().__init__()
        self.embedding = embedding
        self.pools = LayerPools(routing)

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)  # (B, T, width)
        for group in self.pools.groups():
            if group.one:
                y = mx.addmm(y, group.a[tokens], group.b)
                continue
            own = tokens if group.rows is None else tokens[group.rows]  # (n, T)
            count, vocabulary, rank = group.a.shape
            rows_of_a = group.a.reshape(count * vocabulary, rank)
            z = rows_of_a[group.slots[:, None] * vocabulary + own.astype(mx.uint32)]  # (n, T, r)
            y = added_to(y, gathered(z, group.b, group.slots), group.rows)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)  # (B, T, vocabulary)
        for group in self.pools.groups():
            if not group.kind.adapts_head:
                continue
            if group.one:
                y = mx.addmm(y, x @ group.b.T, group.a.T)
                continue
            z = gathered(x, group.b.swapaxes(1, 2), group.slots, group.rows)  # (n, T, r)
            y = added_to(y, gathered(z, group.a.swapaxes(1, 2), group.slots), group.rows)
        return y


def gathered(x: mx.array, stack: mx.array, slots: mx.array, rows: mx.array | None = None) -> mx.array:
    """Return each row i of x times the matrix of its slot.

    Args:
        x: (n, T, in), or (B, T, in) with `rows`.
        stack: (N, in, out).
        slots: (n,).
        rows: (n,), indices of rows of x; None: all rows in order.

    Returns:
        (n, T, out).
    """
    return mx.gather_mm(x, stack, lhs_indices=rows, rhs_indices=slots)


def added_to(y: mx.array, added: mx.array, rows: mx.array | None) -> mx.array:
    """Return y (B, ...) plus `added` (n, ...) at `rows`, or at all rows."""
    return y + added if rows is None else y.at[rows].add(added)


ROUTED = (RoutedLinear, RoutedEmbedding)


def route(model: nn.Module, paths: list[str], routing: Routing) -> dict[str, nn.Module]:
    """Replace the layers at `paths` by routed ones, unless they already are, and return them by path.

    Args:
        model: the served model, which is changed in place.
        paths: linear layers and embeddings, quantized or not.
        routing: shared by all of them.
    """
    modules = dict(model.named_modules())
    routed = {path: modules[path] for path in paths}
    fresh = {path: _routed(module, routing) for path, module in routed.items() if not isinstance(module, ROUTED)}
    model.update_modules(tree_unflatten(list(fresh.items())))
    return {**routed, **fresh}


def _routed(base: nn.Module, routing: Routing) -> nn.Module:
    return RoutedEmbedding(base, routing) if isinstance(base, EMBEDDING) else RoutedLinear(base, routing)


def unrouted_twin(model: nn.Module) -> nn.Module:
    """Return a new module tree with the same arrays, without routed layers.

    The commands' code can put an adapter on it, with all its checks, while the served model is in use.
    """
    return _twin(model, {})


def _twin(value: Any, twins: dict[int, nn.Module]) -> Any:
    """Return a copy of a module, or of a module's attribute, with the same arrays. This is not a recursive closure, which
    would be a reference cycle that keeps the last adapter's arrays until Python collects cycles.
    """
    if isinstance(value, ROUTED):
        return _twin(value.embedding if isinstance(value, RoutedEmbedding) else value.linear, twins)
    if isinstance(value, nn.Module):
        if id(value) not in twins:
            twins[id(value)] = own = copy.copy(value)
            own._no_grad = set(value._no_grad)
            for name, child in value.items():
                own[name] = _twin(child, twins)
        return twins[id(value)]
    if isinstance(value, list):
        return [_twin(child, twins) for child in value]
    return {name: _twin(child, twins) for name, child in value.items()} if isinstance(value, dict) else value

"""Apply to each row of a batch its own adapter, or none: the factors of all adapters in memory, and the layers that use them.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: RoutedLinear(linear: the same object), with all adapters' factors in separate pools

The pools' `Routing` has each row's adapter. A layer that no row's adapter uses computes only the base layer.

One pool holds the factors of one rank, so an adapter takes exactly its own bytes, whatever ranks the others have. A batch
whose rows use different adapters reads them by index, without a copy; if the rows change, only index arrays change.

Shapes: B rows, T tokens, n rows of one pool; N adapters of a pool, r their rank; in, out of the layer (vocabulary and width
of an embedding).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_lora.adapters.base import EMBEDDING

# The adapter of each row, None for the base alone.
Rows = tuple[int | None, ...]
# A layer's plans and index arrays are kept for this many combinations of rows, which is more than are in use.
REMEMBERED = 64


# Pools


@dataclass(frozen=True)
class LayerFactors:
    """One adapter's factors for one layer, in the model's compute dtype.

    Attributes:
        a: (in, r).
        b: (r, out), multiplied by the adapter's scale.
        gain: (out,) that multiplies base and product (DoRA's m / |W + D|), or None.
        adapts_head: for an embedding, whether the adapter also applies if the embedding is used as the output head.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    adapts_head: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return self.a.nbytes + self.b.nbytes + (self.gain.nbytes if self.gain is not None else 0)


class Kind(NamedTuple):
    """The properties that the adapters of one pool share."""

    rank: int
    has_gain: bool
    adapts_head: bool


class RowGroup(NamedTuple):
    """The rows of a batch that use one pool.

    Attributes:
        kind: of the pool.
        a, b, gain: the pool's stacks (N, in, r), (N, r, out), (N, out); without their first axis for `one` adapter.
        one: every row of the batch uses the same adapter.
        rows: (n,) indices of the rows in the batch, or None for all rows.
        slots: (n,) array, each row's index into the stacks; None for `one`.
    """

    kind: Kind
    a: mx.array
    b: mx.array
    gain: mx.array | None
    one: bool
    rows: mx.array | None = None
    slots: Any = None


class Routing:
    """Tells all layers of a model which adapter each row of the next call uses.

    Attributes:
        rows: an adapter's number, or None, for each row; empty: only the base.
    """

    def __init__(self) -> None:
        self.rows: Rows = ()
        self._indices: dict[tuple[int, ...], mx.array] = {}

    def indices(self, values: tuple[int, ...]) -> mx.array:
        """Return an index array, uint32; it is cached, because most layers need the same few."""
        if values not in self._indices:
            if len(self._indices) >= REMEMBERED:
                self._indices.clear()
            self._indices[values] = mx.array(values, mx.uint32)
        return self._indices[values]


class LayerPools:
    """All adapters of one layer."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self._slots: dict[int, tuple[Kind, int]] = {}
        self._stacks: dict[Kind, tuple[mx.array, ...]] = {}
        self._new: dict[Kind, list[LayerFactors]] = {}
        self._plans: dict[Rows, list[RowGroup]] = {}

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._slots

    def put(self, adapter: int, factors: LayerFactors) -> None:
        """Add an adapter, which can be used after `settle`, so that many can be added at once."""
        kind = Kind(factors.a.shape[1], factors.gain is not None, factors.adapts_head)
        waiting = self._new.setdefault(kind, [])
        self._slots[adapter] = kind, self._count(kind) + len(waiting)
        waiting.append(factors)

    def settle(self) -> None:
        """Add new factors to the stacks; running calls keep the arrays that they have."""
        for kind, waiting in self._new.items():
            parts = [(f.a, f.b) if f.gain is None else (f.a, f.b, f.gain) for f in waiting]
            added = tuple(mx.stack(arrays) for arrays in zip(*parts, strict=True))
            old = self._stacks.get(kind)
            self._stacks[kind] = (
                added if old is None else tuple(mx.concatenate(p) for p in zip(old, added, strict=True))
            )
            mx.eval(self._stacks[kind])
        self._new.clear()
        self._plans.clear()

    def drop(self, adapter: int) -> None:
        """Remove an adapter; its memory is freed when no running call uses it."""
        kind, slot = self._slots.pop(adapter)
        self._plans.clear()
        if self._count(kind) == 1:
            del self._stacks[kind]
            return
        self._stacks[kind] = tuple(mx.concatenate([s[:slot], s[slot + 1 :]]) for s in self._stacks[kind])
        mx.eval(self._stacks[kind])
        for other, (its_kind, its_slot) in self._slots.items():
            if its_kind == kind and its_slot > slot:
                self._slots[other] = kind, its_slot - 1

    def get(self, adapter: int) -> LayerFactors:
        """Return an adapter's factors from the stacks."""
        kind, slot = self._slots[adapter]
        a, b, *gain = (stack[slot] for stack in self._stacks[kind])
        return LayerFactors(a, b, gain[0] if gain else None, kind.adapts_head)

    def groups(self) -> list[RowGroup]:
        """Return the groups of rows of the next call that need this layer's factors."""
        rows = self.routing.rows
        plan = self._plans.get(rows)
        if plan is None:
            if len(self._plans) >= REMEMBERED:
                self._plans.clear()
            plan = self._plans[rows] = self._planned(rows)
        return plan

    def _planned(self, rows: Rows) -> list[RowGroup]:
        if len(set(rows)) == 1:
            if rows[0] not in self._slots:
                return []
            kind, slot = self._slots[rows[0]]
            a, b, *gain = (stack[slot] for stack in self._stacks[kind])
            return [RowGroup(kind, a, b, gain[0] if gain else None, one=True)]
        served: dict[Kind, list[tuple[int, int]]] = {}
        for row, adapter in enumerate(rows):
            if adapter in self._slots:
                kind, slot = self._slots[adapter]
                served.setdefault(kind, []).append((row, slot))
        plan = []
        for kind, pairs in served.items():
            a, b, *gain = self._stacks[kind]
            own_rows = None if len(pairs) == len(rows) else self.routing.indices(tuple(row for row, _ in pairs))
            slots = self.routing.indices(tuple(slot for _, slot in pairs))
            plan.append(RowGroup(kind, a, b, gain[0] if gain else None, one=False, rows=own_rows, slots=slots))
        return plan

    def _count(self, kind: Kind) -> int:
        return self._stacks[kind][0].shape[0] if kind in self._stacks else 0


# Layers


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

    def _applied(self, group: RowGroup, x: mx.array, y: mx.array) -> mx.array:
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

    @property
    def weight(self) -> mx.array:
        """The base layer's weight, which some architectures read for a tied output head."""
        return self.embedding.weight

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
    fresh: dict[str, nn.Module] = {
        path: (RoutedEmbedding if isinstance(module, EMBEDDING) else RoutedLinear)(module, routing)
        for path, module in routed.items()
        if not isinstance(module, ROUTED)
    }
    model.update_modules(tree_unflatten(list(fresh.items())))
    return {**routed, **fresh}


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

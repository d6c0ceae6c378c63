"""The factors of all resident adapters of one layer, stacked by rank, and which rows of a batch need which.

One pool holds the factors of one rank: an adapter takes exactly its own bytes, whatever ranks the others have,
and a batch whose rows use different adapters reads them by index, without a copy. When the rows of a batch
change, only index arrays do.

Shapes: N adapters of a pool, r their rank; in, out of the layer (vocabulary and width of an embedding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

# The adapter of each row, None for the base alone.
Rows = tuple[int | None, ...]
# Plans of a layer and index arrays are remembered for the row sets in use; this many are plenty.
REMEMBERED = 64


@dataclass(frozen=True)
class LayerFactors:
    """One adapter's part of one layer, in the model's compute dtype.

    Attributes:
        a: (in, r).
        b: (r, out), with the adapter's scale in it.
        gain: (out,) that multiplies base and product (DoRA's m / |W + D|), or None.
        adapts_head: of an embedding, whether it counts where the embedding is the output head as well.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    adapts_head: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.a.nbytes + self.b.nbytes + (self.gain.nbytes if self.gain is not None else 0)


class Kind(NamedTuple):
    """What the adapters of one pool have in common."""

    rank: int
    has_gain: bool
    adapts_head: bool


class Group(NamedTuple):
    """Rows of a batch that one pool serves.

    Attributes:
        kind: of the pool.
        a, b, gain: the pool's stacks (N, in, r), (N, r, out), (N, out); of `one` adapter without their first axis.
        one: every row of the batch uses the same adapter.
        rows: (n,) which rows of the batch, or None for all of them.
        slots: (n,) each row's place in the stacks, None for `one`.
    """

    kind: Kind
    a: mx.array
    b: mx.array
    gain: mx.array | None
    one: bool
    rows: mx.array | None = None
    slots: mx.array | None = None


class Routing:
    """Which adapter each row of the coming model call uses; all layers of a model look here.

    Attributes:
        rows: an adapter's number or None for each row; empty: the base alone.
    """

    def __init__(self) -> None:
        self.rows: Rows = ()
        self._indices: dict[tuple[int, ...], mx.array] = {}

    def indices(self, values: tuple[int, ...]) -> mx.array:
        """Return an index array, uint32; most layers ask for the same few."""
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
        self._plans: dict[Rows, list[Group]] = {}

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._slots

    def put(self, adapter: int, factors: LayerFactors) -> None:
        """Add an adapter; `settle` makes it usable, so that many can be added at once."""
        kind = Kind(factors.a.shape[1], factors.gain is not None, factors.adapts_head)
        waiting = self._new.setdefault(kind, [])
        self._slots[adapter] = kind, self._count(kind) + len(waiting)
        waiting.append(factors)

    def settle(self) -> None:
        """Join what was added to the stacks. Rows in flight keep the arrays that they have."""
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
        """Remove an adapter; its bytes are free once no array in flight uses them."""
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
        """Return an adapter's factors as they lie in the stacks."""
        kind, slot = self._slots[adapter]
        a, b, *gain = (stack[slot] for stack in self._stacks[kind])
        return LayerFactors(a, b, gain[0] if gain else None, kind.adapts_head)

    def groups(self) -> list[Group]:
        """Return what the rows of the coming call need of this layer."""
        rows = self.routing.rows
        plan = self._plans.get(rows)
        if plan is None:
            if len(self._plans) >= REMEMBERED:
                self._plans.clear()
            plan = self._plans[rows] = self._planned(rows)
        return plan

    def _planned(self, rows: Rows) -> list[Group]:
        if len(set(rows)) == 1:
            if rows[0] not in self._slots:
                return []
            kind, slot = self._slots[rows[0]]
            a, b, *gain = (stack[slot] for stack in self._stacks[kind])
            return [Group(kind, a, b, gain[0] if gain else None, one=True)]
        served: dict[Kind, list[tuple[int, int]]] = {}
        for row, adapter in enumerate(rows):
            if adapter in self._slots:
                kind, slot = self._slots[adapter]
                served.setdefault(kind, []).append((row, slot))
        plan = []
        for kind, pairs in served.items():
            a, b, *gain = self._stacks[kind]
            places = None if len(pairs) == len(rows) else self.routing.indices(tuple(row for row, _ in pairs))
            slots = self.routing.indices(tuple(slot for _, slot in pairs))
            plan.append(Group(kind, a, b, gain[0] if gain else None, one=False, rows=places, slots=slots))
        return plan

    def _count(self, kind: Kind) -> int:
        return self._stacks[kind][0].shape[0] if kind in self._stacks else 0

"""Apply to each row of a batch its own adapter, or none: the factors of all adapters in memory, and the layers that use them.

    before   self_attn.q_proj: Linear | QuantizedLinear
    after    self_attn.q_proj: RoutedLinear(linear: the same object), with all adapters' factors in separate pools

The pools' `Routing` has each row's adapter. A layer that no row's adapter uses computes only the base layer.

One pool holds the factors of one rank, so an adapter takes exactly its own bytes, whatever ranks the others have. A batch
whose rows use different adapters reads them by index, without a copy; if the rows change, only index arrays change.

Shapes: B rows, T tokens, n rows of one pool; N adapters of a pool, r their rank; in, out of the layer (vocabulary and width
of an embedding).

Hold the adapters that a server knows, some of them in memory.

A known adapter is read again when a request needs it; the least recently used are evicted when the budget is full.
An adapter that is replaced or unloaded while rows use it stays in memory for those rows, under its own number. Several
adapters can be blended into one.

Adapters that cannot differ between the rows of a batch are refused with a reason: those with parameters trained in full or
of a mixture's experts (`fuse` folds them into a model, which can then be the base), and DoRA on embeddings.

The store works in the engine's thread; other threads only read `cards`, which is never changed, only replaced. `chat` uses
this module too, so it must not need the web framework.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_lora.adapters.base import EMBEDDING
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.config.settings import DataSettings
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter, trains_tower, with_limits_of_run
from mlx_lora.models.generator import REMEMBERED, Adapters, Routing
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError, describe_gpu_failure, first_line
from mlx_lora.utils.hub import HUB_ID, no_adapter_folder, resolve_adapter

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


class LayerPools:
    """All adapters of one layer."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self._slots: dict[int, tuple[Kind, int]] = {}
        self._stacks: dict[Kind, tuple[mx.array, ...]] = {}
        self._new: dict[Kind, list[LayerFactors]] = {}
        self._plans: dict[Adapters, list[RowGroup]] = {}

    def put(self, adapter: int, factors: LayerFactors) -> None:
        """Add an adapter, which can be used after `settle`, so that many can be added at once."""
        kind = Kind(factors.a.shape[1], factors.gain is not None, factors.adapts_head)
        waiting = self._new.setdefault(kind, [])
        self._slots[adapter] = kind, (self._stacks[kind][0].shape[0] if kind in self._stacks else 0) + len(waiting)
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
        if self._stacks[kind][0].shape[0] == 1:
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
        if rows in self._plans:
            return self._plans[rows]
        if len(self._plans) >= REMEMBERED:
            self._plans.clear()
        served: dict[Kind, list[tuple[int, int]]] = {}
        for row, adapter in enumerate(rows[:1] if len(set(rows)) == 1 else rows):
            if adapter in self._slots:
                kind, slot = self._slots[adapter]
                served.setdefault(kind, []).append((row, slot))
        plan = self._plans[rows] = []
        for kind, pairs in served.items():
            stacks = self._stacks[kind]
            if len(set(rows)) == 1:
                a, b, *gain = (stack[pairs[0][1]] for stack in stacks)
                plan.append(RowGroup(kind, a, b, gain[0] if gain else None, one=True))
                continue
            a, b, *gain = stacks
            own_rows = None if len(pairs) == len(rows) else self.routing.indices(tuple(row for row, _ in pairs))
            slots = self.routing.indices(tuple(slot for _, slot in pairs))
            plan.append(RowGroup(kind, a, b, gain[0] if gain else None, one=False, rows=own_rows, slots=slots))
        return plan


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
            added = gathered(z, group.b, group.slots)
            y = y + added if group.rows is None else y.at[group.rows].add(added)
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
            added = gathered(z, group.a.swapaxes(1, 2), group.slots)
            y = y + added if group.rows is None else y.at[group.rows].add(added)
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


def unrouted_twin(value: Any, twins: dict[int, nn.Module] | None = None) -> Any:
    """Return a new module tree with the same arrays, without routed layers; or a copy of a module's attribute.

    The commands' code can put an adapter on it, with all its checks, while the served model is in use. This is not a
    recursive closure, which would be a reference cycle that keeps the last adapter's arrays until Python collects cycles.
    """
    twins = {} if twins is None else twins
    if isinstance(value, ROUTED):
        return unrouted_twin(value.embedding if isinstance(value, RoutedEmbedding) else value.linear, twins)
    if isinstance(value, nn.Module):
        if id(value) not in twins:
            twins[id(value)] = own = copy.copy(value)
            own._no_grad = set(value._no_grad)
            for name, child in value.items():
                own[name] = unrouted_twin(child, twins)
        return twins[id(value)]
    if isinstance(value, list):
        return [unrouted_twin(child, twins) for child in value]
    return {name: unrouted_twin(child, twins) for name, child in value.items()} if isinstance(value, dict) else value


# Hold the adapters that a server knows, some of them in memory

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# The path of a layer of one expert in a list of them, as DBRX has it: it is called with single tokens, whose rows are not known.
ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


class UnknownAdapter(Exception):
    """No adapter of this name is known."""


class NoRoom(Exception):
    """The memory for adapters is full, and every adapter in it is in use: wait for a row to finish."""


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter comes from: a folder, or other adapters with weights.

    Attributes:
        folder: of an adapter that is no blend.
        blend: name -> weight of the adapters that are blended.
        parts: name -> source of these, as they were when the blend was added, so that it does not change when it is read again.
    """

    folder: Path | None = None
    blend: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, AdapterSource] = field(default_factory=dict)

    @property
    def folders(self) -> list[Path]:
        """All folders that it is read from."""
        own = [self.folder] if self.folder is not None else []
        return own + [folder for part in self.parts.values() for folder in part.folders]


@dataclass(frozen=True)
class Card:
    """The description of an adapter.

    Attributes:
        name: the name that requests use.
        source: described in one word: of a folder only its name, because clients must not see its path.
        method, rank, nbytes: of its factors.
        chat_template: its own template, or None.
        resident: whether it is in memory now.
        created: UNIX time when it was first loaded.
        max_pixels: to which larger pictures are shrunk, as in its run; None: only the model's own limits.
    """

    name: str
    source: str
    method: str
    rank: int
    nbytes: int
    chat_template: str | None
    resident: bool
    created: int
    max_pixels: int | None = None

    def describe(self) -> str:
        """Return method, rank, size and source in a few words."""
        return f"{self.method}, rank {self.rank}, {self.nbytes / 1e6:.1f} MB, {self.source}"


@dataclass(eq=False)
class Resident:
    """An adapter in memory.

    Attributes:
        number: identifies its factors in the layers.
        paths: the layers that hold its factors.
        nbytes: of its factors.
        uses: the number of rows that use it.
        retired: no new row gets it, and it is dropped after its last row.
    """

    number: int
    paths: tuple[str, ...]
    nbytes: int
    uses: int = 0
    retired: bool = False


class AdapterStore:
    """The adapters of one base."""

    def __init__(
        self,
        base: Base,
        routing: Routing,
        dtype: mx.Dtype,
        budget_bytes: int | None,
        ignore_fingerprint: bool = False,
        dropped: Callable[[int], None] = lambda number: None,
    ):
        """Start without adapters.

        Args:
            base: the layers of its model are replaced by routed ones if an adapter needs them.
            routing: tells the routed layers which adapter to use.
            dtype: of the activations.
            budget_bytes: for all adapters in memory; None: no limit.
            ignore_fingerprint: accept adapters of another base of the same shape.
            dropped: called with the number of each adapter that leaves memory.
        """
        self._base, self._routing, self._dtype = base, routing, dtype
        self._ignore_fingerprint, self._dropped = ignore_fingerprint, dropped
        self.budget_bytes = budget_bytes
        self.cards: Mapping[str, Card] = MappingProxyType({})
        self.evictions = self.loads = 0
        self._sources: dict[str, AdapterSource] = {}
        self._residents: dict[str, Resident] = {}  # the least recently used first
        self._retired: list[Resident] = []
        self._numbers = itertools.count()

    def folder(self, name: str | None) -> Path | None:
        """Return an adapter's folder; None: it has none of its own."""
        return self._sources[name].folder if name else None

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters in memory."""
        return sum(resident.nbytes for resident in (*self._residents.values(), *self._retired))

    @property
    def folders(self) -> list[Path]:
        """The folders of all known adapters; may be read from any thread."""
        return [folder for source in list(self._sources.values()) for folder in source.folders]

    def add(self, named: Mapping[str, AdapterSource]) -> list[Card]:
        """Read adapters into memory, all or none; one with a known name replaces the earlier adapter.

        Raises:
            InputError: a name is invalid, or an adapter does not fit the base or the budget.
            NoRoom: the budget is in use.
        """
        read, known = {}, {**self._sources, **named}
        for name, source in named.items():
            if not NAME.fullmatch(name):
                raise InputError(f"adapter name {name!r}: must be at most 64 letters, digits, . _ or -")
            for part in source.blend:  # no blends of blends, so that no blend can contain itself
                if part not in known:
                    raise InputError(f"adapter {name!r}: blends {part!r}, which is not loaded; load it first")
                if known[part].blend:
                    advice = "which is itself a blend; give its parts instead"
                    raise InputError(f"adapter {name!r}: blends {part!r}, {advice}")
            read[name] = self._read(source, read)
        self._make_room(sum(factors.nbytes for factors in read.values()))
        for name, source in named.items():
            self._retire(name)
            self._sources[name] = dataclasses.replace(source, parts={part: known[part] for part in source.blend})
        self._install(read)
        return [self.cards[name] for name in named]

    def reload(self, name: str) -> Card:
        """Read an adapter again from its source, a blend from what its parts are now; running rows keep the old one.

        Raises:
            UnknownAdapter, InputError, NoRoom: as for `add`.
        """
        if name not in self._sources:
            raise UnknownAdapter(name)
        return self.add({name: dataclasses.replace(self._sources[name], parts={})})[0]

    def remove(self, name: str) -> None:
        """Forget an adapter; running rows keep it until they end.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        if name not in self._sources:
            raise UnknownAdapter(name)
        del self._sources[name]
        self._retire(name)
        self.cards = MappingProxyType({other: card for other, card in self.cards.items() if other != name})

    def acquire(self, name: str) -> Resident:
        """Return an adapter for one more row, and read it again if it is not in memory.

        Raises:
            UnknownAdapter, InputError, NoRoom: as for `add`; the files may have changed since.
        """
        if name not in self._sources:
            raise UnknownAdapter(name)
        if name not in self._residents:
            self._check_room(
                self.cards[name].nbytes
            )  # before reading: a row that waits for room asks again at every step
            factors = self._read(self._sources[name], {})
            self._make_room(factors.nbytes)
            self._install({name: factors})
        resident = self._residents[name] = self._residents.pop(name)
        resident.uses += 1
        return resident

    def release(self, resident: Resident) -> None:
        """Release what `acquire` returned for one row."""
        resident.uses -= 1
        if resident.retired and resident.uses == 0:
            self._retired.remove(resident)
            self._drop(resident)

    def _read(self, source: AdapterSource, beside: Mapping[str, AdapterFactors]) -> AdapterFactors:
        """Return an adapter's factors, from its folder or from the adapters that it blends.

        Args:
            source: the adapter's.
            beside: adapters that are read together with it, by name.
        """
        if source.folder is not None:
            try:
                return read_factors(self._base, source.folder, self._dtype, self._ignore_fingerprint)
            except (InputError, OSError):
                raise
            except Exception as error:  # whatever is wrong with it does not end the server
                if describe_gpu_failure(error):
                    raise
                raise InputError(
                    f"{source.folder}: cannot be read as an adapter ({type(error).__name__}: {first_line(error)}); train or convert it again"
                ) from error
        parts = []
        for name, weight in source.blend.items():
            resident = self._residents.get(name)
            if source.parts:
                factors = self._read(source.parts[name], {})
            elif name in beside:
                factors = beside[name]
            elif name not in self._sources:
                raise UnknownAdapter(name)
            elif resident is None:  # not kept in memory
                factors = self._read(self._sources[name], beside)
            else:
                modules, card = dict(self._base.model.named_modules()), self.cards[name]
                layers = {path: modules[path].pools.get(resident.number) for path in resident.paths}
                factors = AdapterFactors(layers, card.method, card.chat_template, card.max_pixels)
            parts.append((name, factors, weight))
        return blend_factors(parts)

    def _make_room(self, needed_bytes: int) -> None:
        """Evict the least recently used idle adapters until `needed_bytes` more fit the budget."""
        idle = self._check_room(needed_bytes)
        if self.budget_bytes is None:
            return
        free = self.budget_bytes - self.nbytes
        for name in idle:
            if free >= needed_bytes:
                break
            free += self._residents[name].nbytes
            self._retire(name)
            self.evictions += 1
            out = dataclasses.replace(self.cards[name], resident=False)
            self.cards = MappingProxyType({**self.cards, name: out})

    def _check_room(self, needed_bytes: int) -> list[str]:
        """Return the adapters that may be evicted, the least recently used first.

        Raises:
            InputError, NoRoom: `needed_bytes` more do not fit the budget, ever or now.
        """
        idle = [name for name, resident in self._residents.items() if resident.uses == 0]
        if self.budget_bytes is None:
            return idle
        if needed_bytes > self.budget_bytes:
            raise InputError(
                f"the adapter needs {needed_bytes / 1e6:.1f} MB, the budget for adapters is "
                f"{self.budget_bytes / 1e6:.1f} MB; raise --adapter-memory"
            )
        if self.budget_bytes - self.nbytes + sum(self._residents[name].nbytes for name in idle) < needed_bytes:
            raise NoRoom("all adapters in memory are in use")
        return idle

    def _install(self, read: Mapping[str, AdapterFactors]) -> None:
        """Put factors into the layers, after replacing these by routed layers where needed."""
        touched = {}
        for name, factors in read.items():
            number = next(self._numbers)
            layers = route(self._base.model, list(factors.layers), self._routing)
            for path, layer in layers.items():
                layer.pools.put(number, factors.layers[path])
            touched |= layers
            self._residents[name] = Resident(number, tuple(factors.layers), factors.nbytes)
            self.loads += 1
        for layer in touched.values():
            layer.pools.settle()
        mx.clear_cache()
        for name, factors in read.items():
            known, source = self.cards.get(name), self._sources[name]
            card = Card(
                name,
                source.folder.name if source.folder else "+".join(f"{w:g}*{one}" for one, w in source.blend.items()),
                factors.method,
                factors.rank,
                factors.nbytes,
                factors.chat_template,
                resident=True,
                created=known.created if known else int(time.time()),
                max_pixels=factors.max_pixels,
            )
            self.cards = MappingProxyType({**self.cards, name: card})

    def _retire(self, name: str) -> None:
        """Remove an adapter from memory, now or after its last row."""
        resident = self._residents.pop(name, None)
        if resident is None:
            return
        resident.retired = True
        if resident.uses:
            self._retired.append(resident)
        else:
            self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        modules = dict(self._base.model.named_modules())
        for path in resident.paths:
            modules[path].pools.drop(resident.number)
        self._dropped(resident.number)
        mx.clear_cache()


# An adapter's factors


@dataclass(frozen=True)
class AdapterFactors:
    """An adapter, ready to be served.

    Attributes:
        layers: path -> its factors.
        method: the method that trained it.
        chat_template: the Jinja text that it was trained with, if that is not the base's own.
        max_pixels: of the pictures in its run; None: it had no limit of its own.
    """

    layers: dict[str, LayerFactors]
    method: str
    chat_template: str | None
    max_pixels: int | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all its factors."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(layer.a.shape[1] for layer in self.layers.values())


def read_factors(base: Base, folder: Path, dtype: mx.Dtype, ignore_fingerprint: bool = False) -> AdapterFactors:
    """Read an adapter folder from us, mlx-lm or PEFT.

    Args:
        base: the served base; its model may be routed, and is not changed.
        folder: of the adapter.
        dtype: of the activations; the factors are rounded to it, as `generate` does in each call.
        ignore_fingerprint: allow an adapter that was trained on another base of the same shape.

    Raises:
        InputError: it does not fit this base, or cannot differ by row.
    """
    check_writes_text(folder)
    if trains_tower(folder):
        raise InputError(
            f"{folder}: changes the vision tower, which all rows of a batch share; fuse it, and serve the result"
        )
    twin = dataclasses.replace(base, model=unrouted_twin(base.model))
    info = load_adapter(twin, folder, ignore_fingerprint)
    layers = adapter_layers(twin.model)
    problems = [f"trains {len(info.full)} parameters in full ({info.full[0]} ...)"] if info.full else []
    reasons = {layer.NOT_FOR_A_ROW for layer in layers.values() if layer.NOT_FOR_A_ROW}
    if any(ONE_EXPERT.search(path) for path in layers):
        reasons.add("adapts a mixture's experts")
    problems += sorted(reasons)
    if problems:
        raise InputError(
            f"{folder}: {' and '.join(problems)}, which cannot differ by row of a batch; "
            "fuse it with mlx-lora fuse and serve the result as a base"
        )
    factors = {
        path: LayerFactors(*layer.serving_factors(dtype), adapts_head=layer.adapts_head)
        for path, layer in layers.items()
    }
    mx.eval([(f.a, f.b) if f.gain is None else (f.a, f.b, f.gain) for f in factors.values()])
    pixels = with_limits_of_run(DataSettings(), (), folder).max_pixels
    return AdapterFactors(factors, info.method, info.chat_template, pixels)


def blend_factors(parts: Sequence[tuple[str, AdapterFactors, float]]) -> AdapterFactors:
    """Return the adapter that adds sum_i w_i D_i: its factors are concatenated, with the weights in B, so ranks add up.

    Args:
        parts: name, adapter and weight of each.

    Raises:
        InputError: there are no parts, a DoRA, whose update is not a sum, or embeddings that do not adapt the same.
    """
    if not parts:
        raise InputError("a blend without adapters; name adapters and their weights")
    doras = [name for name, part, _ in parts if any(layer.gain is not None for layer in part.layers.values())]
    if doras:
        raise InputError(f"blend with {', '.join(doras)}: a DoRA's update is not a sum; blend LoRA adapters")
    layers: dict[str, LayerFactors] = {}
    for path in {path: None for _, part, _ in parts for path in part.layers}:
        own = [(part.layers[path], weight) for _, part, weight in parts if path in part.layers]
        if len({layer.adapts_head for layer, _ in own}) > 1:
            raise InputError(f"blend: {path} is adapted as the output head by some and not by others; leave one out")
        a = mx.concatenate([layer.a for layer, _ in own], axis=1)
        b = mx.concatenate([weight * layer.b for layer, weight in own], axis=0)
        layers[path] = LayerFactors(a, b, adapts_head=own[0][0].adapts_head)
    mx.eval([(layer.a, layer.b) for layer in layers.values()])
    templates = {part.chat_template for _, part, _ in parts}
    pixels = [part.max_pixels for _, part, _ in parts if part.max_pixels is not None]
    # The smallest: none of them has seen larger pictures than it does then.
    return AdapterFactors(layers, "blend", templates.pop() if len(templates) == 1 else None, min(pixels, default=None))


# The adapter flags of serve and chat; the base's name and context length

# For a model whose config does not have it.
DEFAULT_CONTEXT = 8192
USAGE = {"--blend": "NAME=ADAPTER:WEIGHT,..."}


def adapter_sources(adapters: tuple[str, ...], blends: tuple[str, ...]) -> dict[str, AdapterSource]:
    """Return the source of each adapter name, given the values of --adapter and --blend.

    Raises:
        InputError: a value is malformed, a name is given twice, or a hub id cannot be downloaded.
    """
    sources: dict[str, AdapterSource] = {}
    for flag, given in (("--adapter", adapters), ("--blend", blends)):
        for text in given:
            name, source = named_source(flag, text)
            if name in sources:
                raise InputError(f"{flag} {name}: given twice; choose another name")
            sources[name] = source
    return sources


def named_source(flag: str, text: str) -> tuple[str, AdapterSource]:
    """Return name and source for NAME=DIR, NAME=OWNER/NAME, either without NAME=, or a blend.

    Without NAME=, an adapter has the last part of its folder's or hub id's name.

    Args:
        flag: the flag, for messages; `--blend` means a blend.
        text: the flag's value.

    Raises:
        InputError: the value is malformed, or a hub id cannot be downloaded.
    """
    name, equals, value = text.partition("=")
    if flag != "--blend" and (not equals or Path(text).expanduser().is_dir()):
        name, equals, value = own_name(flag, text), "=", text
    if not equals or not name or not value:
        raise InputError(f"{flag} {text}: write it as {USAGE.get(flag, 'NAME=DIR')}")
    if flag != "--blend":
        return name, AdapterSource(folder=resolve_adapter(value))
    weights = {}
    for part in value.split(","):
        other, _, number = part.strip().rpartition(":")
        try:
            weights[other] = float(number)
        except ValueError:
            other = ""
        if not other or not abs(weights[other]) <= 100:
            raise InputError(
                f"--blend {text}: write it as NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT, with weights from -100 to 100"
            )
    return name, AdapterSource(blend=weights)


def own_name(flag: str, text: str) -> str:
    """Return the name of an adapter that was given without one.

    Raises:
        InputError: it is neither a folder nor a hub id, or its own name cannot be the name of an adapter.
    """
    path = Path(text).expanduser()
    if not path.is_dir() and not HUB_ID.fullmatch(text):
        raise InputError(f"{flag} {text}: write it as NAME=DIR or DIR ({no_adapter_folder(path)})")
    name = path.resolve().name if path.is_dir() else path.name
    if not NAME.fullmatch(name):
        raise InputError(f"{flag} {text}: {name!r} cannot be a name for requests; write it as NAME={text}")
    return name


def check_names(flag: str, names: Iterable[str], own: tuple[str, ...]) -> None:
    """Refuse adapter names that mean the base.

    Raises:
        InputError: a name is the base's own.
    """
    for name in names:
        if name in own:
            raise InputError(f"{flag} {name}: that is the base's own name; choose another")


def base_name(base: Base) -> str:
    """Return the base's model id: the hub id, or the name of a local folder or file, without its path."""
    path = Path(base.model_id).expanduser()
    return (path.stem if path.is_file() else path.resolve().name) if path.exists() else base.model_id


def context_of(config: dict[str, Any]) -> int | None:
    """Return the number of tokens of the model's context, None if its config does not have it."""
    text = config.get("text_config")
    found = config.get("max_position_embeddings") or (isinstance(text, dict) and text.get("max_position_embeddings"))
    return found if isinstance(found, int) and found > 0 else None

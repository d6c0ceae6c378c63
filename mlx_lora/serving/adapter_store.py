"""Hold the adapters that a server knows, some of them in memory.

A known adapter is read again when a request needs it; the least recently used are evicted when the budget is full.
An adapter that is replaced or unloaded while rows use it stays in memory for those rows, under its own number. Several
adapters can be blended into one.

Adapters that cannot differ between the rows of a batch are refused with a reason: those with parameters trained in full or
of a mixture's experts (`fuse` folds them into a model, which can then be the base), and DoRA on embeddings.

The store works in the engine's thread; other threads only read `cards`, which is never changed, only replaced. `chat` uses
this module too, so it must not need the web framework.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.config.settings import DataSettings
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter, trains_tower, with_limits_of_run
from mlx_lora.models.load import Base
from mlx_lora.serving.pools import LayerFactors, Routing, route, unrouted_twin
from mlx_lora.utils.errors import InputError, describe_gpu_failure, first_line
from mlx_lora.utils.hub import HUB_ID, no_adapter_folder, resolve_adapter

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

    def describe(self) -> str:
        """Return a short text for lists: of a folder only its name, because clients must not see its path."""
        return (
            self.folder.name if self.folder else "+".join(f"{weight:g}*{name}" for name, weight in self.blend.items())
        )


@dataclass(frozen=True)
class Card:
    """The description of an adapter.

    Attributes:
        name: the name that requests use.
        source: described in one word.
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
        name: the name that requests use.
        paths: the layers that hold its factors.
        nbytes: of its factors.
        uses: the number of rows that use it.
        retired: no new row gets it, and it is dropped after its last row.
    """

    number: int
    name: str
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
            self._check_blend(name, source, known)
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

    def _check_blend(self, name: str, source: AdapterSource, sources: Mapping[str, AdapterSource]) -> None:
        """Refuse a blend of unknown adapters, or of blends, so that no blend can contain itself."""
        for part in source.blend:
            if part not in sources:
                raise InputError(f"adapter {name!r}: blends {part!r}, which is not loaded; load it first")
            if sources[part].blend:
                raise InputError(f"adapter {name!r}: blends {part!r}, which is itself a blend; give its parts instead")

    def _read(self, source: AdapterSource, beside: Mapping[str, AdapterFactors]) -> AdapterFactors:
        """Return an adapter's factors, from its folder or from the adapters that it blends.

        Args:
            source: the adapter's.
            beside: adapters that are read together with it, by name.
        """
        if source.folder is not None:
            return self._of_folder(source.folder)
        parts = [
            (part, self._read(source.parts[part], {}) if source.parts else self._current(part, beside), weight)
            for part, weight in source.blend.items()
        ]
        return blend_factors(parts)

    def _of_folder(self, folder: Path) -> AdapterFactors:
        """Return the factors in a folder; whatever is wrong with it is an InputError, which does not end the server."""
        try:
            return read_factors(self._base, folder, self._dtype, self._ignore_fingerprint)
        except (InputError, OSError):
            raise
        except Exception as error:
            if describe_gpu_failure(error):
                raise
            raise InputError(
                f"{folder}: cannot be read as an adapter ({type(error).__name__}: {first_line(error)}); train or convert it again"
            ) from error

    def _current(self, name: str, beside: Mapping[str, AdapterFactors]) -> AdapterFactors:
        """Return the factors of a known adapter, without keeping it in memory."""
        if name in beside:
            return beside[name]
        if name not in self._sources:
            raise UnknownAdapter(name)
        if name not in self._residents:
            return self._read(self._sources[name], beside)
        resident, modules = self._residents[name], dict(self._base.model.named_modules())
        layers = {path: modules[path].pools.get(resident.number) for path in resident.paths}
        card = self.cards[name]
        return AdapterFactors(layers, card.method, card.chat_template, card.max_pixels)

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
            self._residents[name] = Resident(number, name, tuple(factors.layers), factors.nbytes)
            self.loads += 1
        for layer in touched.values():
            layer.pools.settle()
        mx.clear_cache()
        for name, factors in read.items():
            known = self.cards.get(name)
            card = Card(
                name,
                self._sources[name].describe(),
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
    return name, AdapterSource(blend=blend_weights(text)) if flag == "--blend" else AdapterSource(
        folder=resolve_adapter(value)
    )


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


def blend_weights(text: str) -> dict[str, float]:
    """Return {adapter: weight} for NAME=a:0.7,b:0.3.

    Raises:
        InputError: the text is malformed.
    """
    found = {}
    for part in text.partition("=")[2].split(","):
        name, _, number = part.strip().rpartition(":")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not name or not abs(found[name]) <= 100:
            raise InputError(
                f"--blend {text}: write it as NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT, with weights from -100 to 100"
            )
    return found


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

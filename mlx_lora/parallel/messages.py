"""The messages in which ranks share a frozen base, and the part of its weights that each keeps (parallel/sharded_base.py).

A unit (a block, a slice of a table) is one message, or two where ranks keep unequal parts. Each waits for the one before, so
that all ranks send them in the same order.

Shapes: N ranks, E bytes of one of N equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx

from mlx_lora.models.folder import StoredTensor, read_rows

if TYPE_CHECKING:
    from mlx_lora.parallel.ranks import SeveralRanks

ALIGNMENT = 16  # bytes; of each array in a message
# Operations of a message that do nothing: more than there are one after the other in a block, forward and backward.
LEVELS = 200
Named = Sequence[tuple[str, mx.array]]


@dataclass
class Messages:
    """The order of a rank's messages, and who keeps what.

    Attributes:
        ranks: that share the base.
        shares: of each rank in all units together; they add up to 1.
        sent: a number that is computed from the last message, for the next one to wait for.
        before: what the last unit waited for.
        cut_bytes: of the units so far.
        held_bytes: of those, what each rank keeps.
    """

    ranks: SeveralRanks
    shares: Sequence[float]
    sent: list[mx.array] = field(default_factory=list)
    before: list[mx.array] = field(default_factory=list)
    cut_bytes: int = 0
    held_bytes: list[int] = field(default_factory=list)
    flag: ClassVar[str] = "--shard-base"

    def unit(self, arrays: Named) -> Unit:
        """Keep this rank's part of arrays."""
        return Unit(arrays, self)

    table_unit = unit

    def rows_unit(self, path: str, arrays: Named, rows: slice, stored: Mapping[str, StoredTensor]) -> Unit:
        """Keep this rank's part of some rows of a table's arrays, which are read from their files alone if possible."""
        return Unit([(name, read_rows(f"{path}.{name}", array, rows, stored)) for name, array in arrays], self)

    def gather(self, even: mx.array, rest: mx.array, at: slice, before: Sequence[mx.array]) -> list[mx.array]:
        """Return a unit's bytes, lazily: those of its even part and those of the rest.

        Args:
            even: (E,) uint8, this rank's of N equal parts.
            rest: (at.stop - at.start,) uint8, this rank's part of the rest.
            at: where that is; its step is the size of the rest.
            before: arrays that this unit's computation starts from. The message waits only for those of the unit before, so
                that it is on its way while that unit computes.
        """
        content, waited = [], [*self.before, *self.sent]
        # Not in the computation's own stream, where this would wait for all that was planned before it.
        with self.ranks.beside():
            if even.size:
                [own] = mx.depends([even], waited)
                every = mx.stop_gradient(self.ranks.gathered(own)).reshape(-1)
                waited = [every[:1] + 0]  # a copy: a view would keep the whole message alive
                content.append(_planned_early(every))
            if at.step:
                [own] = mx.depends([rest], waited)
                every = mx.stop_gradient(self.ranks.put_together(own.view(mx.uint32), at.start // 4, at.step // 4))
                every = every.view(mx.uint8)
                waited = [every[:1] + 0]
                content.append(_planned_early(every))
        self.before, self.sent = list(before), waited
        return content

    def divide(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Decide which arrays of the next unit are kept in equal parts, and each rank's bytes of the others.

        Equal parts are gathered, which sends the least; what only some ranks keep is added to the others' zeros. Neither
        takes memory beside the unit itself. Unequal ranks keep as much in equal parts as the smallest has room for.

        Args:
            sizes: bytes of its arrays, multiples of ALIGNMENT.

        Returns:
            Numbers of the arrays in equal parts, and (N,) bytes.
        """
        count = len(self.shares)
        self.held_bytes = self.held_bytes or [0] * count
        self.cut_bytes += sum(sizes)
        if max(self.shares) - min(self.shares) < 1e-6:
            even = list(range(len(sizes)))
        else:
            missing = [share * self.cut_bytes - size for share, size in zip(self.shares, self.held_bytes, strict=True)]
            room, even = count * min(missing), []
            for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
                if sizes[number] <= room:
                    even.append(number)
                    room -= sizes[number]
        in_even = sum(sizes[number] for number in even)
        rest = sum(sizes) - in_even
        held = [size + in_even / count for size in self.held_bytes]
        missing = [max(0.0, share * self.cut_bytes - size) for share, size in zip(self.shares, held, strict=True)]
        parts = cut(rest, missing if sum(missing) else self.shares)
        self.held_bytes = [round(size + part) for size, part in zip(held, parts, strict=True)]
        return sorted(even), parts


@dataclass(frozen=True)
class ArraySlot:
    """Where an array is in a unit's bytes.

    Attributes:
        name: its path in the module.
        message: 0 for the first of the unit's messages, 1 for the second.
        begin, bytes, dtype, shape: of it.
    """

    name: str
    message: int
    begin: int
    bytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]

    def of(self, content: Sequence[mx.array]) -> mx.array:
        """Return the array, a view of the unit's bytes."""
        return content[self.message][self.begin : self.begin + self.bytes].view(self.dtype).reshape(self.shape)


class Unit:
    """This rank's part of some frozen arrays that are computed with together."""

    def __init__(self, arrays: Named, messages: Messages):
        """Keep only this rank's part of the arrays.

        Args:
            arrays: by name; they may be lazy, and are read here.
            messages: the order of messages.
        """
        arrays = sorted(arrays, key=lambda pair: -pair[1].dtype.size)
        sizes = [_aligned(array.nbytes) for _, array in arrays]
        numbers, parts = messages.divide(sizes)
        even = [arrays[number] for number in numbers]
        rest = [pair for number, pair in enumerate(arrays) if number not in numbers]
        in_even = sum(sizes[number] for number in numbers)
        count, rank = messages.ranks.size, messages.ranks.rank
        even_part = _aligned(-(-in_even // count))
        begin = sum(parts[:rank])
        self.messages = messages
        self.places = [*_places(even, 0), *_places(rest, int(bool(even)))]
        self.at = slice(begin, begin + parts[rank], sum(parts))
        self.even = _bytes_of(even, rank * even_part, (rank + 1) * even_part)
        self.rest = _bytes_of(rest, begin, begin + parts[rank])
        self.parts = [even_part + part for part in parts]
        mx.eval(self.even, self.rest)

    @property
    def bytes(self) -> int:
        """Of all ranks' parts."""
        return sum(self.parts)

    def gathered(self, before: Sequence[mx.array]) -> list[tuple[str, mx.array]]:
        """Return the arrays, lazily; `before` as for `Messages.gather`."""
        content = self.messages.gather(self.even, self.rest, self.at, before)
        return [(place.name, place.of(content)) for place in self.places]


def _planned_early(message: mx.array) -> mx.array:
    """Return a message through operations that do nothing, so that MLX sends it before it computes the unit before.

    MLX plans a graph from its end, level by level, so a message that only the next unit needs would be sent after nearly all
    operations of this one. These add levels, if MLX plans whole graphs (device.plan_whole_graphs).
    """
    for _ in range(LEVELS):
        message = mx.stop_gradient(message)
    return message


def cut(size: int, shares: Sequence[float]) -> list[int]:
    """Return the bytes of each rank's part, as the shares say; multiples of ALIGNMENT, but for the last."""
    whole = sum(shares)
    edges = [int(size * end / whole) // ALIGNMENT * ALIGNMENT for end in accumulate(shares)]
    edges[-1] = size
    return [end - begin for begin, end in zip([0, *edges], edges, strict=False)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(arrays: Named, message: int) -> Iterator[ArraySlot]:
    begin = 0
    for name, array in arrays:
        yield ArraySlot(name, message, begin, array.nbytes, array.dtype, array.shape)
        begin += _aligned(array.nbytes)


def _bytes_of(arrays: Named, begin: int, end: int) -> mx.array:
    """Return some of the bytes of arrays that lie one after the other, with zeros after the last."""
    pieces, start = [mx.zeros((0,), mx.uint8)], 0
    for _, array in arrays:
        stop = start + _aligned(array.nbytes)
        if start < end and stop > begin:
            flat = mx.pad(array.reshape(-1).view(mx.uint8), (0, stop - start - array.nbytes))
            pieces.append(flat[max(0, begin - start) : end - start])
        start = stop
    return mx.concatenate([*pieces, mx.zeros((end - max(begin, start) if end > start else 0,), mx.uint8)])

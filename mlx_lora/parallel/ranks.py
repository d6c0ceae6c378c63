"""The processes of a run as one of them uses them: its rank, and the collectives of mx.distributed.

mlx moves the data: ring over TCP, JACCL over Thunderbolt, MPI or NCCL. Every rank calls the same collectives in the same
order; parallel/launch.py finds the ranks, and ends all of them if one fails or dies.

Without a launcher a run has `OneRank`, which needs no collectives.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx

from mlx_lora.utils import device

DTYPES = {str(dtype): dtype for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.uint64, mx.int64,
                                         mx.uint8, mx.int8, mx.uint16, mx.int16, mx.bool_)}  # fmt: skip


class OneRank:
    """The only process of a run: it leads, and gets its own values back.

    It has the methods of `SeveralRanks`, but they compute and send nothing.
    """

    rank, size, leads = 0, 1, True

    def from_first(self, value: Any) -> Any:
        return value

    sum = any = arrays_from_first = from_first

    def gathered(self, array: mx.array) -> mx.array:
        return array[None]

    def put_together(self, own: mx.array, begin: int, size: int) -> mx.array:
        return own

    def everyone(self, value: Any) -> list[Any]:
        return [value]

    def same_bits(self, arrays: dict[str, mx.array]) -> bool:
        return True

    def meet(self) -> None:
        """Do nothing: there are no other ranks."""

    def beside(self) -> AbstractContextManager:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()


class SeveralRanks:
    """All processes of a run, as one of them uses them."""

    def __init__(self, group: mx.distributed.Group, messages: mx.Stream | None = None):
        """Wrap mlx's group.

        Args:
            group: of more than one process.
            messages: the stream of all messages; two streams at a time would mix theirs on the same connections.
                None: mlx's default.
        """
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self._messages = messages

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def sum(self, array: mx.array) -> mx.array:
        """Return the sum of all ranks' arrays; with mlx's ring, every rank gets the same bits.

        On a CPU it is lazy. On a GPU the host computes its part, then waits for the others here: GPU work queued after a
        collective would wait on the device, and macOS ends work that waits there for seconds.
        """
        waits = device.host_waits_for_peers()
        if waits:
            mx.eval(array)
        total = mx.distributed.all_sum(array, group=self._group, stream=self._messages)
        if waits:
            mx.eval(total)
        return total

    def gathered(self, array: mx.array) -> mx.array:
        """Return all ranks' arrays, (N, ...), lazily; all must have the same shape and dtype."""
        return mx.distributed.all_gather(array[None], group=self._group, stream=self._messages)

    def beside(self) -> AbstractContextManager:
        """Return a context whose operations are done in the order of messages, beside the computation and not after it."""
        return contextlib.nullcontext() if self._messages is None else mx.stream(self._messages)

    def put_together(self, own: mx.array, begin: int, size: int) -> mx.array:
        """Return an array of which each rank has a part, (size,), lazily.

        Args:
            own: (n,) integers, this rank's part; it may be empty.
            begin: where it belongs.
            size: of all parts together.
        """
        padded = mx.pad(own, (begin, size - begin - own.size), stream=self._messages)
        return mx.distributed.all_sum(padded, group=self._group, stream=self._messages)

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is true."""
        return self.sum(mx.array(float(flag))).item() > 0

    def meet(self) -> None:
        """Wait until every rank has called this."""
        mx.eval(self.sum(mx.array(1.0)))

    def everyone(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank.

        Args:
            value: a JSON value.
        """
        content = json.dumps(value).encode()
        lengths = self.gathered(mx.array(len(content), mx.int32)).tolist()
        padded = mx.array(list(content.ljust(max(lengths))), mx.uint8)
        every = bytes(self.gathered(padded).reshape(-1).tolist())
        return [json.loads(every[i * max(lengths) :][:length]) for i, length in enumerate(lengths)]

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value; the others' values are ignored."""
        return self.everyone(value if self.leads else None)[0]

    def arrays_from_first(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return rank 0's arrays, bit for bit.

        Args:
            arrays: any shapes and dtypes; only rank 0's matter.
        """
        layouts = self.from_first([(name, a.shape, str(a.dtype)) for name, a in arrays.items()])
        result = {}
        for name, shape, dtype in layouts:
            kind = DTYPES[dtype]
            count = kind.size
            for length in shape:
                count *= length
            own = arrays[name].reshape(-1).view(mx.uint8) if self.leads else mx.zeros((count,), mx.uint8)
            # Send bytes, not numbers: x + 0 is not x if x is a negative zero.
            result[name] = self.sum(own).view(kind).reshape(shape)
            mx.eval(result[name])  # one by one, because the order must be the same on all ranks
        return result

    def same_bits(self, arrays: dict[str, mx.array]) -> bool:
        """Return whether all ranks have the same numbers; sums of their bits are compared.

        Args:
            arrays: any shapes and dtypes.
        """
        total = mx.array(0, mx.uint32)
        for array in arrays.values():
            words = mx.uint32 if array.dtype.size % 4 == 0 else mx.uint8
            total = total + array.reshape(-1).view(words).astype(mx.uint32).sum()
        return len(set(self.gathered(total).tolist())) == 1


Ranks = OneRank | SeveralRanks
ALONE = OneRank()

"""Run several processes as one with mx.distributed: find the ranks, sum over them, and end them together.

mlx.launch (or mpirun) starts the same command once per rank and describes the connections in environment variables. mlx
moves the data: ring over TCP, JACCL over Thunderbolt, MPI or NCCL. Every rank calls the same collectives in the same
order; a rank that fails or dies ends the others through heartbeat.py.

Without a launcher a run has `OneRank`, which needs no collectives.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.parallel.heartbeat import Heartbeat, connect, listen
from mlx_lora.utils import device
from mlx_lora.utils.blas import share_words
from mlx_lora.utils.errors import InputError

MEET_S = 300  # the time that a rank waits for the others to start
DTYPES = {str(dtype): dtype for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.uint64, mx.int64,
                                         mx.uint8, mx.int8, mx.uint16, mx.int16, mx.bool_)}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launcher's settings in the environment.

    Attributes:
        backend: mlx's name for the backend.
        size: the number of processes.
        first: possible addresses of rank 0; empty if they are not known.
        hint: where the other ranks are expected, for messages.
    """

    backend: str
    size: int
    first: list[str]
    hint: str


def find_launch(environment: dict[str, str]) -> Launch | None:
    """Return the launcher's settings, None for a single process.

    Args:
        environment: os.environ, or a dict like it.

    Raises:
        InputError: a host file is missing or invalid.
    """
    if "MLX_HOSTFILE" in environment and "MLX_RANK" in environment:
        hosts = _read_list(environment["MLX_HOSTFILE"], "MLX_HOSTFILE")
        first = [address.rsplit(":", 1)[0] for address in hosts[0]] if hosts else []
        launch = Launch("ring", len(hosts), first, ", ".join(str(host[0]) for host in hosts if host))
    elif "MLX_JACCL_COORDINATOR" in environment and "MLX_RANK" in environment:
        coordinator = environment["MLX_JACCL_COORDINATOR"]
        size = len(_read_list(environment.get("MLX_IBV_DEVICES", ""), "MLX_IBV_DEVICES"))
        launch = Launch("jaccl", size, [coordinator.rsplit(":", 1)[0]], coordinator)
    elif "NCCL_HOST_IP" in environment and "MLX_RANK" in environment:
        host = environment["NCCL_HOST_IP"]
        launch = Launch("nccl", _number(environment, "MLX_WORLD_SIZE"), [host], host)
    else:
        size = next((_number(environment, n) for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if n in environment), 1)
        launch = Launch("mpi", size, [], "mpirun's hosts")
    return launch if launch.size > 1 else None


def _read_list(file: str, name: str) -> list:
    """Read a JSON list from the file that an environment variable names; an empty file is an empty list."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
        value = json.loads(text) if text else []
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}={file}: the list of ranks cannot be read ({type(error).__name__}); start the run with "
            "mlx.launch, or unset it"
        ) from None
    if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
        raise InputError(f"{name}={file}: not a JSON list with one list per rank; write it as mlx.launch does")
    return value


def _number(environment: dict[str, str], name: str) -> int:
    text = environment.get(name, "1")
    if not text.isdecimal():
        raise InputError(f"{name}={text}: not a number of processes; start the run with its launcher, or unset it")
    return int(text)


class OneRank:
    """The only process of a run: it leads, and gets its own values back.

    It has the methods of `SeveralRanks`, but they compute and send nothing.
    """

    rank, size, leads = 0, 1, True

    def from_first(self, value: Any) -> Any:
        return value

    sum = sum_inside = any = arrays_from_first = from_first

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
        if not device.host_waits_for_peers():
            return self.sum_inside(array)
        mx.eval(array)
        total = self.sum_inside(array)
        mx.eval(total)
        return total

    def sum_inside(self, array: mx.array) -> mx.array:
        """Return the sum of all ranks' arrays, lazily on every device, for use inside a forward or a backward pass."""
        return mx.distributed.all_sum(array, group=self._group, stream=self._messages)

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


@contextlib.contextmanager
def together(describe: Callable[[BaseException], tuple[str, int] | None]) -> Iterator[Ranks]:
    """Join the other processes, if a launcher started several, and ensure that all end together.

    Inside this context only rank 0 has a standard error. An exception on any rank is printed once, by rank 0 (with the
    rank's number, if it is another rank), and ends all ranks with that rank's exit code. The process then ends here,
    because a collective that waits for a dead peer never returns.

    Args:
        describe: error -> its message and exit code, or None for an unexpected error.

    Yields:
        The ranks; without a launcher, the only one.

    Raises:
        InputError: ranks cannot connect to each other.
    """
    launch = find_launch(dict(os.environ))
    if launch is None:
        yield ALONE
        return
    ranks, heartbeat = _join(launch)
    with open(os.devnull, "w") as nowhere:
        quiet = contextlib.nullcontext() if ranks.leads else contextlib.redirect_stderr(nowhere)
        try:
            with quiet:
                yield ranks
        except BaseException as error:
            foreseen = describe(error)
            if foreseen is None:
                # A dead peer also makes mlx's collectives fail here; let the heartbeat report it first.
                heartbeat.wait_for_the_end(3.0)
                traceback.print_exception(error, file=sys.__stderr__)
                foreseen = f"{type(error).__name__}: {error}", 1
            heartbeat.fail(*foreseen)
    heartbeat.finish()


def sharing_ranks(
    shard_base: str, describe: Callable[[BaseException], tuple[str, int] | None]
) -> contextlib.AbstractContextManager[Ranks]:
    """Join the other processes, for a command that needs them only if they share the base; see `together`.

    Args:
        shard_base: --shard-base.
        describe: see `together`.
    """
    return contextlib.nullcontext(ALONE) if shard_base == "off" else together(describe)


def _join(launch: Launch) -> tuple[SeveralRanks, Heartbeat]:
    """Start mlx's group, then the heartbeat between rank 0 and each other rank."""
    words = f"Joining {launch.size} processes over {launch.backend} ({launch.hint}){share_words()}"
    print(words, file=sys.stderr, flush=True)
    # mlx waits inside a C call, where no Python handler runs, so the default handlers must end the process.
    interrupt, alarm = signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MEET_S)
    try:
        group = mx.distributed.init(strict=True, backend=launch.backend)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{launch.size} processes over {launch.backend}: {error}; check that every rank is running and that its "
            "address can be reached (docs/distributed.md)"
        ) from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGALRM, alarm)
    ranks = SeveralRanks(group, device.message_stream(launch.backend))
    server, token = listen() if ranks.leads else (None, "")
    own = [*launch.first, *_own_addresses()]
    address = ranks.from_first([own, server.getsockname()[1] if server else 0, token])
    links, problem = connect(ranks.rank, ranks.size, server, *address, name=socket.gethostname())
    problems = [p for p in ranks.everyone(problem) if p]
    if problems:
        raise InputError("; ".join(problems))
    return ranks, Heartbeat(ranks.rank, links)


def _own_addresses() -> list[str]:
    """Return addresses of this machine, for launchers that name none (mpirun)."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        found = []
    return list(dict.fromkeys([*(str(entry[4][0]) for entry in found), "127.0.0.1"]))

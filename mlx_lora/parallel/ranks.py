"""The processes of a run as one of them uses them: its rank, and the collectives of mx.distributed.

mlx moves the data: ring over TCP, JACCL over Thunderbolt, MPI or NCCL. Every rank calls the same collectives in the same
order; `together` finds the ranks, and ends all of them if one fails or dies.

Without a launcher a run has `OneRank`, which needs no collectives.

Start several processes as one: find the launcher's ranks, join them, and end all of them together.

mlx.launch (or mpirun) starts the same command once per rank and describes the connections in environment variables.

Rank 0 is connected with every other rank, to learn whether each is alive, has failed, or is done.
mlx's collectives wait forever for a peer (mlx#3862; since its fix, still if work was submitted ahead), so a killed rank
would leave the others hanging. One TCP connection per rank shows this: the kernel closes it if its process dies, and a
machine that is down stops sending. Messages are one JSON object per line: {"beat"}, {"end": [rank, code, words]},
{"bye"}. Rank 0 forwards an `end` to all ranks. No training data is sent here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from mlx_lora.utils import device
from mlx_lora.utils.blas import share_words
from mlx_lora.utils.errors import InputError

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
        self.leads = self.rank == 0  # the one that prints and writes
        self._messages = messages

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


# Start several processes as one

MEET_S = 300  # the time that a rank waits for the others to start

# Heartbeat

BEAT_S = 2.0
SILENCE_S = 20.0  # until a silent machine counts as lost; a process that dies is noticed at once
CONNECT_S = 30.0
FIRST_S = 2.0  # other ranks wait this long, so that rank 0 reports an error that all ranks have
LINE_BYTES = 1 << 16


class PeerConnection:
    """A connection to one other rank."""

    def __init__(self, rank: int, name: str, connection: socket.socket):
        """Use a connection as a link.

        Args:
            rank: the rank at the other end.
            name: its machine.
            connection: a connected socket.
        """
        self.rank, self.name, self.socket = rank, name, connection
        self.heard_s = time.monotonic()
        self.done = False
        self._buffer = b""
        self._sending = threading.Lock()
        connection.settimeout(SILENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; a broken link is noticed when it is read."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived, or None if the other end has closed the connection."""
        try:
            content = self.socket.recv(LINE_BYTES)
        except OSError:
            return None
        if not content:
            return None
        self.heard_s = time.monotonic()
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        if len(self._buffer) > LINE_BYTES:
            return None
        return [json.loads(line) for line in lines if line]


def connect(
    rank: int, size: int, server: socket.socket | None, addresses: list[str], port: int, token: str, name: str
) -> tuple[list[PeerConnection], str]:
    """Connect rank 0 and all others.

    Args:
        rank, size: this rank, and the number of ranks.
        server: rank 0's listening socket; None on other ranks.
        addresses, port, token: of rank 0.
        name: of this machine.

    Returns:
        The links (rank 0: one to each other rank; the others: one to rank 0), and a problem or an empty string.
    """
    if server is None:
        for address in addresses:
            try:
                reached = socket.create_connection((address, port), timeout=CONNECT_S / (len(addresses) + 1))
            except OSError:
                continue
            link = PeerConnection(0, address, reached)
            link.send({"token": token, "rank": rank, "name": name})
            return [link], ""
        return [], (
            f"rank {rank} ({name}) cannot reach rank 0 at {' or '.join(addresses)} port {port}; allow Python to accept "
            "connections there (macOS: System Settings, Network, Firewall)"
        )
    links: list[PeerConnection] = []
    deadline = time.monotonic() + CONNECT_S
    with server:
        while len(links) < size - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5.0)
                hello = json.loads(connection.makefile("rb").readline(LINE_BYTES))
                if not secrets.compare_digest(str(hello["token"]), token):
                    raise ValueError
                links.append(PeerConnection(int(hello["rank"]), str(hello["name"]), connection))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the connection is not from one of our ranks, or the time is up
    return links, ""


class Heartbeat:
    """Watches the links in its own thread, and ends this process if another rank has failed."""

    def __init__(self, rank: int, links: list[PeerConnection]):
        """Start watching.

        Args:
            rank: this rank.
            links: from `connect`.
        """
        self._rank, self._links = rank, links
        self._all_done = threading.Event()
        self._ending = threading.Lock()
        threading.Thread(target=self._watch, daemon=True, name="heartbeat").start()

    def fail(self, words: str, code: int) -> NoReturn:
        """End every rank with this message, printed once, and this exit code."""
        if self._rank == 0:
            self._end(0, words, code)
        time.sleep(FIRST_S)
        self._links[0].send({"end": [self._rank, code, words]})
        time.sleep(10.0)  # rank 0 prints it and answers
        self._end(self._rank, words, code)

    def finish(self) -> None:
        """Tell the others that this rank is done, and wait until all are done.

        Rank 0 ends last, because a launcher that sees an exit code other than 0 ends the ranks that still run.
        """
        if self._rank:
            self._links[0].send({"bye": 1})
            self._all_done.wait()
            return
        self._all_done.wait()
        for link in self._links:
            link.send({"bye": 1})

    def _watch(self) -> None:
        next_beat_s = 0.0
        while not self._all_done.is_set():
            now = time.monotonic()
            if now >= next_beat_s:
                next_beat_s = now + BEAT_S
                for link in self._links:
                    link.send({"beat": 1})
            open_links = [link for link in self._links if not link.done]
            ready, _, _ = select.select([link.socket for link in open_links], [], [], BEAT_S / 2)
            # If this thread itself was delayed, first read what arrived in the meantime.
            late = time.monotonic() - now > SILENCE_S / 2
            for link in open_links:
                messages, lost = link.receive() if link.socket in ready else [], ""
                if messages is None:
                    lost = "ended without a message: it was killed, ran out of memory, or its machine is down"
                elif link.socket not in ready and not late and time.monotonic() - link.heard_s > SILENCE_S:
                    lost = f"sent nothing for {SILENCE_S:.0f} s: its machine is down or the connection is lost"
                if lost:
                    advice = "start all ranks again, with --resume to continue from the last checkpoint"
                    self._end(None, f"rank {link.rank} ({link.name}) {lost}; {advice}", 1)
                for message in messages or []:
                    if "bye" in message:
                        link.done = True
                    elif "end" in message:
                        rank, code, words = message["end"]
                        self._end(rank, words, code, said=self._rank != 0)
            if all(link.done for link in self._links):
                self._all_done.set()

    def _end(self, rank: int | None, words: str, code: int, said: bool = False) -> NoReturn:
        """End this process; rank 0 also tells the others.

        Args:
            rank: the rank that failed; None if another rank noticed it.
            words, code: message and exit code of the failure.
            said: whether rank 0 has already printed the message.
        """
        self._ending.acquire()  # only the first end counts
        if self._rank == 0:
            for link in self._links:
                link.send({"end": [rank, code, words]})
        if not said:
            whose = f"rank {rank}: " if rank else ""
            # A progress bar hides the cursor: show it again.
            shown = "\x1b[?25h" if sys.__stderr__ and sys.__stderr__.isatty() else ""
            print(f"{shown}Error: {whose}{' '.join(words.split())}", file=sys.__stderr__, flush=True)
        sys.stdout.flush()
        os._exit(code)


# Launch


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
    else:
        host = environment.get("NCCL_HOST_IP") if "MLX_RANK" in environment else None
        names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if host is None else ("MLX_WORLD_SIZE",)
        name = next((one for one in names if one in environment), "")
        size = environment.get(name, "1")
        if not size.isdecimal():
            raise InputError(f"{name}={size}: not a number of processes; start the run with its launcher, or unset it")
        launch = (
            Launch("mpi", int(size), [], "mpirun's hosts") if host is None else Launch("nccl", int(size), [host], host)
        )
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
                time.sleep(3.0)
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
    server = socket.create_server(("", 0), backlog=64) if ranks.leads else None
    token = secrets.token_hex(16) if ranks.leads else ""
    try:  # of this machine, for launchers that name none (mpirun)
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        found = []
    own = [*launch.first, *list(dict.fromkeys([*(str(entry[4][0]) for entry in found), "127.0.0.1"]))]
    address = ranks.from_first([own, server.getsockname()[1] if server else 0, token])
    links, problem = connect(ranks.rank, ranks.size, server, *address, name=socket.gethostname())
    problems = [p for p in ranks.everyone(problem) if p]
    if problems:
        raise InputError("; ".join(problems))
    return ranks, Heartbeat(ranks.rank, links)

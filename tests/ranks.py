"""Starts a training command as several ranks on this machine, without a launcher that would end them for us."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from child_environment import REPOSITORY, child_environment
from prepared import start_python

from mlx_lora.utils.supervise import last_given

SESSION = Path(__file__).with_name("rank_session.py")
TIMEOUT_S = 240.0


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on right now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def rank_environment() -> dict[str, str]:
    return child_environment(REPOSITORY / "tests", OPENBLAS_NUM_THREADS="1")


@contextmanager
def namespace_pair(name: str) -> Iterator[list[list[str]]]:
    """Yield the words that enter each of two network namespaces, 10.231.7.1 and .2, which a veth pair joins.

    Args:
        name: what their names begin with; up to eight letters.

    Raises:
        OSError: the kernel does not allow it, or there is no iproute2.
    """

    def ip(*words: str) -> None:
        ran = subprocess.run(["ip", *words], capture_output=True, text=True)
        if ran.returncode:
            raise OSError(f"ip {' '.join(words)}: {ran.stderr.strip()}")

    names = [f"{name}{rank}" for rank in (0, 1)]
    try:
        for one in names:
            ip("netns", "add", one)
            ip("-n", one, "link", "set", "lo", "up")
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
        for rank, one in enumerate(names):
            ip("-n", one, "addr", "add", f"10.231.7.{rank + 1}/24", "dev", f"veth{rank}")
            ip("-n", one, "link", "set", f"veth{rank}", "up")
        yield [["ip", "netns", "exec", one] for one in names]
    finally:
        for one in names:
            subprocess.run(["ip", "netns", "del", one], capture_output=True)


@dataclass
class Ended:
    """How each rank ended: exit codes, standard errors and standard outputs, by rank."""

    codes: list[int]
    errs: list[str]
    outs: list[str]

    def message(self, rank: int) -> str:
        """Return the line of a rank's last error; a thread of mlx may have written "[ring]" right before it."""
        lines = re.findall("(?<![A-Za-z])Error: .*", self.errs[rank])
        return lines[-1] if lines else ""


class Started:
    """Ranks that run."""

    def __init__(self, commands: Sequence[Sequence[object]], folder: Path, prefixes: Sequence[Sequence[str]] = ()):
        """Start one process per command.

        Args:
            commands: arguments of `python`, by rank.
            folder: takes host file and logs.
            prefixes: words before `python`, by rank (to enter a network namespace), and then two addresses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        hosts = [[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]
        if prefixes:
            hosts = [[f"10.231.7.{rank + 1}:5{rank}000"] for rank in range(len(commands))]
        (folder / "hosts.json").write_text(json.dumps(hosts))
        environment = {**rank_environment(), "MLX_HOSTFILE": str(folder / "hosts.json")}
        self.logs = [folder / f"rank{rank}.log" for rank in range(len(commands))]
        self.outs = [folder / f"rank{rank}.out" for rank in range(len(commands))]
        self.processes = []
        for rank, command in enumerate(commands):
            own = {**environment, "MLX_RANK": str(rank)}
            words = last_given([str(word) for word in command])
            if prefixes:
                with self.logs[rank].open("w") as log, self.outs[rank].open("w") as out:
                    whole = [*prefixes[rank], sys.executable, *words]
                    self.processes.append(subprocess.Popen(whole, stdout=out, stderr=log, env=own))
            else:
                self.processes.append(start_python(words, own, self.outs[rank], self.logs[rank], number=rank))

    def wait_for(self, path: Path) -> None:
        """Wait until a path is there, while all ranks run; end them when one has ended or it takes too long."""
        start = time.monotonic()
        while not path.exists():
            if any(p.poll() is not None for p in self.processes) or time.monotonic() - start > TIMEOUT_S:
                self.kill()
                pytest.fail(f"{path.name} never came: {self.texts()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End the ranks that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def texts(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def wait(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Wait until all have ended; kill them when that takes too long."""
        end = time.monotonic() + timeout_s
        try:
            codes = [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
        finally:
            self.kill()
        return Ended(codes, self.texts(), [out.read_text() for out in self.outs])


def in_one_session(runs: Sequence[Sequence[object]], ranks: int, folder: Path) -> str:
    """Take runs of the train command in the same processes, one after the other; return what rank 0 printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps([list(map(str, words)) for words in runs]))
    ended = Started([[SESSION, folder / "runs.json"]] * ranks, folder / "ranks").wait()
    assert ended.codes == [0] * ranks, ended.errs
    return ended.errs[0]

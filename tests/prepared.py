"""Python processes that begin with the package imported: importing takes longer than what most tests run in a process.

A server imports the package once, computes nothing, and forks for each start. What is forked gets its own arguments, environment,
folder and files, runs the words as `python WORDS` would, and ends by itself. Two servers take turns, so that ranks hash strings
differently, as two processes do: a result that depends on the order of a set still shows.

Whatever a fork would not show starts Python itself, as does everything with MLX_LORA_TEST_PROCESSES=real (`make test-all`): another
environment at import time, a GPU, a rehearsal of one, a system other than Linux.
"""

from __future__ import annotations

import array
import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SWITCH = "MLX_LORA_TEST_PROCESSES"
IMPORTED = ("mlx_lora.cli.train", "mlx_lora.trainer.run", "mlx_lora.objectives.sft", "mlx_lora.reports.run_report")
# Variables of these kinds that nothing reads while the package is imported.
READ_LATER = {
    SWITCH, "MLX_RANK", "MLX_HOSTFILE", "MLX_BFS_MAX_WIDTH", "MLX_LORA_CACHE", "MLX_LORA_MEASURE_KERNELS", "MLX_LORA_TEST_MODELS",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_VERBOSITY", "HF_XET_HIGH_PERFORMANCE",
}  # fmt: skip
# What a variable begins with that is read while the package is imported. Others, which libraries set meanwhile, get to what is forked.
AT_IMPORT = (
    "MLX",
    "OPENBLAS",
    "OMP",
    "MKL",
    "HF",
    "HUGGINGFACE",
    "TRANSFORMERS",
    "PYTHON",
    "LD",
    "LC",
    "LANG",
    "HOME",
    "XDG",
    "USE",
)
OF_SERVERS = {"PYTHONPATH", "OPENBLAS_NUM_THREADS"}
AT_FIRST = dict(os.environ)
LONGEST_REQUEST = 1 << 20


# In the test process


class Prepared:
    """A process that a server forked, with what tests use of `subprocess.Popen`."""

    def __init__(self, server: _Server, pid: int):
        self.pid, self.returncode = pid, None
        self._server, self._ended = server, os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._ended)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = self._server.ask({"reap": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    """The process that forks.

    Attributes:
        can_fork: False if something that it imported has started a thread, which a fork would lose.
    """

    def __init__(self, environment: dict[str, str]):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # as in a process whose output goes to a file
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.end)
        self.can_fork = self._answer() == 1

    def end(self) -> None:
        """End the server; what it forked runs on."""
        self._socket.close()
        self._process.wait()

    def ask(self, request: dict, *files: int) -> int:
        """Send a request, with open files, and return the answer."""
        self._socket.sendmsg(
            [json.dumps(request).encode()],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else [],
        )
        return self._answer()

    def _answer(self) -> int:
        answer = self._socket.recv(64)
        if not answer:
            raise RuntimeError("the server of prepared processes has ended")
        return int(answer)


@functools.cache
def _server(number: int, variables: tuple[tuple[str, str], ...]) -> _Server:
    return _Server({**AT_FIRST, **dict(variables)})


def start_python(
    words: Sequence[str], environment: Mapping[str, str], out: Path, err: Path, cwd: Path | None = None, number: int = 0
) -> Prepared | subprocess.Popen:
    """Start `python WORDS`, prepared if that shows the same.

    Args:
        words: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        environment: whole.
        out, err: files for standard output and error, which are emptied; the same file for both is opened once.
        cwd: its folder; None: this process's.
        number: of processes that run together: neighbors come from different servers.
    """
    with open(out, "w") as to_out, open(err, "w") if err != out else to_out as to_err:
        own = tuple((name, environment[name]) for name in sorted(OF_SERVERS & environment.keys()))
        server = _server(number % 2, own) if _may_fork(environment) else None
        if server is None or not server.can_fork:
            command = [sys.executable, *words]
            return subprocess.Popen(command, stdout=to_out, stderr=to_err, env=dict(environment), cwd=cwd)
        request = {"words": list(words), "environment": dict(environment), "cwd": str(cwd or Path.cwd())}
        return Prepared(server, server.ask(request, to_out.fileno(), to_err.fileno()))


def _may_fork(environment: Mapping[str, str]) -> bool:
    from mlx_lora.utils import device

    def read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
        names = {name for name in variables if name.startswith(AT_IMPORT)}
        return {name: variables[name] for name in names - READ_LATER - OF_SERVERS}

    return (
        sys.platform == "linux"
        and hasattr(os, "pidfd_open")
        and environment.get("OPENBLAS_NUM_THREADS") == "1"  # its threads would not be in a fork
        and not device.on_gpu()
        and environment.get(SWITCH) != "real"
        and read_at_import(environment) == read_at_import(AT_FIRST)
    )


# In the server


def serve(requests: socket.socket) -> tuple[dict, list[int]] | None:
    """Fork for each request until the test process has ended; in a forked process, return its request and files."""
    while True:
        data, files, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 2)
        if not data:
            return None
        request = json.loads(data)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        elif (answer := os.fork()) == 0:
            requests.close()
            return request, files
        for file in files:
            os.close(file)
        requests.send(str(answer).encode())


def become(request: dict, files: list[int]) -> None:
    """Take over what a started process would have of its own."""
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.orig_argv = [sys.executable, *request["words"]]


def run(words: list[str]) -> None:
    """Run words as `python WORDS` does."""
    import runpy

    kind, *rest = words
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.path.insert(0, str(Path(kind).parent))
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def main(descriptor: int) -> None:
    """Serve, and in a forked process run what was asked for."""
    import importlib

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests
    sys.path.pop(0)  # the folder of this file
    for name in IMPORTED:
        importlib.import_module(name)
    requests, can_fork = socket.socket(fileno=descriptor), len(os.listdir("/proc/self/task")) == 1
    requests.send(b"1" if can_fork else b"0")
    asked = serve(requests) if can_fork else None
    if asked is not None:
        become(*asked)
        run(asked[0]["words"])


if __name__ == "__main__":
    main(int(sys.argv[1]))

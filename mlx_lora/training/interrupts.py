"""Signals: the first asks the loop to save and end, the second ends at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_lora.system.cache import cache_dir
from mlx_lora.system.files import replacing_file
from mlx_lora.system.supervise import SUPERVISOR

WORDS = b"\nStopping after this step, then saving; press Ctrl-C again to quit without saving\n"

COMPILATION = "C++ shared library"  # in what MLX says when a compiler was ended: it takes that for a success


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (a closed terminal) into a flag the loop reads.

    The second ends the process at once; a third finds the system's own handlers, which need no Python. Where the
    parent chose to ignore a signal, as nohup does with SIGHUP, it stays ignored. A compiler that MLX starts meanwhile
    is spared: without it, the step that waits for it would fail.
    """
    seen: list[int] = []
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            for each in signals:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        seen.append(number)
        try:
            # os.write, not print: a handler may come in the middle of another write to the same stream.
            os.write(2, WORDS)
        except OSError:
            # The terminal is gone. What is printed from here on must not end the run before it has saved.
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    # When the supervisor is gone, nobody would stop this run: the user who ended it meant both.
    supervisor = os.environ.get(SUPERVISOR)
    old = {number: signal.signal(number, note) for number in signals}
    try:
        with compiler_spared():
            yield lambda: bool(seen) or (supervisor is not None and str(os.getppid()) != supervisor)
    except RuntimeError as error:
        if seen and COMPILATION in str(error):
            raise KeyboardInterrupt from error  # the signal came before the compiler could ignore it
        raise
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) == note:  # not so after a second signal
                signal.signal(number, handler)


@contextmanager
def compiler_spared() -> Iterator[None]:
    """Let the g++ that MLX starts for its kernels on a Linux CPU ignore what ends us.

    A terminal sends Ctrl-C to every process of the foreground group. MLX calls g++ by its name, through a shell that
    drops a signal mask but keeps what is ignored: so a g++ that ignores them comes first in PATH.
    """
    compiler = shutil.which("g++") if sys.platform == "linux" else None
    script = cache_dir("bin") / "g++"
    if compiler is None or compiler == str(script):
        yield
        return
    words = f'#!/bin/sh\ntrap "" INT TERM HUP\nexec {shlex.quote(compiler)} "$@"\n'
    try:
        if not script.is_file() or script.read_text() != words:
            with replacing_file(script) as temporary:
                temporary.write_text(words)
                temporary.chmod(0o755)
    except OSError:
        yield  # the cache cannot be written: Ctrl-C during a compilation ends the run without saving
        return
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{script.parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before

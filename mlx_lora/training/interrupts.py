"""Handle signals: the first asks the loop to save and end, the second ends the process at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_lora.system.cache import cache_dir
from mlx_lora.system.files import replacing_file
from mlx_lora.system.long_task import told_display
from mlx_lora.system.supervise import SUPERVISOR

WORDS = "Stopping after this step, then saving; press Ctrl-C again to quit without saving"

COMPILATION = "C++ shared library"  # part of MLX's error after a compiler was killed: MLX believes that it succeeded


@contextmanager
def interrupt_flag(words: str = WORDS) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (a closed terminal) into a flag that the loop reads, and say these words.

    The second ends the process at once; a third reaches the system's handlers, which need no Python. A signal that the
    parent ignores, as nohup does with SIGHUP, stays ignored. Compilers that MLX starts also ignore these signals:
    otherwise the step that waits for them would fail. Outside of the main thread, where Python allows no handlers, the
    flag is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            for each in signals:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        seen.append(number)
        if told_display(words):
            return
        try:
            # os.write, not print: a handler may run in the middle of another write to the same stream.
            os.write(2, f"\n{words}\n".encode())
        except OSError:
            # The terminal is closed. Printing must not end the run from here on before it has saved.
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    # If the user ends the supervisor, this run must end too: nothing else would stop it.
    supervisor = os.environ.get(SUPERVISOR)
    old = {number: signal.signal(number, note) for number in signals}
    try:
        with compiler_spared():
            yield lambda: bool(seen) or (supervisor is not None and str(os.getppid()) != supervisor)
    except RuntimeError as error:
        if seen and COMPILATION in str(error):
            raise KeyboardInterrupt from error  # the signal arrived before the compiler could ignore it
        raise
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) == note:  # not after a second signal
                signal.signal(number, handler)


@contextmanager
def compiler_spared() -> Iterator[None]:
    """Let the g++ that MLX starts for its kernels on a Linux CPU ignore the signals that end this process.

    A terminal sends Ctrl-C to every process of the foreground group. MLX calls g++ by name, through a shell that
    drops a signal mask but keeps ignored signals; so a script that ignores them and calls g++ is put first in PATH.
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

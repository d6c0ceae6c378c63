"""Signals: the first asks the loop to save and end, the second ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_lora.supervise import SUPERVISOR

WORDS = b"\nStopping after this step, then saving; once more ends at once, without saving\n"


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (a closed terminal) into a flag the loop reads.

    The second ends the process at once; a third finds the system's own handlers, which need no Python. Where the
    parent chose to ignore a signal, as nohup does with SIGHUP, it stays ignored.
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
        yield lambda: bool(seen) or (supervisor is not None and str(os.getppid()) != supervisor)
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) == note:  # not so after a second signal
                signal.signal(number, handler)

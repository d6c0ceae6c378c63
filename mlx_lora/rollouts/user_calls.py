"""Call a user's code: within a time limit, and `async def` in the same event loop every time.

A client of a user's module (AsyncOpenAI, httpx, aiohttp), or a lock, belongs to the event loop in which it was first used, so
the loop lives as long as the process. It stands still between calls.

    the main thread                    has a loop of its own, in which the time limit can interrupt any code, and MLX can
                                       use arrays of this thread
    a notebook, which runs a loop      use a loop in a thread beside them
    already, and other threads
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# What a user's code raises if it fails; Ctrl-C and the time limit are none of these.
FAILURES = (Exception, SystemExit, asyncio.CancelledError)
GRACE_S = 1.0  # that code may take to end when its time is over


class TooLong(BaseException):
    """A call took longer than allowed; not an Exception, so that the user's code does not catch it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooLong in here after some seconds; only in the main thread, the others have no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def awaited(values: Awaitable[Any]) -> Any:
    """Wait for what an `async def` function returns."""
    own = threading.current_thread() is threading.main_thread() and not _in_a_loop()
    found, error = (_in_this_thread if own else _beside)(_outcome(values))
    if error is not None:
        raise error
    return found


async def _outcome(values: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return what is awaited, and what would end the loop, too, if it were raised in there."""
    try:
        return await values, None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# By process: a forked one must not touch the loop of the process that it came from, nor throw it away.
_runners: dict[int, asyncio.Runner] = {}
_beside_loops: dict[int, asyncio.AbstractEventLoop] = {}
_making = threading.Lock()


def _in_this_thread(outcome: Coroutine[Any, Any, Any]) -> Any:
    loop = _runners.setdefault(os.getpid(), asyncio.Runner()).get_loop()
    task = loop.create_task(outcome)
    try:
        return loop.run_until_complete(task)
    finally:
        if not task.done():  # the time limit, Ctrl-C, or sys.exit in a part of it has stopped the loop
            task.cancel()
            loop.run_until_complete(asyncio.wait([task], timeout=GRACE_S))


@atexit.register
def _close() -> None:
    """End what still waits in the main thread's loop; else Python warns of it."""
    runner = _runners.pop(os.getpid(), None)
    if runner is None:
        return
    loop = runner.get_loop()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        with suppress(SystemExit, KeyboardInterrupt):
            # Not `runner.close()` before this: it waits without a limit, also for a task that takes no notice.
            _, left = loop.run_until_complete(asyncio.wait(tasks, timeout=GRACE_S))
            if left:
                return
    runner.close()


def _beside(outcome: Coroutine[Any, Any, Any]) -> Any:
    loop = _loop_beside()
    asked = asyncio.run_coroutine_threadsafe(outcome, loop)
    try:
        return asked.result()
    except BaseException:  # also a signal in this thread
        asked.cancel()
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(GRACE_S)
        except TimeoutError:  # code that never gives way holds the thread; the next call gets another
            _beside_loops.pop(os.getpid(), None)
        raise


def _loop_beside() -> asyncio.AbstractEventLoop:
    """Return the loop in the thread beside the others; both are made when they are first needed."""
    with _making:
        if os.getpid() not in _beside_loops:
            loop = _beside_loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=(loop,), name="async rewards and tools", daemon=True).start()
        return _beside_loops[os.getpid()]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        with suppress(SystemExit, KeyboardInterrupt):  # of a part of what runs here, which gets it as well
            loop.run_forever()

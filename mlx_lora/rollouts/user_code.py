"""Call a user's code: within a time limit, and `async def` in the same event loop every time.

A client of a user's module (AsyncOpenAI, httpx, aiohttp), or a lock, belongs to the event loop in which it was first used, so
the loop lives as long as the process. It stands still between calls.

    the main thread                    has a loop of its own, in which the time limit can interrupt any code, and MLX can
                                       use arrays of this thread
    a notebook, which runs a loop      use a loop in a thread beside them
    already, and other threads

Run a user's Python file that has rewards, metrics, tools, or environments.

A file may import what is beside it and what is in the current folder, as with `python FILE.py`, also later, in a function.
Two files of one name in different folders are two modules, each with what is beside it. Only an import in a function cannot tell
two folders apart: of neighbors with the same name, it finds the one beside the file that was run first.

A file may also start processes. One that multiprocessing spawns, as it does on macOS, begins empty and imports the module of
a function that it gets by name. For these, a temporary folder on sys.path, which they inherit, has a module of this name:

    mlx_lora_users_x1y2/rewards_0123456789ab.py     calls `run_as`, which runs the user's rewards.py under this name
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import inspect
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of

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
    own = threading.current_thread() is threading.main_thread()
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        own = False  # it runs one already
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
    with _making:  # the loop and its thread are made when they are first needed
        loop = _beside_loops.get(os.getpid())
        if loop is None:
            loop = _beside_loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=(loop,), name="async rewards and tools", daemon=True).start()
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


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        with suppress(SystemExit, KeyboardInterrupt):  # of a part of what runs here, which gets it as well
            loop.run_forever()


# Run a user's Python file that has rewards, metrics, tools, or environments

_folders: set[Path] = set()  # of users' files that were run
_ours: set[str] = set()  # modules from before the first of them

LOADER = """from mlx_lora.rollouts.user_code import run_as
run_as(__name__, {path!r})
"""


def from_file(flag: str, name: str, what: str) -> Any:
    """Return a function or class of a user's file.

    Args:
        flag: that names it, for messages.
        name: FILE.py:NAME.
        what: it is, for messages.

    Raises:
        InputError: there is no such file, it cannot be run, or it has no such name.
    """
    path, _, attribute = name.rpartition(":")
    module = module_of(path, f"{flag} {name}")
    if not callable(vars(module).get(attribute)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{flag} {name}: {path} has no {what} {attribute}; it has {', '.join(known) or 'none'}")
    return vars(module)[attribute]


def module_of(path: str, asked: str) -> ModuleType:
    """Return a user's file, which `asked` names, as a module; errors as of `from_file`.

    A file is run once, so that a reward sees the class that its file also defines for --environment.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{asked}: there is no file {file}; give its path")
    try:
        return _module(file.resolve(), sha256_of(file))
    except FAILURES as error:  # a user's code may raise anything
        raise InputError(f"{asked}: {file} cannot be run ({one_line(error)}); correct it") from error


@lru_cache(maxsize=16)
def _module(file: Path, content: str) -> ModuleType:
    """Run a file with this check sum."""
    name = f"{re.sub(r'[^a-zA-Z0-9]', '_', file.stem)}_{sha256_of(f'{file} {content}')[:12]}"
    with suppress(OSError):  # without a temporary folder, all but spawned processes works
        folder = _loaders()
        (folder / f"{name}.py").write_text(LOADER.format(path=str(file)), encoding="utf-8")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return run_as(name, str(file))


def run_as(name: str, path: str) -> ModuleType:
    """Run a user's file as the module `name`, in place of one that is being imported under it."""
    file = Path(path)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        with _importing_from(file.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@lru_cache(maxsize=1)
def _loaders() -> Path:
    """Return the folder of the modules that spawned processes import; only its owner can write to it."""
    folder, owner = tempfile.mkdtemp(prefix="mlx_lora_users_"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a forked child that ends
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let imports find a folder and the current one: in here first, and afterwards last, for those in functions."""
    here = {one.stem if one.suffix == ".py" else one.name for one in folder.iterdir()}
    _ours.update(() if _folders else sys.modules)
    for name in [name for name in sys.modules if name not in _ours and name.partition(".")[0] in here]:
        file = getattr(sys.modules[name], "__file__", None)
        if file and any(Path(file).is_relative_to(other) for other in _folders - {folder}):
            del sys.modules[name]  # another folder's; who imported it keeps it
    own = list(dict.fromkeys([str(folder), os.getcwd()]))
    sys.path[:0] = own
    try:
        yield
    finally:
        for one in own:
            if one in sys.path:
                sys.path.remove(one)
        sys.path += [one for one in own if one not in sys.path]
        _folders.add(folder)


def without_defaults(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns as arguments of a function, without those that have nothing where it has a default of its own."""
    parameters = inspect.signature(function).parameters.values()
    own = {one.name for one in parameters if one.default is not inspect.Parameter.empty}
    return {name: value for name, value in columns.items() if value is not None or name not in own}


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]

"""Run a user's Python file that has rewards, metrics, tools, or environments.

A file may import what is beside it and what is in the current folder, as with `python FILE.py`, also later, in a function.
Two files of one name in different folders are two modules, each with what is beside it. Only an import in a function cannot tell
two folders apart: of neighbors with the same name, it finds the one beside the file that was run first.

A file may also start processes. One that multiprocessing spawns, as it does on macOS, begins empty and imports the module of
a function that it gets by name. For these, a temporary folder on sys.path, which they inherit, has a module of this name:

    mlx_lora_users_x1y2/rewards_0123456789ab.py     calls `run_as`, which runs the user's rewards.py under this name
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_lora.rollouts.user_calls import FAILURES
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of

_folders: set[Path] = set()  # of users' files that were run
_ours: set[str] = set()  # modules from before the first of them

LOADER = """from mlx_lora.rollouts.user_files import run_as
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

"""Errors as Python users expect them: a ValueError, and settings spelled as keyword arguments instead of flags."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mlx_lora.config.fields import field_type, row_of
from mlx_lora.config.settings import FIELDS
from mlx_lora.utils import errors
from mlx_lora.utils.files import GIVEN

P = ParamSpec("P")
T = TypeVar("T")
FLAG = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(?: (?P<value>[^\s:;,]+)(?P<end>:?))?")
RECORDS = re.compile(r"\S*/records/[0-9a-f]{32}(/train\.jsonl)?")  # the file that records in memory become
# Advice on a command -> the same on Python.
PHRASES = {
    "use --bits 4": "load the model with bits=4",
    "use --bits 8": "load the model with bits=8",
    "lora and --bits 4": "lora, and load the model with bits=4",
    "(--help-all lists the options)": "(`mlx-lora train --help-all` lists the settings)",
    "(--help says what each takes)": "(see help(mlx_lora.train))",
    "settings: unknown setting": "unknown setting",
}


class InputError(errors.InputError, ValueError):
    """An argument, a file or a combination of settings that cannot be used; the message says what to do."""


InputError.__module__ = "mlx_lora"  # its public name, shown in tracebacks


def python_words(message: str, names: dict[str, str]) -> str:
    """Return an error message with `name=value` in place of `--name value`.

    Args:
        message: in the commands' spelling.
        names: setting -> the argument that it has here, where the two differ.
    """
    message = RECORDS.sub(GIVEN, message)
    for ours, theirs in PHRASES.items():
        message = message.replace(ours, theirs)

    def spell(found: re.Match[str]) -> str:
        flag, value = found["name"].replace("-", "_"), found["value"] or ""
        off = flag.startswith("no_") and flag[3:] in FIELDS
        name = names.get(flag, flag[3:] if off else flag)
        field = FIELDS.get(flag)
        # `--rank 0: must be`, `--iters 1 with` and `use --method lora`, but not `give --adapter-path and`
        is_value = field is not None and (
            value in (row_of(field).choices or ()) or value.replace(".", "", 1).isdecimal()
        )
        if value and (found["end"] or is_value):
            text = value if value[0] in "'\"" or field is None or field_type(field) is not str else f'"{value}"'
            return f"{name}={text}{found['end']}"
        if off or (field is not None and field_type(field) is bool):
            name += f"={not off}"
        elif flag == "resume":
            name += '="auto"'
        return f"{name} {value}".rstrip()

    return FLAG.sub(spell, message)


def speaks_python(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator: the function's errors are InputErrors above, and spell settings as arguments.

    Args:
        names: setting -> the argument that the function has for it, where the two differ.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except InputError:
                raise
            except errors.InputError as error:
                raise InputError(python_words(str(error), names)) from error.__cause__
            except errors.RunError as error:
                error.args = (python_words(str(error), names),)
                raise

        return call

    return decorate

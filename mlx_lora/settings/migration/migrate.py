"""`--config` takes the YAML file of Axolotl, LLaMA-Factory or mlx-lm as well.

A migrated file means here what it meant there: where a default of its trainer differs from ours and changes the
result, that default holds for what the file leaves out, and is printed. Flags beat the file, and run.yaml holds
the outcome in our names. A file of none of the three stays ours, where an unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from mlx_lora.settings.migration.axolotl import AXOLOTL
from mlx_lora.settings.migration.llama_factory import LLAMA_FACTORY
from mlx_lora.settings.migration.mlx_lm import MLX_LM
from mlx_lora.settings.migration.sheet import Dialect, Sheet

DIALECTS = (AXOLOTL, LLAMA_FACTORY, MLX_LM)


def migrate(
    content: dict[str, Any],
    known: Collection[str],
    given: Collection[str],
    file: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return a settings file in our names; our own as it is.

    Args:
        content: as read, keys with underscores.
        known: names of our settings.
        given: settings given as flags; of these no default of the other trainer is told.
        file: named in what is said.
        say: takes each line of the account: what it was read as, what changes its meaning, what has no counterpart.

    Raises:
        InputError: the file asks for another kind of training, or holds a value that cannot be read.
    """
    dialect = find_dialect(content)
    if dialect is None:
        return content
    sheet = dialect.read(content, known, file)
    for line in account(sheet, dialect, given, file):
        say(line)
    return sheet.found


def find_dialect(content: dict[str, Any]) -> Dialect | None:
    """Tell whose file it is; None: ours."""
    return next((dialect for dialect in DIALECTS if dialect.recognizes(content)), None)


def account(sheet: Sheet, dialect: Dialect, given: Collection[str], file: str) -> list[str]:
    """Return the lines to print on a migrated file."""
    lines = [f"{file}: a file of {dialect.name}, read as ours"]
    lines += [f"  {note}" for note in sheet.notes]
    told = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sheet.assumed.items()
        if name not in given
    ]
    if told:
        lines.append(f"  {dialect.name}'s defaults where it says nothing: {', '.join(told)}")
    if sheet.left_out:
        lines.append(f"  no counterpart, left out: {', '.join(dict.fromkeys(sheet.left_out))}")
    return lines

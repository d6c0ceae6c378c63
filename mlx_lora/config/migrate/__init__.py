"""Convert the `--config` file of Axolotl, LLaMA-Factory, TRL, torchtune, Unsloth, mlx-lm-lora or mlx-lm to settings of ours.

A migrated file keeps its meaning: if a default of its trainer differs from ours and changes the result, that default
is used for what the file leaves out, and is printed. Flags override the file, and run.yaml has the result with our names.
Any other file is read as ours, where an unknown key is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from mlx_lora.config.migrate.axolotl import AXOLOTL
from mlx_lora.config.migrate.common import Dialect, Sheet
from mlx_lora.config.migrate.llama_factory import LLAMA_FACTORY
from mlx_lora.config.migrate.mlx_lm import MLX_LM, MLX_LM_LORA
from mlx_lora.config.migrate.torchtune import TORCHTUNE
from mlx_lora.config.migrate.trl import TRL
from mlx_lora.config.migrate.unsloth import UNSLOTH
from mlx_lora.config.settings import decided_by
from mlx_lora.utils.errors import InputError

log = logging.getLogger(__name__)

DIALECTS = (TORCHTUNE, UNSLOTH, AXOLOTL, LLAMA_FACTORY, TRL, MLX_LM_LORA, MLX_LM)


def migrate(
    content: dict[str, Any],
    flags: Mapping[str, Any],
    file: str,
) -> dict[str, Any]:
    """Return a file's settings with our names; a file of ours is returned as it is.

    Args:
        content: the file's content, with underscores in keys.
        flags: settings given as flags. What the file's values are converted with is taken from them first, and the other
            trainer's defaults for them are not printed.
        file: its name, for messages.

    Raises:
        InputError: the file asks for another kind of training, has a key that changes the result in a way that is not here, or
            an invalid value.
    """
    dialect = find_dialect(content)
    if dialect is None:
        return content
    sheet = dialect.read(content, file, flags)
    for line in account(sheet, dialect, decided_by(flags)):
        log.info(line)
    if sheet.refused:
        raise sheet.refusal(
            f"{dialect.name}'s file asks for what is not here: {'; '.join(sheet.refused)}. A copy without these keys trains without them"
        )
    return sheet.found


def find_dialect(content: dict[str, Any]) -> Dialect | None:
    """Return the dialect of a file, None if it is ours."""
    return next((dialect for dialect in DIALECTS if dialect.recognizes(content)), None)


def account(sheet: Sheet, dialect: Dialect, given: Collection[str]) -> list[str]:
    """Return the lines to print on a migrated file."""
    told = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sheet.assumed.items()
        if name not in given
    ]
    lists = {
        f"{dialect.name}'s defaults for what it leaves out": told,
        "keys that change no result here": sheet.harmless,
    }
    return [
        f"{sheet.file}: read as a settings file of {dialect.name}",
        *(f"  {note}" for note in sheet.notes),
        *(f"  {what}: {', '.join(dict.fromkeys(names))}" for what, names in lists.items() if names),
    ]


def table(content: dict[str, Any], file: str) -> tuple[Dialect, Sheet, dict[str, dict[str, Any]]]:
    """Return a file's dialect, what was read of it, and what each of its keys decides: what would differ without it.

    Args:
        content: the file's content, with underscores in keys.
        file: its name, for messages.

    Raises:
        InputError: it is a file of ours, or asks for another kind of training.
    """
    dialect = find_dialect(content)
    if dialect is None:
        raise InputError(
            f"{file}: no file of {', '.join(one.name for one in DIALECTS)}; train --config takes it as it is"
        )
    sheet, decides = dialect.read(content, file), {}
    for key in content:
        try:
            without = dialect.read({name: value for name, value in content.items() if name != key}, file).found
        except InputError:  # the file means nothing without it
            without = {}
        decides[key] = {name: value for name, value in sheet.found.items() if without.get(name) != value}
    return dialect, sheet, decides

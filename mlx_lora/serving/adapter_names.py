"""Read the adapter flags of `serve` and `chat`, and find the base's name and context length.

This file does not need the web framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_lora.models.load import Base
from mlx_lora.serving.adapter_store import NAME, Source
from mlx_lora.sources.hub import HUB_ID, no_adapter_folder, resolve_adapter
from mlx_lora.system.errors import InputError

# For a model whose config does not have it.
DEFAULT_CONTEXT = 8192
USAGE = {"--blend": "NAME=ADAPTER:WEIGHT,..."}


def adapter_sources(adapters: tuple[str, ...], blends: tuple[str, ...]) -> dict[str, Source]:
    """Return the source of each adapter name, given the values of --adapter and --blend.

    Raises:
        InputError: a value is malformed, a name is given twice, or a hub id cannot be downloaded.
    """
    sources: dict[str, Source] = {}
    for flag, given in (("--adapter", adapters), ("--blend", blends)):
        for text in given:
            name, source = named_source(flag, text)
            if name in sources:
                raise InputError(f"{flag} {name}: given twice; choose another name")
            sources[name] = source
    return sources


def named_source(flag: str, text: str) -> tuple[str, Source]:
    """Return name and source for NAME=DIR, NAME=OWNER/NAME, either without NAME=, or a blend.

    Without NAME=, an adapter has the last part of its folder's or hub id's name.

    Args:
        flag: the flag, for messages; `--blend` means a blend.
        text: the flag's value.

    Raises:
        InputError: the value is malformed, or a hub id cannot be downloaded.
    """
    name, equals, value = text.partition("=")
    if flag != "--blend" and (not equals or Path(text).expanduser().is_dir()):
        name, equals, value = own_name(flag, text), "=", text
    if not equals or not name or not value:
        raise InputError(f"{flag} {text}: write it as {USAGE.get(flag, 'NAME=DIR')}")
    return name, Source(blend=blend_weights(text)) if flag == "--blend" else Source(folder=resolve_adapter(value))


def own_name(flag: str, text: str) -> str:
    """Return the name of an adapter that was given without one.

    Raises:
        InputError: it is neither a folder nor a hub id, or its own name cannot be the name of an adapter.
    """
    path = Path(text).expanduser()
    if not path.is_dir() and not HUB_ID.fullmatch(text):
        raise InputError(f"{flag} {text}: write it as NAME=DIR or DIR ({no_adapter_folder(path)})")
    name = path.resolve().name if path.is_dir() else path.name
    if not NAME.fullmatch(name):
        raise InputError(f"{flag} {text}: {name!r} cannot be a name for requests; write it as NAME={text}")
    return name


def blend_weights(text: str) -> dict[str, float]:
    """Return {adapter: weight} for NAME=a:0.7,b:0.3.

    Raises:
        InputError: the text is malformed.
    """
    found = {}
    for part in text.partition("=")[2].split(","):
        name, _, number = part.strip().rpartition(":")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not name or not abs(found[name]) <= 100:
            raise InputError(
                f"--blend {text}: write it as NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT, with weights from -100 to 100"
            )
    return found


def check_names(flag: str, names: Iterable[str], own: tuple[str, ...]) -> None:
    """Refuse adapter names that mean the base.

    Raises:
        InputError: a name is the base's own.
    """
    for name in names:
        if name in own:
            raise InputError(f"{flag} {name}: that is the base's own name; choose another")


def base_name(base: Base) -> str:
    """Return the base's model id: the hub id, or the name of a local folder or file, without its path."""
    path = Path(base.model_id).expanduser()
    return (path.stem if path.is_file() else path.resolve().name) if path.exists() else base.model_id


def context_of(config: dict[str, Any]) -> int | None:
    """Return the number of tokens of the model's context, None if its config does not have it."""
    text = config.get("text_config")
    found = config.get("max_position_embeddings") or (isinstance(text, dict) and text.get("max_position_embeddings"))
    return found if isinstance(found, int) and found > 0 else None

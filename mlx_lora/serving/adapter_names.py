"""What `serve` and `chat` know before the first request: adapters from flags, the base's name, its context.

No web framework is needed for any of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_lora.models.load import Base
from mlx_lora.serving.adapter_store import Source
from mlx_lora.sources.hub import resolve_adapter
from mlx_lora.system.errors import InputError

# A model that does not say what it was made for.
DEFAULT_CONTEXT = 8192
FORMS = {"--blend": "NAME=ADAPTER:WEIGHT,..."}


def adapter_sources(adapters: tuple[str, ...], blends: tuple[str, ...]) -> dict[str, Source]:
    """Read --adapter and --blend, and return where each name's adapter comes from.

    Raises:
        InputError: not of their form, a name given twice, or a hub id that cannot be had.
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
    """Read NAME=DIR or NAME=OWNER/NAME, or a blend.

    Args:
        flag: by which it was given, for messages; `--blend` makes it one.
        text: after the flag.

    Raises:
        InputError: not of the form, or a hub id that cannot be had.
    """
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise InputError(f"{flag} {text}: write it as {FORMS.get(flag, 'NAME=DIR')}")
    return name, Source(blend=blend_weights(text)) if flag == "--blend" else Source(folder=resolve_adapter(value))


def blend_weights(text: str) -> dict[str, float]:
    """Read NAME=a:0.7,b:0.3 as adapter -> weight.

    Raises:
        InputError: not of that form.
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
                f"--blend {text}: write it as NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT, weights from -100 to 100"
            )
    return found


def check_names(flag: str, names: Iterable[str], own: tuple[str, ...]) -> None:
    """Refuse an adapter under a name that means the base.

    Raises:
        InputError: there is one.
    """
    for name in names:
        if name in own:
            raise InputError(f"{flag} {name}: that is the base's own name; choose another")


def base_name(base: Base) -> str:
    """Return the base's model id: the hub's, or a local folder's or file's own name, not where it lies."""
    path = Path(base.model_id).expanduser()
    return (path.stem if path.is_file() else path.resolve().name) if path.exists() else base.model_id


def context_of(config: dict[str, Any]) -> int | None:
    """Return the tokens that a model was made for, if its config says."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    found = config.get("max_position_embeddings") or text.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None

"""Match the patterns of PEFT's configs with layers, and compare the ranks that they give with the stored factors."""

from __future__ import annotations

from typing import Any

import regex

from mlx_lora.system.errors import InputError

PATTERN_S = 1.0  # limit for matching a config's pattern with a layer's name, which takes microseconds


def names_layer(pattern: str, layer: str) -> bool:
    """Tell whether a PEFT pattern matches a layer.

    Raises:
        InputError: it is not a regular expression, or matching takes too long (`(.*)*x`). Python's matcher cannot be
            interrupted, so the `regex` package is used.
    """
    try:
        return regex.match(rf"(.*\.)?({pattern})$", layer, timeout=PATTERN_S) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
        reason = "takes too long" if isinstance(error, TimeoutError) else str(error)
        raise InputError(f"the pattern {pattern[:80]!r}: {reason}; write the layer's name") from None


def rank_problems(config: dict[str, Any], found: dict[str, dict[str, str]], header: dict[str, Any]) -> list[str]:
    """Return that layers have factors of another rank than the config says: one of the two is another adapter's.

    Args:
        config: PEFT's adapter_config.json.
        found: layer -> side of the factors -> name of its tensor.
        header: of the file; has each tensor's shape.
    """
    if str(config.get("peft_type")).upper() == "ADALORA":  # whose ranks were cut, each layer's to another number
        return []
    patterns, usual = config.get("rank_pattern") or {}, config.get("r") or 8
    wrong = []
    for layer, sides in found.items():
        asked = next((rank for pattern, rank in patterns.items() if names_layer(pattern, layer)), usual)
        rank = header[sides["A"]]["shape"][0] if "A" in sides else asked
        if rank != asked:
            wrong.append(f"layer {layer} has factors of rank {rank}, but adapter_config.json says r {asked}")
    more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
    return [wrong[0] + more] if wrong else []

"""Check the contents of an adapter_config.json, ours, mlx-lm's or PEFT's, before they are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mlx_lora.settings.methods import PRESETS

Check = tuple[Callable[[Any], bool], str]
"""(test, description of a valid value)"""

MAX_RANK = 65536  # --rank's own bound
MAX_KEYS = 10_000


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; JSON's true is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def is_share(value: Any) -> bool:
    """Tell whether a value is a probability below 1."""
    return is_number(value) and 0 <= value < 1


def is_rank(value: Any) -> bool:
    """Tell whether a value is a rank."""
    return type(value) is int and 1 <= value <= MAX_RANK


def is_text(value: Any) -> bool:
    """Tell whether a value is a string."""
    return isinstance(value, str)


def is_names(value: Any) -> bool:
    """Tell whether a value is a list of names."""
    return isinstance(value, list) and len(value) <= MAX_KEYS and all(isinstance(name, str) for name in value)


def shape_problems(shape: dict[str, Any]) -> list[str]:
    """Return what is wrong in `lora_parameters`."""
    wrong = [name for name in ("rank", "scale") if not is_number(shape.get(name)) or shape[name] <= 0]
    if wrong:
        return [f"lora_parameters without a positive {' and '.join(wrong)}"]
    problems = [] if is_rank(shape["rank"]) else [f"lora_parameters.rank {shape['rank']:g} is not a rank"]
    checks = {"dropout": (is_share, "a fraction below 1"), "keys": (is_names, "a list of names")}
    return problems + problems_of(shape, checks, "lora_parameters.")


def own_entries(config: dict[str, Any]) -> dict[str, Any]:
    """Return our part of the file; another program's has none."""
    own = config.get("mlx_lora")
    return own if isinstance(own, dict) else {}


def own_problems(config: dict[str, Any]) -> list[str]:
    """Return what is wrong in our part of the file, which another program's file does not have."""
    own = config.get("mlx_lora")
    if own is None:
        return []
    if not isinstance(own, dict):
        return ["mlx_lora is not an object"]
    texts = ("base_model", "base_revision", "base_fingerprint", "chat_template")
    checks: dict[str, Check] = dict.fromkeys(texts, (is_text, "a string"))
    checks |= {
        "method": (lambda value: isinstance(value, str) and value in PRESETS, "a method of this version"),
        "alpha": (is_number, "a number"),
        "full": (is_names, "a list of names"),
        "overlap": (_is_overlap, "in this version's format"),
    }
    return problems_of(own, checks, "mlx_lora.")


def peft_problems(config: dict[str, Any]) -> list[str]:
    """Return what is wrong in the part of PEFT's file that we read."""
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (is_rank, "a rank"),
        "init_r": (is_rank, "a rank"),
        "lora_alpha": (lambda value: is_number(value) and value > 0, "a positive number"),
        "lora_dropout": (is_share, "a fraction below 1"),
        "modules_to_save": (is_names, "a list of names"),
        "base_model_name_or_path": (is_text, "a string"),
        "bias": (is_text, "a string"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "use_dora": (lambda value: isinstance(value, bool), "true or false"),
        "alpha_pattern": (_is_numbers, "an object with numbers"),
    }
    return problems_of(config, checks, "")


def _is_overlap(value: Any) -> bool:
    names = {"inner", "size", "noise"}
    return isinstance(value, dict) and (
        not value or (value.keys() == names and all(is_number(value[name]) for name in names) and value["size"] > 0)
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_KEYS and all(is_number(n) and n > 0 for n in value.values())


def problems_of(table: dict[str, Any], checks: dict[str, Check], prefix: str) -> list[str]:
    """Return a line for each entry that exists and is not valid.

    Args:
        table: read from a file.
        checks: name -> (test, description of a valid value).
        prefix: of the names, for the message.
    """
    return [
        f"{prefix}{name} {_shown(table[name])} is not {words}"
        for name, (test, words) in checks.items()
        if table.get(name) is not None and not test(table[name])
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)[:40] if not isinstance(value, float) or math.isfinite(value) else str(value)
    return f"(a {type(value).__name__})"

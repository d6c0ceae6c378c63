"""Checks a model's config.json before a model is built from it: numbers in it become loops and arrays.

mlx-lm makes one Python object per layer that the config asks for, so a file that says a billion would keep the
machine busy for hours before anyone compares it with the weights. The weights' own table bounds it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_lora.system.errors import InputError

MOST_BLOCKS = 4096  # the deepest published models have a few hundred
MOST_REPEATS = 1 << 16  # of experts, groups, heads: what mlx-lm counts through
# Numbers of blocks, under all names that mlx-lm's architectures have for them.
BLOCKS = re.compile(r"(n|num)_(\w+_)?layers?|(n|num)_loops|loop_num")
# Other numbers of things, not sizes: vocabularies and contexts may have a million.
REPEATS = re.compile(r"\w*(experts?|heads?|groups?)(_\w+)?|\w+_(freq|interval|period|step|pattern)")
# What every model must have as one whole number, where it has it at all.
WHOLE = ("hidden_size", "num_hidden_layers", "num_layers", "n_layers", "n_layer", "vocab_size", "head_dim")
PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def check_config(config: dict[str, Any], file: Path, n_tensors: int) -> None:
    """Refuse a config that cannot be these weights'.

    Args:
        config: config.json.
        file: named in errors.
        n_tensors: in the weights: every block has some.

    Raises:
        InputError: naming every number that is out of bounds.
    """
    problems = _model_type_problems(config)
    for part in (config, *(config[name] for name in PARTS if isinstance(config.get(name), dict))):
        problems += _number_problems(part, n_tensors)
    problems += [f"{name} is no mapping" for name in PARTS if not isinstance(config.get(name, {}), dict)]
    if "eos_token_id" in config and not _is_ids(config["eos_token_id"]):
        problems.append("eos_token_id is neither a token id nor a list of them")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{file}: {shown}; download the model again")


def _model_type_problems(config: dict[str, Any]) -> list[str]:
    """mlx-lm imports the module of that name: one of its own, or none."""
    kind = config["model_type"]
    if isinstance(kind, str) and re.fullmatch(r"[A-Za-z][\w-]{0,99}", kind):
        return []
    return [f"model_type {str(kind)[:40]!r} is no name of an architecture"]


def _number_problems(config: dict[str, Any], n_tensors: int) -> list[str]:
    problems = []
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) > min(n_tensors, MOST_BLOCKS):
            problems.append(f"{key} lists {len(value)} layers, with {n_tensors} tensors in the weights")
        elif key in WHOLE and value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key} is {str(value)[:40]}, not a whole number from 1 on")
        elif type(value) is not int or value < 0:
            continue
        elif BLOCKS.fullmatch(key) and value > min(n_tensors, MOST_BLOCKS):
            problems.append(f"{key} is {str(value)[:40]}, with {n_tensors} tensors in the weights")
        elif REPEATS.fullmatch(key) and value > MOST_REPEATS:
            problems.append(f"{key} is {str(value)[:40]}, more than {MOST_REPEATS}")
    return problems


def _is_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return value is None or all(type(i) is int and -1 <= i < 2**31 for i in ids)

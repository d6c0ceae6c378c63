"""Check the numbers in a model's config.json before a model is built from it.

mlx-lm makes one Python object per layer that the config asks for, so a file that asks for a billion would keep the
machine busy for hours before its weights are read. The number of stored tensors limits the number of layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_lora.system.errors import InputError

MOST_BLOCKS = 4096  # the deepest published models have a few hundred
MOST_REPEATS = 1 << 16  # of experts, groups, heads: mlx-lm loops over these
# All names that mlx-lm's architectures have for the number of blocks.
BLOCKS = re.compile(r"(n|num)_(\w+_)?layers?|(n|num)_loops|loop_num")
# Other counts. Sizes are not among them: vocabularies and contexts may have a million.
REPEATS = re.compile(r"\w*(experts?|heads?|groups?)(_\w+)?|\w+_(freq|interval|period|step|pattern)")
# Keys that must be one whole number if they are present.
WHOLE = ("hidden_size", "num_hidden_layers", "num_layers", "n_layers", "n_layer", "vocab_size", "head_dim")
PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def check_config(config: dict[str, Any], file: Path, n_tensors: int) -> None:
    """Refuse a config that cannot belong to these weights.

    Args:
        config: config.json.
        file: its path, for errors.
        n_tensors: the number of tensors in the weights; every block has at least one.

    Raises:
        InputError: a number is out of bounds; the message has all of them.
    """
    problems = _model_type_problems(config)
    for part in (config, *(config[name] for name in PARTS if isinstance(config.get(name), dict))):
        problems += _number_problems(part, n_tensors)
    problems += [f"{name} is not a mapping" for name in PARTS if not isinstance(config.get(name, {}), dict)]
    if "eos_token_id" in config and not _is_ids(config["eos_token_id"]):
        problems.append("eos_token_id is neither a token id nor a list of them")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{file}: {shown}; download the model again")


def _model_type_problems(config: dict[str, Any]) -> list[str]:
    """Check `model_type`: mlx-lm imports a module of that name, so it must be a plain name."""
    kind = config["model_type"]
    if isinstance(kind, str) and re.fullmatch(r"[A-Za-z][\w-]{0,99}", kind):
        return []
    return [f"model_type {str(kind)[:40]!r} is not the name of an architecture"]


def _number_problems(config: dict[str, Any], n_tensors: int) -> list[str]:
    problems = []
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) > min(n_tensors, MOST_BLOCKS):
            problems.append(f"{key} lists {len(value)} layers, but the weights only have {n_tensors} tensors")
        elif key in WHOLE and value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key} is {str(value)[:40]}, not a whole number of at least 1")
        elif type(value) is not int or value < 0:
            continue
        elif BLOCKS.fullmatch(key) and value > min(n_tensors, MOST_BLOCKS):
            problems.append(f"{key} is {str(value)[:40]}, but the weights only have {n_tensors} tensors")
        elif REPEATS.fullmatch(key) and value > MOST_REPEATS:
            problems.append(f"{key} is {str(value)[:40]}, more than {MOST_REPEATS}")
    return problems


def _is_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return value is None or all(type(i) is int and -1 <= i < 2**31 for i in ids)

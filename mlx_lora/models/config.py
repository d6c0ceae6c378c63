"""Read a model's config.json for mlx-lm: check its numbers, and translate what transformers 5 wrote.

mlx-lm makes one Python object per layer that the config asks for, so a file that asks for a billion would keep the
machine busy for hours before its weights are read. The number of stored tensors limits the number of layers.

transformers 5 keeps everything about RoPE in one place:

    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}
    "rope_parameters": {"full_attention": {"rope_theta": 1e6, ...}, "sliding_attention": {"rope_theta": 1e4, ...}}

Most of mlx-lm's classes read `rope_theta`, `rope_scaling` and `partial_rotary_factor` as keys of their own, as transformers 4
wrote them, and take their defaults where these are missing: another model, without an error. `check_rotation` compares what a
built model does with what its config says, so that a class without such a field is refused. A few other keys have
moved or have new names; they are in the tables and functions below.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE
from transformers import CONFIG_MAPPING

from mlx_lora.compat.foreign import GET_CLASSES
from mlx_lora.utils.errors import InputError

PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
Values = dict[str, Any]


# Checks before a model is built

MOST_BLOCKS = 4096  # the deepest published models have a few hundred
MOST_REPEATS = 1 << 16  # of experts, groups, heads: mlx-lm loops over these
# All names that mlx-lm's architectures have for the number of blocks.
BLOCKS = re.compile(r"(n|num)_(\w+_)?layers?|(n|num)_loops|loop_num")
# Other counts. Sizes are not among them: vocabularies and contexts may have a million.
REPEATS = re.compile(r"\w*(experts?|heads?|groups?)(_\w+)?|\w+_(freq|interval|period|step|pattern)")
# Keys that must be one whole number if they are present.
WHOLE = ("hidden_size", "num_hidden_layers", "num_layers", "n_layers", "n_layer", "vocab_size", "head_dim")


def check_config(config: dict[str, Any], file: Path, n_tensors: int) -> None:
    """Refuse a config that cannot belong to these weights.

    Args:
        config: config.json.
        file: its path, for errors.
        n_tensors: the number of tensors in the weights; every block has at least one.

    Raises:
        InputError: a number is out of bounds; the message has all of them.
    """
    problems, kind = [], config["model_type"]
    if not isinstance(kind, str) or not re.fullmatch(
        r"[A-Za-z][\w-]{0,99}", kind
    ):  # mlx-lm imports a module of that name
        problems.append(f"model_type {str(kind)[:40]!r} is not the name of an architecture")
    for part in (config, *(config[name] for name in PARTS if isinstance(config.get(name), dict))):
        problems += _number_problems(part, n_tensors)
    problems += [f"{name} is not a mapping" for name in PARTS if not isinstance(config.get(name, {}), dict)]
    ends = config.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [-1 if ends is None else ends]
    if not all(type(i) is int and -1 <= i < 2**31 for i in ids):
        problems.append("eos_token_id is neither a token id nor a list of them")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{file}: {shown}; download the model again")


def _number_problems(config: dict[str, Any], n_tensors: int) -> list[str]:
    problems = []
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) > min(n_tensors, MOST_BLOCKS):
            problems.append(f"{key} lists {len(value)} layers, but the weights only have {n_tensors} tensors")
        elif key == "head_dim" and value == 0 and "qk_nope_head_dim" in config:
            continue  # latent attention without rotation
        elif key in WHOLE and value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key} is {str(value)[:40]}, not a whole number of at least 1")
        elif type(value) is not int or value < 0:
            continue
        elif BLOCKS.fullmatch(key) and value > min(n_tensors, MOST_BLOCKS):
            problems.append(f"{key} is {str(value)[:40]}, but the weights only have {n_tensors} tensors")
        elif REPEATS.fullmatch(key) and value > MOST_REPEATS:
            problems.append(f"{key} is {str(value)[:40]}, more than {MOST_REPEATS}")
    return problems


# Translation

FULL, SLIDING = "full_attention", "sliding_attention"
# The names that mlx-lm's classes have for these, in this order; a class has at most one of each.
THETA = ("rope_theta", "rotary_emb_base")
SLIDING_THETA = ("rope_local_base_freq", "swa_rope_theta")
PARTIAL = ("partial_rotary_factor", "rotary_pct")
UNSCALED = ("default", "mrope")  # mrope tells places in an image; of text, all its sections are equal
# How often a layer sees the whole context, in classes that do not read `layer_types`.
EVERY = ("sliding_window_pattern", "full_attention_interval")
# transformers 5 has the same words for all hybrids; these classes know the older ones.
LAYER_WORDS = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
    "qwen4_exp_text": {"indexed_attention": "qwen_sparse_attention"},
}
# Gemma 4's layers with full attention have their own widths, which were keys and are now entries of these layers.
PER_LAYER = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
PER_LAYER_NAMES = frozenset(PER_LAYER.values())


BERT = ("bert", "roberta", "xlm-roberta", "camembert")
SHIFTED = ("roberta", "xlm-roberta", "camembert")  # whose positions begin after the padding token's id
MODERN = "modernbert"
ENCODERS = (*BERT, MODERN)
# model_type -> the module of this room that has its `Model` and `ModelArgs`; it is imported when such a model is opened.
OWN_ARCHITECTURES = {
    **dict.fromkeys(ENCODERS, "encoder"),
    **dict.fromkeys(("smolvlm", "idefics3", "paligemma"), "vlm_text"),
}


def names_encoder(config: Values) -> bool:
    """Return whether a config.json is an encoder's, which gives vectors of texts and predicts no tokens."""
    return config.get("model_type") in ENCODERS


def is_encoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder, whose calls take the lengths of rows."""
    return getattr(model, "takes_lengths", False)


def check_language_model(model: nn.Module, model_id: str) -> None:
    """Refuse an encoder where a text is to be written or scored token by token.

    Raises:
        InputError: it is one.
    """
    if is_encoder(model):
        raise InputError(
            f"--model {model_id}: it is an encoder, which gives vectors of texts and writes none; choose a language model, or "
            "get the vectors with `mlx-lora embed`"
        )


def architecture_of(config: Values) -> tuple[type, type]:
    """Return the classes of a model and of its arguments: ours, mlx-lm's, or those of mlx-vlm's language model.

    Raises:
        ValueError: nobody has it.
    """
    if module := OWN_ARCHITECTURES.get(str(config.get("model_type"))):
        own = import_module(f"mlx_lora.models.{module}")
        return own.Model, own.ModelArgs
    try:
        return GET_CLASSES.of()(config)
    except ValueError:  # mlx-lm has none
        from mlx_lora.models import vlm_language

        vlm_language.package_of(config)
        return vlm_language.Model, vlm_language.ModelArgs


def translate_config(config: Values, origin: object) -> Values:
    """Return the config with the keys that mlx-lm's class of its architecture reads, in its text part too.

    Args:
        config: config.json, of any version of transformers; not changed.
        origin: the file, for the message.

    Raises:
        InputError: mlx-lm's class has no field for what transformers 5 wrote; the message has all of it.
    """
    if config.get("model_file") is not None:
        return config  # the model's own code reads it
    try:
        model_class, args_class = architecture_of(config)
    except (ValueError, ImportError, AttributeError, SystemExit):
        return config  # building the model raises the same error, and is reported there
    problems: list[str] = []
    args_class, text_class = getattr(args_class, "read_by", lambda config: (args_class, None))(config)
    found = {**config, **_translated(config, _fields(args_class), problems)}
    module = inspect.getmodule(model_class)
    tied = "tie_word_embeddings"  # transformers 5 keeps it for the whole model
    for name in PARTS:
        if isinstance(config.get(name), dict) and module is not None:
            fields = _fields(text_class or _text_class(module, config[name]))
            shared = {tied: config[tied]} if tied in fields and tied in config else {}
            found[name] = {**shared, **config[name], **_translated(config[name], fields, problems)}
    vocabulary = (config.get("text_config") or {}).get("vocab_size")
    if "vocab_size" not in config and "vocab_size" in _fields(args_class) and vocabulary is not None:
        found["vocab_size"] = vocabulary  # Gemma 3, whose class would take its default
    if problems:
        raise InputError(
            f"{origin}: {'; '.join(problems)}, which mlx-lm's {config['model_type']} cannot express; choose another model"
        )
    return found


def _fields(args_class: type | None) -> frozenset[str]:
    """Return the keys that a class reads; none if it is not known."""
    return frozenset() if args_class is None else frozenset(inspect.signature(args_class).parameters)


def _text_class(module: ModuleType, part: Values) -> type | None:
    """Return the class that reads the text part of a multimodal model's config: its own, or another architecture's."""
    own = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseModelArgs) and value.__module__ == module.__name__
        and name not in ("ModelArgs", "BaseModelArgs")
    ]  # fmt: skip
    text = [value for value in own if "text" in value.__name__.lower()]
    if text:
        return text[0]
    kind = str(part.get("model_type"))
    kind = mlx_lm.utils.MODEL_REMAPPING.get(kind, kind)
    others = {
        value.__name__.rpartition(".")[2]: value.ModelArgs
        for value in vars(module).values()
        if isinstance(value, ModuleType) and hasattr(value, "ModelArgs")
    }
    return others.get(kind) or others.get("llama") or next(iter(others.values()), None)


def _translated(part: Values, fields: frozenset[str], problems: list[str]) -> Values:
    """Return the keys to add to a config or its text part."""
    kind = str(part.get("model_type"))
    # The older names that transformers still knows as other names, and mlx-lm alone reads.
    older = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    added = {old: part[new] for old, new in older.items() if old in fields and old not in part and new in part}
    added |= _layer_kinds(part, fields, problems) | _per_layer(part, fields, problems)
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return added
    nested = _is_nested(rope)
    if nested and "rope_parameters" in fields:
        return added  # the class reads it
    kinds = [rope.get(FULL), *rope.values()] if nested else [rope]
    full = next(kind for kind in kinds if isinstance(kind, dict))
    own = {
        **_named(fields, THETA, full.get("rope_theta")),
        **_named(fields, PARTIAL, full.get("partial_rotary_factor")),
        **_scaling(part, full, fields),
    }
    sliding = rope.get(SLIDING) if nested else None
    if isinstance(sliding, dict):
        second = _named(fields, SLIDING_THETA, sliding.get("rope_theta"))
        if not second and sliding.get("rope_theta") != full.get("rope_theta"):
            problems.append("rope_parameters with another rope_theta for layers with a window")
        if _kind(sliding) not in UNSCALED:
            problems.append(f"rope_parameters with {_kind(sliding)} for layers with a window")
        own |= second
    partial, head = full.get("partial_rotary_factor"), part.get("head_dim")
    if "rotary_dim" in fields and "rotary_dim" not in part and _is_number(partial) and _is_number(head):
        own["rotary_dim"] = int(head * partial)
    return added | own


def _named(fields: frozenset[str], names: Iterable[str], value: Any) -> Values:
    """Return a value under the name that the class has for it; {} if it has none, or if there is no value."""
    name = next((name for name in names if name in fields), None)
    return {} if name is None or value is None else {name: value}


def _scaling(part: Values, rope: Values, fields: frozenset[str]) -> Values:
    """Return the scaling in transformers 4's form, with both `type` and `rope_type`, since mlx-lm reads either."""
    kind = _kind(rope)
    if kind in UNSCALED or "rope_scaling" not in fields or part.get("rope_scaling"):
        # transformers 4 wrote null where there is none, and a few classes require the key
        return {"rope_scaling": part.get("rope_scaling")} if "rope_scaling" in fields else {}
    scaling = {**{key: value for key, value in rope.items() if key != "rope_theta"}, "type": kind, "rope_type": kind}
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    if kind == "yarn" and _is_number(attention) and _is_number(factor) and factor > 1:
        # mlx-lm has no attention_factor: it computes 0.1 mscale ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4)
        scaling |= {"mscale": (attention - 1) / (0.1 * math.log(factor)), "mscale_all_dim": 0}
        del scaling["attention_factor"]
    found: Values = {"rope_scaling": {key: value for key, value in scaling.items() if value is not None}}
    original = rope.get("original_max_position_embeddings")
    if "original_max_position_embeddings" in fields and "original_max_position_embeddings" not in part and original:
        found["original_max_position_embeddings"] = original
    return found


def _layer_kinds(part: Values, fields: frozenset[str], problems: list[str]) -> Values:
    """Return the kinds of layers as mlx-lm's class reads them: in its words, or as the distance of like ones."""
    kinds = part.get("layer_types")
    if not isinstance(kinds, list):
        return {}
    words = LAYER_WORDS.get(str(part.get("model_type")))
    if words is not None:
        return {"layer_types": [words.get(kind, kind) for kind in kinds]}
    name = next((name for name in EVERY if name in fields), None)
    if name is None or "layer_types" in fields or part.get(name) is not None:
        return {}
    every = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if any((kind == FULL) != ((layer + 1) % every == 0) for layer, kind in enumerate(kinds)):
        problems.append("layer_types without a regular pattern")
    return {name: every}


def _per_layer(part: Values, fields: frozenset[str], problems: list[str]) -> Values:
    """Return the keys for layers with full attention from the entries that these layers have."""
    entries = part.get("per_layer_config")
    if not isinstance(entries, dict) or not entries:
        return {}
    if not fields >= {"global_head_dim"} or not all(isinstance(entry, dict) for entry in entries.values()):
        problems.append("per_layer_config")
        return {}
    first = next(iter(entries.values()))
    full = [str(layer) for layer, kind in enumerate(part.get("layer_types") or []) if kind == FULL]
    if any(entry != first for entry in entries.values()) or set(entries) != set(full) or first.keys() - PER_LAYER_NAMES:
        problems.append("per_layer_config other than one of all layers with full attention")
    return {
        old: first[new] for old, new in PER_LAYER.items() if new in first and old in fields and part.get(old) is None
    }


# A check of the built model


def check_rotation(model: nn.Module, config: Values, origin: object) -> None:
    """Refuse a model whose RoPE is not what `rope_parameters` of its config says.

    Args:
        model: as mlx-lm built it from the translated config.
        config: the same config.
        origin: the file, for the message.

    Raises:
        InputError: a base, a number of rotated features or a scaling differs.
    """
    parts = [config, *(config[name] for name in PARTS if isinstance(config.get(name), dict))]
    ropes = [rope for part in parts for rope in _ropes(part)]
    thetas = {float(rope["rope_theta"]) for rope in ropes if _is_number(rope.get("rope_theta"))}
    rotations = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.RoPE) or name.rpartition(".")[2] in ("rope", "rotary_emb", "index_rope")
    ]
    plain = [module for module in rotations if isinstance(module, nn.RoPE)]
    problems = []
    bases = {m.base for m in rotations if isinstance(m, (nn.RoPE, DynamicNTKScalingRoPE)) and _is_number(m.base)}
    if thetas and (other := [base for base in bases if not any(math.isclose(base, t, rel_tol=1e-6) for t in thetas)]):
        problems.append(f"rope_theta is {_listed(thetas)}, and the model would use {_listed(other)}")
    for part in parts:  # of which some features rotate
        head, shares = part.get("head_dim"), [rope.get("partial_rotary_factor") for rope in _ropes(part)]
        some = [share for share in shares if _is_number(share) and share != 1]
        if not some or not _is_number(head) or "qk_rope_head_dim" in part:
            continue
        wanted = {int(head * share) for share in some} | ({head} if len(some) < len(shares) else set())
        if other := {module.dims for module in plain} - wanted:
            problems.append(f"{_listed(wanted)} of {head} features rotate, and the model would rotate {_listed(other)}")
    for rope in ropes:
        kind, factor = _kind(rope), rope.get("factor")
        if kind in UNSCALED or not plain:
            continue
        linear = kind == "linear" and _is_number(factor) and any(math.isclose(m.scale * factor, 1) for m in plain)
        if not linear and len(plain) == len(rotations):
            problems.append(f"rope_type is {kind}, and the model would not scale RoPE")
    if problems:
        raise InputError(
            f"{origin}: {'; '.join(dict.fromkeys(problems))}: mlx-lm's {config.get('model_type')} has no setting for it; "
            "choose another model"
        )


def _listed(numbers: Iterable[float]) -> str:
    return " or ".join(f"{number:g}" for number in sorted(numbers))


# Reading values


def _is_nested(rope: Values) -> bool:
    """Tell whether RoPE's parameters are given for each type of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def _kind(rope: Values) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _ropes(part: Values) -> list[Values]:
    """Return RoPE's parameters in a config or its text part, one for each type of layer."""
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict):
        return []
    return [value for value in rope.values() if isinstance(value, dict)] if _is_nested(rope) else [rope]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

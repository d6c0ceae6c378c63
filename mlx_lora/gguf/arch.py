"""The table of architectures that can be read from and written to GGUF, and lookups in both directions.

Each row is one of llama.cpp's architecture names; gguf/dense.py and gguf/hybrid.py define the rows. Reading turns a file's
metadata into config.json's fields. Writing takes the settings from the arguments that mlx-lm built the model from,
including defaults, so that llama.cpp runs the same model even if config.json leaves something out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.gguf.dense import GEMMA3, GPT_OSS, LLAMA, PHI3, QWEN2, QWEN2_VL, QWEN3, QWEN3_MOE, QWEN3_VL
from mlx_lora.gguf.hybrid import GEMMA4, LFM2, QWEN35, QWEN35_MOE
from mlx_lora.gguf.mapping import GgufFamily, Settings, TensorMapping, shared_fields
from mlx_lora.gguf.reader import GGUFFile
from mlx_lora.models.folder import FUSED_KEY
from mlx_lora.utils.errors import InputError

ARCHITECTURES: dict[str, GgufFamily] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3_MOE,
    "qwen35": QWEN35,
    "qwen35moe": QWEN35_MOE,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "gpt-oss": GPT_OSS,
    "lfm2": LFM2,
    "phi3": PHI3,
}
# Also the text parts of vision-language models that have an architecture of their own in llama.cpp.
WRITTEN = {**ARCHITECTURES, "qwen2vl": QWEN2_VL, "qwen3vl": QWEN3_VL}
# Some files join two tensors in one: the rows of the second follow those of the first.
JOINED = {"ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")}


# Reading


def gguf_architecture(file: GGUFFile) -> GgufFamily:
    """Return the table's row for a file.

    Raises:
        InputError: the table has no such architecture, or the file is one part of a split model.
    """
    name = file.metadata.get("general.architecture")
    if isinstance(name, str) and name == "clip":
        raise InputError(
            f"{file.path}: a vision tower (mmproj) without a language model; give the language model's GGUF file, or for "
            "training on pictures, the model's Hugging Face weights"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        shown = f"{str(name)[:40]!r}"
        raise InputError(
            f"{file.path}: architecture {shown} cannot be read from GGUF (supported: {known}); use its Hugging Face weights"
        )
    if str(file.metadata.get("split.count", 0)) not in ("0", "1"):
        raise InputError(f"{file.path}: one part of a split model; join the parts with llama-gguf-split --merge")
    return ARCHITECTURES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that mlx-lm builds this file's model from, without its quantization.

    Raises:
        InputError: a setting is missing, or mlx-lm's model does not support it; the message has all of them.
    """
    family = gguf_architecture(file)
    settings = Settings(file, file.metadata["general.architecture"])
    config = shared_fields(settings)
    config |= {"model_type": family.model_type, "architectures": [family.model_class]}
    config |= family.fields(settings, config)
    if FUSED_KEY in file.metadata:
        config["mlx_lora"] = {"fused": file.metadata[FUSED_KEY]}
    if settings.problems:
        raise InputError(f"{file.path}: {'; '.join(settings.problems)}; use the model's Hugging Face weights")
    return config


def weight_map(file: GGUFFile, config: dict[str, Any]) -> dict[str, TensorMapping]:
    """Return the mapping of each tensor of the file to mlx-lm's parameters.

    Args:
        file: the GGUF file.
        config: from `model_config`.

    Returns:
        {GGUF name: mapping}, in the file's order, without the tensors that `model_config` turned into settings.

    Raises:
        InputError: tensors are missing, or mlx-lm's model does not have them; the message names them.
    """
    family = gguf_architecture(file)
    mappings = _as_in_file(_mappings(family, config, family.prefix), file)
    if config["tie_word_embeddings"]:
        mappings.pop("output.weight", None)
    unknown = [
        name
        for name in file.tensors
        if name not in mappings and name not in family.absorbed and not _left_out(family, config, name)
    ]
    missing = [name for name in mappings if name not in file.tensors]
    problems = [f"tensors missing: {_listed(missing)}"] if missing else []
    problems += [f"tensors unknown to {family.model_type}: {_listed(unknown)}"] if unknown else []
    if problems:
        raise InputError(f"{file.path}: {'; '.join(problems)}; download it again or use its Hugging Face weights")
    return {name: mappings[name] for name in file.tensors if name in mappings}


def _as_in_file(mappings: dict[str, TensorMapping], file: GGUFFile) -> dict[str, TensorMapping]:
    """Return the mappings with tensors joined or split as the file has them (see JOINED)."""
    found = dict(mappings)
    for layer in {name.rpartition(".ffn_")[0] for name in mappings if ".ffn_" in name}:
        for whole, parts in JOINED.items():
            joined, (first, second) = f"{layer}.{whole}", (f"{layer}.{part}" for part in parts)
            if joined in mappings and joined not in file.tensors and first in file.tensors:
                found |= {first: TensorMapping(mappings[joined].name), second: TensorMapping(mappings[joined].then[0])}
                del found[joined]
            elif first in mappings and first not in file.tensors and joined in file.tensors:
                found[joined] = TensorMapping(mappings[first].name, then=(mappings[second].name,))
                del found[first], found[second]
    return found


def _left_out(family: GgufFamily, config: dict[str, Any], name: str) -> bool:
    """Return whether a file may have a tensor although mlx-lm's model does not use it."""
    number = name.split(".")[1] if name.startswith("blk.") else ""
    # Layers after the last one predict further tokens in one step, which only llama.cpp uses.
    return (number.isdigit() and int(number) >= config["num_hidden_layers"]) or family.spare(config, name)


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _mappings(family: GgufFamily, config: dict[str, Any], prefix: str) -> dict[str, TensorMapping]:
    """Return every tensor of an architecture's files, with its full names."""
    mappings = {
        name: TensorMapping(prefix + ours, offset=family.norm_offset if "norm" in name else 0.0)
        for name, ours in family.top(config).items()
    }
    for layer in range(config["num_hidden_layers"]):
        for name, mapping in family.block(config, layer).items():
            offset = family.norm_offset if "norm" in name else mapping.offset
            whole, *then = (f"{prefix}model.layers.{layer}.{part}" for part in mapping.names)
            mappings[f"blk.{layer}.{name}"] = dataclasses.replace(mapping, name=whole, then=tuple(then), offset=offset)
    return mappings


# Writing


def text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the prefix of the text model's parameter names, and the text model (all of it, unless multimodal)."""
    return ("language_model.", model["language_model"]) if "language_model" in model else ("", model)


def text_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that mlx-lm built the text model from, with defaults filled in."""
    args = dataclasses.asdict(text_model(model)[1].args)
    heads = args["num_attention_heads"]
    args["num_key_value_heads"] = args.get("num_key_value_heads") or heads
    args["head_dim"] = args.get("head_dim") or args["hidden_size"] // heads
    return args


def gguf_weights(model: nn.Module) -> tuple[str, dict[str, TensorMapping]]:
    """Return llama.cpp's name for a model's architecture, and every tensor that its files may have.

    Args:
        model: an mlx-lm model, adapted or not.

    Returns:
        The architecture, and {GGUF name: mapping} in a file's order; a single model may lack some of them.

    Raises:
        InputError: the architecture is not in the table.
    """
    prefix, text = text_model(model)
    kinds = dict.fromkeys((model.args.model_type, text.args.model_type))  # SmolVLM's text part is a llama
    found = [name for kind in kinds for name, family in WRITTEN.items() if kind in (family.model_type, *family.also)]
    if not found:
        known = ", ".join(family.model_type for family in WRITTEN.values())
        raise InputError(
            f"model_type {' with a text part of type '.join(kinds)}: cannot be written as GGUF (supported: {known}); "
            "export to another format"
        )
    return found[0], _mappings(WRITTEN[found[0]], text_arguments(model), prefix)


def context_length(model: nn.Module, config: dict[str, Any]) -> int:
    """Return how many tokens a model is made for, beyond which llama.cpp refuses a prompt.

    mlx-lm's arguments only have what mlx-lm uses, and its defaults are not always the published models' (Gemma 3). So
    the config decides, and what it leaves out is transformers' default, by which it was saved.

    Args:
        model: an mlx-lm model.
        config: its config.json.
    """
    text = config.get("text_config")
    parts = [text if isinstance(text, dict) else {}, config]
    found = [part.get("max_position_embeddings") for part in parts]
    if not any(found):
        found = [_usual_context(part.get("model_type")) for part in parts]
    found += [text_arguments(model).get("max_position_embeddings"), 2048]  # llama.cpp requires one
    return int(next(value for value in found if value))


def _usual_context(kind: Any) -> int | None:
    """Return the context length that transformers gives a kind of model by default; None: it does not know it."""
    from transformers import CONFIG_MAPPING  # slow to import, and most files do not need it

    if kind not in CONFIG_MAPPING:
        return None
    return getattr(CONFIG_MAPPING[kind]().get_text_config(), "max_position_embeddings", None)


def gguf_settings(model: nn.Module, architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings that llama.cpp needs in addition to a model's weights and tokenizer.

    Args:
        model: an mlx-lm model of an architecture in WRITTEN.
        architecture: llama.cpp's name for it.

    Returns:
        {key without the architecture's prefix: value, or a list of one per layer}, without the context length, and
        tensors that hold settings.

    Raises:
        InputError: llama.cpp does not support a setting for the architecture; the message has all of them.
    """
    args = text_arguments(model)
    problems: list[str] = []
    own, tensors = WRITTEN[architecture].settings(args, problems)
    if problems:
        raise InputError(
            f"--to gguf: {'; '.join(problems)}: llama.cpp's {architecture} does not support this; use --to peft or hf"
        )
    return _shared_settings(args) | own, tensors


def _shared_settings(args: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all architectures have; a family's own settings override them."""
    settings: dict[str, Any] = {
        "block_count": args["num_hidden_layers"],
        "embedding_length": args["hidden_size"],
        "attention.head_count": args["num_attention_heads"],
        "attention.head_count_kv": args["num_key_value_heads"],
        "attention.key_length": args["head_dim"],
        "attention.value_length": args["head_dim"],
        "rope.dimension_count": args["head_dim"],
        "vocab_size": args["vocab_size"],
    }
    if args.get("intermediate_size"):
        settings["feed_forward_length"] = args["intermediate_size"]
    if "rms_norm_eps" in args:
        settings["attention.layer_norm_rms_epsilon"] = float(args["rms_norm_eps"])
    if "rope_theta" in args:
        settings["rope.freq_base"] = float(args["rope_theta"])
    return settings

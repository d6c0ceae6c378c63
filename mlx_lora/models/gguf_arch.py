"""The architectures that are read from GGUF and written as it, and what each tensor of their files is to mlx-lm.

One row per name that llama.cpp has; what a row says is in the family's own file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.nn as nn

from mlx_lora.models.fingerprint import FUSED_KEY
from mlx_lora.models.gguf_dense import GEMMA3, LLAMA, PHI3, QWEN2, QWEN3
from mlx_lora.models.gguf_experts import GPT_OSS, QWEN3_MOE
from mlx_lora.models.gguf_family import Family
from mlx_lora.models.gguf_gemma4 import GEMMA4
from mlx_lora.models.gguf_hybrid import LFM2, QWEN35, QWEN35_MOE
from mlx_lora.models.gguf_keys import Settings, shared_fields
from mlx_lora.models.gguf_places import Weight
from mlx_lora.sources.gguf_reader import GGUFFile
from mlx_lora.system.errors import InputError

ARCHITECTURES: dict[str, Family] = {
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
# One tensor that some files have for two: the second's rows after the first's.
JOINED = {"ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")}


def gguf_architecture(file: GGUFFile) -> Family:
    """Return the table's row for a file.

    Raises:
        InputError: for an architecture without one, or one part of a split file.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        shown = f"{str(name)[:40]!r}"
        raise InputError(f"{file.path}: architecture {shown}, known from GGUF are {known}; use its Hugging Face form")
    if str(file.metadata.get("split.count", 0)) not in ("0", "1"):
        raise InputError(f"{file.path}: one part of a split model; join the parts with llama-gguf-split --merge")
    return ARCHITECTURES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that mlx-lm builds this file's model from, without quantization.

    Raises:
        InputError: naming every setting that is missing or that mlx-lm's model cannot express.
    """
    family = gguf_architecture(file)
    settings = Settings(file, file.metadata["general.architecture"])
    config = shared_fields(settings)
    config |= {"model_type": family.model_type, "architectures": [family.model_class]}
    config |= family.fields(settings, config)
    if FUSED_KEY in file.metadata:
        config["mlx_lora"] = {"fused": file.metadata[FUSED_KEY]}
    if settings.problems:
        raise InputError(f"{file.path}: {'; '.join(settings.problems)}; use the model's Hugging Face form")
    return config


def weight_map(file: GGUFFile, config: dict[str, Any]) -> dict[str, Weight]:
    """Return where each tensor of the file goes.

    Args:
        file: the GGUF file.
        config: from `model_config`.

    Returns:
        {GGUF name: Weight}, in the file's order; tensors already turned into config are left out.

    Raises:
        InputError: naming all tensors that mlx-lm's model has no place for, and all that it lacks.
    """
    family = gguf_architecture(file)
    places = _as_in_file(_places(family, config, family.prefix), file)
    if config["tie_word_embeddings"]:
        places.pop("output.weight", None)
    unknown = [
        name
        for name in file.tensors
        if name not in places and name not in family.absorbed and not _left_out(family, config, name)
    ]
    missing = [name for name in places if name not in file.tensors]
    problems = [f"tensors missing: {_listed(missing)}"] if missing else []
    problems += [f"tensors unknown to {family.model_type}: {_listed(unknown)}"] if unknown else []
    if problems:
        raise InputError(f"{file.path}: {'; '.join(problems)}; download it again or use its Hugging Face form")
    return {name: places[name] for name in file.tensors if name in places}


def _as_in_file(places: dict[str, Weight], file: GGUFFile) -> dict[str, Weight]:
    """Put one place where the file has one tensor for two, and two where it has two for one."""
    found = dict(places)
    for layer in {name.rpartition(".ffn_")[0] for name in places if ".ffn_" in name}:
        for whole, parts in JOINED.items():
            joined, (first, second) = f"{layer}.{whole}", (f"{layer}.{part}" for part in parts)
            if joined in places and joined not in file.tensors and first in file.tensors:
                found |= {first: Weight(places[joined].name), second: Weight(*places[joined].then)}
                del found[joined]
            elif first in places and first not in file.tensors and joined in file.tensors:
                found[joined] = Weight(places[first].name, then=(places[second].name,))
                del found[first], found[second]
    return found


def _left_out(family: Family, config: dict[str, Any], name: str) -> bool:
    """Tell whether a file may have a tensor that mlx-lm's model does without."""
    number = name.split(".")[1] if name.startswith("blk.") else ""
    # Layers after the last predict further tokens in one step: llama.cpp's extra, no part of the model's answer.
    return (number.isdigit() and int(number) >= config["num_hidden_layers"]) or family.spare(config, name)


def text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the part of a model that reads text, and the prefix of its parameters' names."""
    return ("language_model.", model["language_model"]) if "language_model" in model else ("", model)


def text_arguments(model: nn.Module) -> dict[str, Any]:
    """Return what mlx-lm built a model from, defaults filled in: of a multimodal one, its text part."""
    args = dataclasses.asdict(text_model(model)[1].args)
    heads = args["num_attention_heads"]
    args["num_key_value_heads"] = args.get("num_key_value_heads") or heads
    args["head_dim"] = args.get("head_dim") or args["hidden_size"] // heads
    return args


def gguf_weights(model: nn.Module) -> tuple[str, dict[str, Weight]]:
    """Return llama.cpp's name of a model's architecture, and every tensor that its files may have.

    Args:
        model: an mlx-lm model, adapted or not.

    Returns:
        The architecture, and {GGUF name: Weight} in the order of a file; a model has those it has.

    Raises:
        InputError: an architecture that is not in the table.
    """
    kind = model.args.model_type
    found = [name for name, family in ARCHITECTURES.items() if kind in (family.model_type, *family.also)]
    if not found:
        known = ", ".join(family.model_type for family in ARCHITECTURES.values())
        raise InputError(f"{kind}: not among the models we write as GGUF ({known})")
    prefix, _ = text_model(model)
    return found[0], _places(ARCHITECTURES[found[0]], text_arguments(model), prefix)


def _places(family: Family, config: dict[str, Any], prefix: str) -> dict[str, Weight]:
    """Return every tensor of an architecture's files, and its place."""
    places = {
        name: Weight(prefix + ours, offset=family.norm_offset if "norm" in name else 0.0)
        for name, ours in family.top(config).items()
    }
    for layer in range(config["num_hidden_layers"]):
        for name, place in family.block(config, layer).items():
            offset = family.norm_offset if "norm" in name else place.offset
            whole, *then = (f"{prefix}model.layers.{layer}.{part}" for part in place.names)
            places[f"blk.{layer}.{name}"] = dataclasses.replace(place, name=whole, then=tuple(then), offset=offset)
    return places


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Build a model without its weights, from a config alone, for the planner.

MLX only computes arrays when they are read. An outline's arrays are never read, so even a 70B model takes hardly any
memory.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.converted_models import has_bits
from mlx_lora.models.converting import build_model, cast_model, quantization_entries
from mlx_lora.models.gguf_arch import model_config, weight_map
from mlx_lora.models.gguf_weights import carried_quantization
from mlx_lora.models.quantize import Quantization, choose_quantization, layer_choice
from mlx_lora.settings.config import ModelSettings
from mlx_lora.sources.gguf_reader import is_gguf, read_gguf
from mlx_lora.sources.hub import resolve_config
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.system.errors import InputError

# safetensors' names of the floats that models are stored in.
STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class Outline:
    """A model's modules, shapes and dtypes.

    Attributes:
        model: an mlx-lm model whose arrays must not be read: they would be computed, and hold noise.
        config: its config.json, or the same made from a GGUF file's header.
        cast_bytes: the bytes of stored floats that are cast to another dtype on loading.
    """

    model: nn.Module
    config: dict[str, Any]
    cast_bytes: int = 0

    @property
    def is_quantized(self) -> bool:
        """Whether the base is quantized."""
        return bool(_quantization(self.config))


def outline_for(settings: ModelSettings, dtype: mx.Dtype) -> Outline:
    """Return the outline of the model that a run loads; errors as for `outline_of`.

    Args:
        settings: of the model; their dtype is not used.
        dtype: the dtype that it will be loaded in.
    """
    return outline_of(settings.model or "", settings.revision, dtype, settings.bits)


def outline_of(
    model: str, revision: str | None = None, dtype: mx.Dtype = mx.bfloat16, bits: int | None = None
) -> Outline:
    """Return the outline of the model that `model` names: a hub id, folder, config.json or .gguf file.

    Args:
        model, revision, bits: as --model, --revision and --bits take them.
        dtype: the dtype that it will be loaded in.

    Raises:
        InputError: there is no such model, its config is invalid, it has other bits, or mlx-lm does not have its
            architecture.
    """
    target = None if bits is None else choose_quantization(bits, None, None)
    path = resolve_config(model, revision)
    if path.is_file() and is_gguf(path):
        outline = _of_gguf(path, dtype)
        return with_quantization(outline, target, dtype) if target else outline
    file = path if path.is_file() else path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a config.json or its folder") from None
    except ValueError:
        raise InputError(f"{file}: not JSON; download it again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{file}: has no model_type; give a language model's config.json")
    names, cast_bytes = _stored(file.parent, dtype) if path.is_dir() else (None, 0)
    outline = outline_of_config(config, dtype, names, cast_bytes)
    if target is None or has_bits(config, target.bits, model):
        return outline
    _quantize(outline.model, target.layout, None)
    cast_model(outline.model, dtype)
    # Quantized files are written in the compute dtype.
    return Outline(outline.model, {**config, "quantization": target.layout})


def outline_of_config(
    config: dict[str, Any], dtype: mx.Dtype, names: frozenset[str] | None = None, cast_bytes: int = 0
) -> Outline:
    """Return the outline of a model from its config.

    Args:
        config: config.json.
        dtype: of its floats.
        names: of its stored tensors, which show which layers are quantized; None: all that can be.
        cast_bytes: see `Outline`.
    """
    built = build_model(config, names)
    cast_model(built, dtype)
    quantization = _quantization(config)
    if quantization:
        _quantize(built, quantization, names)
        cast_model(built, dtype)  # scales too
    return Outline(built, config, cast_bytes)


def with_quantization(outline: Outline, quantization: Quantization, dtype: mx.Dtype) -> Outline:
    """Return the outline that a float model would have if it were quantized, for advice."""
    return outline_of_config({**outline.config, "quantization": quantization.layout}, dtype)


def _quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config's quantization with mlx-lm's keys, None if there is none."""
    if config.get("quantization"):
        return config["quantization"]
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") == "mxfp4":  # GPT-OSS as it is published
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    if stored.get("bits"):
        return {"group_size": stored.get("group_size", 64), "bits": stored["bits"]}
    return None


def _quantize(model: nn.Module, quantization: dict[str, Any], names: frozenset[str] | None) -> None:
    """Quantize lazily, layer by layer as mlx-lm's loader does."""
    own = layer_choice(model)
    mxfp4_experts = quantization.get("mode") == "mxfp4" and names is None

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % quantization["group_size"]:
            return False
        if names is not None:
            return f"{path}.scales" in names
        if mxfp4_experts:  # the published files only quantize the experts
            return "experts" in path or "switch" in path
        return own(path, module)

    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=predicate,
    )


def _stored(folder: Path, dtype: mx.Dtype) -> tuple[frozenset[str] | None, int]:
    """Return the names of a folder's tensors, or None if it has none, and the bytes that loading casts."""
    names: set[str] = set()
    cast = 0
    for file in sorted(folder.glob("model*.safetensors")):
        header = read_safetensors_header(file)
        names |= header.keys()
        for entry in header.values():
            if entry["dtype"] in STORED and STORED[entry["dtype"]] != dtype:
                cast += math.prod(entry["shape"]) * STORED[entry["dtype"]].size
    for file in [] if names else folder.glob("*.safetensors.index.json"):
        try:
            names |= json.loads(file.read_text(encoding="utf-8"))["weight_map"].keys()
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{file}: not a safetensors index; download it again") from None
    return (frozenset(names) or None), cast


def _of_gguf(path: Path, dtype: mx.Dtype) -> Outline:
    """Return the outline of a GGUF file, from its header, as if its blocks were carried over."""
    file = read_gguf(path)
    config = model_config(file)
    mappings = weight_map(file, config)
    quantizations = {
        layer: quantization
        for name, mapping in mappings.items()
        if (quantization := carried_quantization(file.tensors[name], mapping)) is not None
        for layer in mapping.layers
    }
    names = frozenset(name for mapping in mappings.values() for name in mapping.names)
    names |= {f"{layer}.scales" for layer in quantizations}
    return outline_of_config({**config, **quantization_entries(quantizations)}, dtype, names)

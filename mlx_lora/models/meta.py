"""Build a model without its weights (PyTorch's meta device), and read from its modules what the planner needs.

Nothing is computed: MLX arrays have a shape before they are computed, and an outline's arrays are never read. So a model
built from config.json is enough, for every architecture of mlx-lm, and even a 70B model takes hardly any memory.

    Outline        the model without weights, from config.json or from a GGUF file's header
    model_shape    its shape for the planner, from the module tree
    layer_caches   what its layers keep of a row while they generate. The model is called on two tokens: its caches then hold
                   arrays that have a shape, and a dtype, but no numbers. So latent attention, shared keys, sliding windows
                   and recurrent states count as what they are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import activations
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlx_lora.adapters.base import LINEAR, QUANTIZED, SWITCH, base_dims
from mlx_lora.adapters.inject import adapter_layers, block_paths
from mlx_lora.adapters.qat import FakeQuantized
from mlx_lora.compat.functions import original
from mlx_lora.config.settings import ModelSettings
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.models.config import is_encoder
from mlx_lora.models.convert import FLOATS, build_model, cast_model, has_bits, quantization_entries
from mlx_lora.models.folder import FOREIGN_ERRORS, TYPES, of_tower, raise_if_ours, read_safetensors_header, short
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.quantize import AFFINE, MXFP4, QuantFormat, choose_quantization, layer_choice
from mlx_lora.planner.memory import FLAT_UP_TO, Block, Layer, LayerCache, ModelShape, NotKnown
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config

# Models without weights


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
    if path.is_file():
        from mlx_lora.gguf.reader import is_gguf  # a folder's model loads none of it

        if is_gguf(path):
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


def with_quantization(outline: Outline, quantization: QuantFormat, dtype: mx.Dtype) -> Outline:
    """Return the outline that a float model would have if it were quantized, for advice."""
    return outline_of_config({**outline.config, "quantization": quantization.layout}, dtype)


def _quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config's quantization with mlx-lm's keys, None if there is none."""
    if config.get("quantization"):
        return config["quantization"]
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") == MXFP4.mode:  # GPT-OSS as it is published
        return MXFP4.layout
    if stored.get("bits"):
        return {"group_size": stored.get("group_size", 64), "bits": stored["bits"]}
    return None


def _quantize(model: nn.Module, quantization: dict[str, Any], names: frozenset[str] | None) -> None:
    """Quantize lazily, layer by layer as mlx-lm's loader does."""
    own = layer_choice(model)
    mxfp4_experts = quantization.get("mode") == MXFP4.mode and names is None

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
        mode=quantization.get("mode", AFFINE),
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
            if entry["dtype"] in FLOATS and TYPES[entry["dtype"]] != dtype:
                cast += math.prod(entry["shape"]) * TYPES[entry["dtype"]].size
    for file in [] if names else folder.glob("*.safetensors.index.json"):
        try:
            names |= json.loads(file.read_text(encoding="utf-8"))["weight_map"].keys()
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{file}: not a safetensors index; download it again") from None
    return (frozenset(names) or None), cast


def _of_gguf(path: Path, dtype: mx.Dtype) -> Outline:
    """Return the outline of a GGUF file, from its header, as if its blocks were carried over."""
    from mlx_lora.gguf.arch import model_config, weight_map  # a folder's model loads none of these
    from mlx_lora.gguf.reader import read_gguf
    from mlx_lora.gguf.weights import carried_quantization

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


# The shape of a model


def model_shape(model: nn.Module, config: Mapping[str, Any], source_bytes: int = 0, copies: int = 0) -> ModelShape:
    """Return the shape of a model with its adapter.

    Args:
        model: an mlx-lm model with or without adapters; its arrays need not be computed yet.
        config: its config.json.
        source_bytes: see `ModelShape`.
        copies: the number of frozen copies of the factors that the method will keep, if the model has none yet.
    """
    text = {**config, **config.get("text_config", {})}
    head = find_head(model, dict(config))
    trained = dict(tree_flatten(model.trainable_parameters()))
    frozen = [(name, p) for name, p in tree_flatten(model.parameters()) if name not in trained]
    layers, windows = adapter_layers(model), _windows(model)
    # The frozen arrays that a method keeps in the adapter layers in addition to the trained factors.
    beside = sum(p.nbytes for name, p in frozen if name.rpartition(".")[0] in layers)
    numbers = sum(p.size for p in trained.values())
    # Parameters trained in full that are not float32 have a copy in their dtype in addition to the float32 master.
    narrow = sum(p.nbytes for p in trained.values() if p.dtype.size < 4)
    blocks = tuple(f"{path}." for path in block_paths(model))
    outside = [layer.base for path, layer in layers.items() if not path.startswith(blocks)]  # such as an adapted head
    whole = isinstance(head, Head)
    heads = [head.layer] if whole else outside
    widths = (base_dims(m)[0] for m in model.layers[0].modules() if isinstance(m, LINEAR))
    return ModelShape(
        model_type=str(config.get("model_type")),
        width=text.get("hidden_size") or next(widths, 0),
        vocabulary=head.vocabulary if whole else text.get("vocab_size", 0),
        blocks=tuple(_block(block, text, window) for block, window in zip(model.layers, windows, strict=True)),
        base_bytes=sum(p.nbytes for _, p in frozen) - beside + narrow,
        trained=numbers,
        trained_arrays=len(trained),
        trained_alone=sum(p.size for p in trained.values() if p.size > FLAT_UP_TO),
        frozen_adapter_bytes=max(beside, 4 * numbers * copies),
        first_trained=_first_trained(model, trained),
        head_packed=any(isinstance(layer, QUANTIZED) for layer in heads),
        plain_loss=not whole,
        source_bytes=source_bytes,
        parameters=count_parameters(model),
        most_tokens=model.args.longest if is_encoder(model) else 0,
    )


def count_parameters(model: nn.Module) -> int:
    """Return the number of a model's own parameters: packed weights unpacked, a tied embedding once, no adapter's."""
    layers = adapter_layers(model)
    packed = {path: module for path, module in model.named_modules() if isinstance(module, QUANTIZED)}
    total = 0
    for name, p in tree_flatten(model.parameters()):
        path, _, own = name.rpartition(".")
        if path in packed:
            total += p.size * 32 // packed[path].bits if own == "weight" else p.size * (own == "bias")
        elif path not in layers:
            total += p.size
    return total


def _first_trained(model: nn.Module, trained: Mapping[str, Any]) -> int:
    """Return the first block that a gradient must reach; 0 if something before the blocks is trained."""
    if any(of_tower(name) for name in trained):
        return 0
    with_own = [index for index, block in enumerate(model.layers) if tree_flatten(block.trainable_parameters())]
    in_blocks = sum(len(tree_flatten(block.trainable_parameters())) for block in model.layers)
    outside = [name for name in trained if ".layers." not in name and not name.startswith("layers.")]
    before = len(trained) != in_blocks and any("embed" in name for name in outside)
    return 0 if before else min(with_own, default=len(model.layers))


def _windows(model: nn.Module) -> list[int | None]:
    """Return the window of each block's attention, None for one without: the caches of generation tell it, if there are any."""
    try:
        found = [_window(cache) for cache in make_prompt_cache(model)]
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        found = []
    return found if len(found) == len(model.layers) else [None] * len(model.layers)


def _window(cache: Any) -> int | None:
    if isinstance(cache, CacheList):
        return next((found for part in cache.caches if (found := _window(part)) is not None), None)
    return cache.max_size if isinstance(cache, RotatingKVCache) else None


def _block(block: nn.Module, config: Mapping[str, Any], window: int | None) -> Block:
    """Return one block's shape."""
    adapted = {id(layer.base): layer for layer in adapter_layers(block).values()}
    active = config.get("num_experts_per_tok") or config.get("moe_topk") or 1
    layers = []
    for path, module in block.named_modules():
        if not isinstance(module, (*LINEAR, *SWITCH)):
            continue
        parent, _, name = path.removesuffix(".linear").rpartition(".")
        experts = module.weight.shape[0] if isinstance(module, SWITCH) else 1
        adapter = adapted.get(id(module))
        layers.append(
            Layer(
                parent,
                name,
                *base_dims(module),
                experts=experts,
                active=active if experts > 1 else 1,
                packed=isinstance(module, QUANTIZED),
                rank=adapter.rank if adapter else 0,
                keeps_product=adapter is not None and adapter.KEEPS_PRODUCT,
                rounds_to=module.mode if isinstance(adapter, FakeQuantized) else None,
            )
        )
    layers.sort(key=lambda layer: layer.is_end)  # the end of a branch last, for any order in the module
    attends = any("attn" in layer.parent or "attention" in layer.parent for layer in layers)
    heads = int(config.get("num_attention_heads") or 0) if attends else 0
    norms = [m.weight.size for m in block.modules() if type(m).__name__.endswith("Norm") and "weight" in m]
    # Whether the block's modules use the gated activation that training replaces (kernels/choose.py).
    homes, own = {sys.modules[type(module).__module__] for module in block.modules()}, original(activations, "swiglu")
    gated = "silu" if any(original(home, "swiglu") is own for home in homes) else "other"
    width = config.get("head_dim") or config.get("v_head_dim") or config.get("hidden_size", 0) // (heads or 1)
    return Block(
        layers=tuple(layers),
        norms=tuple(norms),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads) if attends else 0,
        head_width=int(width) if heads else 0,
        gated=gated,
        window=window if attends else None,
    )


# What layers keep of a row


def layer_caches(model: nn.Module) -> tuple[LayerCache, ...]:
    """Return what each layer keeps of a row.

    Args:
        model: an mlx-lm model with or without adapters; its arrays need not be computed yet.

    Raises:
        NotKnown: the model cannot be called, or one of its caches cannot be read.
    """
    training = model.training
    model.eval()
    try:
        with left_unchanged(model):
            caches = make_prompt_cache(model)
            model(mx.zeros((1, 2), mx.int32), cache=caches)
            return tuple(found for cache in caches for found in _kept_by(cache))
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        raise NotKnown(f"keys and values of answers: {short(error, 100)}") from error
    finally:
        model.train(training)


def _kept_by(cache: Any) -> list[LayerCache]:
    """Return what a cache keeps, one for each part of it."""
    if isinstance(cache, CacheList):
        return [found for part in cache.caches for found in _kept_by(part)]
    if not isinstance(cache, KVCache | RotatingKVCache):
        return [LayerCache(fixed_bytes=cache.nbytes)]
    if cache.keys is None or cache.values is None:  # the layer uses another one's
        return []
    token_bytes = sum(array.nbytes // array.shape[2] for array in (cache.keys, cache.values))
    return [LayerCache(token_bytes, cache.max_size if isinstance(cache, RotatingKVCache) else None)]

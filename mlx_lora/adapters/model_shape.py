"""Read a model's shape for the planner from the module tree, for every architecture of mlx-lm.

Nothing is computed: MLX arrays have a shape before they are computed, so a model built from config.json is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import activations

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.parts import LINEAR, QUANTIZED, SWITCH, base_dims
from mlx_lora.models.head import Head, find_head
from mlx_lora.planner.shapes import Block, Layer, ModelShape


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
    layers = adapter_layers(model)
    # The frozen arrays that a method keeps in the adapter layers in addition to the trained factors.
    beside = sum(p.nbytes for name, p in frozen if name.rpartition(".")[0] in layers)
    numbers = sum(p.size for p in trained.values())
    # Parameters trained in full that are not float32 have a copy in their dtype in addition to the float32 master.
    narrow = sum(p.nbytes for p in trained.values() if p.dtype.size < 4)
    whole = isinstance(head, Head)
    return ModelShape(
        model_type=str(config.get("model_type")),
        width=text.get("hidden_size") or _first_width(model),
        vocabulary=head.vocabulary if whole else text.get("vocab_size", 0),
        blocks=tuple(_block(block, text) for block in model.layers),
        base_bytes=sum(p.nbytes for _, p in frozen) - beside + narrow,
        trained=numbers,
        trained_arrays=len(trained),
        frozen_adapter_bytes=max(beside, 4 * numbers * copies),
        first_trained=_first_trained(model, trained),
        head_packed=whole and isinstance(head.layer, QUANTIZED),
        plain_loss=not whole,
        source_bytes=source_bytes,
        parameters=count_parameters(model),
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


def _first_width(model: nn.Module) -> int:
    return next((base_dims(m)[0] for m in model.layers[0].modules() if isinstance(m, LINEAR)), 0)


def _first_trained(model: nn.Module, trained: Mapping[str, Any]) -> int:
    """Return the first block that a gradient must reach; 0 if something before the blocks is trained."""
    with_own = [index for index, block in enumerate(model.layers) if tree_flatten(block.trainable_parameters())]
    in_blocks = sum(len(tree_flatten(block.trainable_parameters())) for block in model.layers)
    outside = [name for name in trained if ".layers." not in name and not name.startswith("layers.")]
    before = len(trained) != in_blocks and any("embed" in name for name in outside)
    return 0 if before else min(with_own, default=len(model.layers))


def _block(block: nn.Module, config: Mapping[str, Any]) -> Block:
    """Return one block's shape."""
    adapted = {id(layer.base): (layer.rank, layer.KEEPS_PRODUCT) for layer in adapter_layers(block).values()}
    active = config.get("num_experts_per_tok") or config.get("moe_topk") or 1
    layers = []
    for path, module in block.named_modules():
        if not isinstance(module, (*LINEAR, *SWITCH)):
            continue
        parent, _, name = path.removesuffix(".linear").rpartition(".")
        experts = module.weight.shape[0] if isinstance(module, SWITCH) else 1
        rank, keeps_product = adapted.get(id(module), (0, False))
        layers.append(
            Layer(
                parent,
                name,
                *base_dims(module),
                experts=experts,
                active=active if experts > 1 else 1,
                packed=isinstance(module, QUANTIZED),
                rank=rank,
                keeps_product=keeps_product,
            )
        )
    layers.sort(key=lambda layer: layer.is_end)  # the end of a branch last, for any order in the module
    attends = any("attn" in layer.parent or "attention" in layer.parent for layer in layers)
    heads = int(config.get("num_attention_heads") or 0) if attends else 0
    norms = [m.weight.size for m in block.modules() if type(m).__name__.endswith("Norm") and "weight" in m]
    return Block(
        layers=tuple(layers),
        norms=tuple(norms),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads) if attends else 0,
        head_width=_head_width(config, heads),
        gated="silu" if _has_lean_activation(block) else "other",
        window=config.get("sliding_window") if attends else None,
    )


def _head_width(config: Mapping[str, Any], heads: int) -> int:
    if not heads:
        return 0
    return int(config.get("head_dim") or config.get("v_head_dim") or config.get("hidden_size", 0) // heads)


def _has_lean_activation(block: nn.Module) -> bool:
    """Return whether the block's modules use the gated activation that training replaces (models/kernels.py)."""
    homes = (vars(sys.modules[type(module).__module__]) for module in block.modules())
    return any(home.get("swiglu") is activations.swiglu for home in homes)

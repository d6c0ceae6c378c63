"""Read and write what PEFT trains in full in addition to a LoRA: modules_to_save and biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.parts import QUANTIZED, dense_weight, is_parameter
from mlx_lora.artifacts.peft_families import folded_rows
from mlx_lora.artifacts.peft_names import BIAS, PREFIX, TENSOR, own_path, peft_path


def full_tensors(config: dict[str, Any], names: Iterable[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Split tensor names into name -> (layer, leaf) of parameters trained in full, and all others."""
    saved = config.get("modules_to_save") or []
    full, others = {}, []
    for name in names:
        layer, _, leaf = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").rpartition(".")
        bias = BIAS.fullmatch(name)
        # This is PEFT's rule: `norm` matches every name that ends with it.
        if any(layer.endswith(module) for module in saved) and not TENSOR.fullmatch(name):
            full[name] = layer, leaf
        elif bias and config.get("bias", "none") != "none":
            full[name] = bias["layer"], "bias"
        else:
            others.append(name)
    return full, others


def full_problems(
    saved: list[str], full: dict[str, tuple[str, str]], modules: dict[str, nn.Module], header: dict[str, Any]
) -> list[str]:
    """Return parameters trained in full that the model does not have, or has with another shape."""
    layers = {layer for layer, _ in full.values()}
    problems = [
        f"modules_to_save {module}: the adapter's file does not have this module"
        for module in saved
        if not any(layer.endswith(module) for layer in layers)
    ]
    tied = "lm_head" not in modules
    for name, (layer, leaf) in full.items():
        path = own_path(layer, modules)
        if layer == "lm_head" and tied:
            if not any(other.endswith("embed_tokens") for other in layers):
                problems.append(
                    "modules_to_save lm_head: trained separately from the embedding, to which it is tied here"
                )
            continue
        if path is None or not is_parameter(modules[path], leaf):
            problems.append(f"{layer}.{leaf} is not in the model")
            continue
        base = modules[path]
        needed = dense_weight(base).shape if leaf == "weight" and isinstance(base, QUANTIZED) else base[leaf].shape
        if tuple(header[name]["shape"]) != needed:
            problems.append(f"{layer}.{leaf} is {tuple(header[name]['shape'])}, the model needs {needed}")
        if tied and layer.endswith("embed_tokens") and "lm_head" not in layers:
            problems.append(f"modules_to_save {layer}: trained separately from the head, to which it is tied here")
    return problems


def full_values(
    full: dict[str, tuple[str, str]], stored: dict[str, mx.array], model: nn.Module
) -> dict[tuple[str, str], mx.array]:
    """Return (our path, leaf) -> parameter trained in full, in our model's layout.

    Args:
        full: as returned by `full_tensors`.
        stored: tensors of the file.
        model: the base.
    """
    modules, values = dict(model.named_modules()), {}
    for name, (layer, leaf) in full.items():
        path = own_path(layer, modules)
        if path is None:  # a tied head's weight is the embedding's
            continue
        folded = folded_rows(model, path, len(stored[name])) if leaf == "weight" else None
        values[path, leaf] = stored[name] if folded is None else stored[name] * folded
    return values


def full_for_peft(model: nn.Module, full: tuple[str, ...], tied: bool) -> tuple[dict[str, mx.array], list[str], str]:
    """Return tensors with PEFT's names, its modules_to_save, and its bias setting."""
    parameters = dict(tree_flatten(model.parameters()))
    tensors: dict[str, mx.array] = {}
    weights = {name.rpartition(".")[0] for name in full if name.endswith(".weight")}
    kind = model.model_type
    saved = {peft_path(path, kind) for path in weights}
    adapted = []
    for name in full:
        path, _, leaf = name.rpartition(".")
        inside = path.endswith((".linear", ".embedding"))
        adapted.append(inside)
        plain = path.rpartition(".")[0] if inside else path
        own = peft_path(plain, kind) + (".base_layer" if inside else "")
        value = parameters[name]
        folded = folded_rows(model, plain, len(value)) if leaf == "weight" else None
        tensors[f"{PREFIX}{own}.{leaf}"] = value if folded is None else value / folded
        if tied and path.endswith("embed_tokens"):
            saved.add("lm_head")
            tensors[f"{PREFIX}lm_head.weight"] = mx.array(tensors[f"{PREFIX}{own}.{leaf}"])
    biases = [inside for name, inside in zip(full, adapted, strict=True) if name.rpartition(".")[0] not in weights]
    return tensors, sorted(saved), "none" if not biases else "lora_only" if all(biases) else "all"

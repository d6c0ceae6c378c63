"""Read and write the parameters that a PEFT adapter trains in full: modules_to_save and biases.

PEFT keeps a copy of each module in modules_to_save, and `norm` is every name that ends with it. A tied embedding and head
are one matrix in MLX, and two copies in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import QUANTIZED, dense_weight, is_parameter
from mlx_lora.exporters.adapter_config import SEQ_CLS
from mlx_lora.exporters.peft_experts import BIAS, PREFIX, TENSOR, folded_rows, own_path, peft_path
from mlx_lora.models.tower_files import of_tower

# A weight with more axes is a convolution's, whose channels are last here and second in torch.
LINEAR_AXES = 3
HEADS_OF_SEQ_CLS = ("classifier", "score")
SHIFTED_KINDS = ("qwen3_5", "qwen3_next")
SHIFTED_NORMS = (".input_layernorm", ".post_attention_layernorm", ".model.norm", ".q_norm", ".k_norm")


def full_tensors(config: dict[str, Any], names: Iterable[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Split tensor names into name -> (layer, leaf) of parameters trained in full, and all others."""
    saved = config.get("modules_to_save") or []
    full, others = {}, []
    for name in names:
        layer, _, leaf = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").rpartition(".")
        bias = BIAS.fullmatch(name)
        if any(_is_saved(layer, module) for module in saved) and not TENSOR.fullmatch(name):
            full[name] = layer, leaf
        elif bias and config.get("bias", "none") != "none":
            full[name] = bias["layer"], "bias"
        else:
            others.append(name)
    return full, others


def saved_modules(config: dict[str, Any], full: dict[str, tuple[str, str]]) -> list[str]:
    """Return modules_to_save, without the names of heads that PEFT adds for SEQ_CLS whatever the model calls its own.

    Args:
        config: adapter_config.json.
        full: as returned by `full_tensors`.
    """
    saved = config.get("modules_to_save") or []
    there = {layer for layer, _ in full.values()}
    heads = [name for name in HEADS_OF_SEQ_CLS if any(_is_saved(layer, name) for layer in there)]
    if config.get("task_type") != SEQ_CLS or not heads:
        return saved
    return [name for name in saved if name in heads or name not in HEADS_OF_SEQ_CLS]


def _is_saved(layer: str, module: str) -> bool:
    """Return whether a layer is, or is in, a module of modules_to_save; in PEFT `norm` is every name that ends with it."""
    return layer.endswith(module) or f".{module}." in f".{layer}."


def full_problems(
    saved: list[str], full: dict[str, tuple[str, str]], modules: dict[str, nn.Module], header: dict[str, Any]
) -> list[str]:
    """Return parameters trained in full that the model does not have, or has with another shape."""
    layers = {layer for layer, _ in full.values()}
    problems = [
        f"modules_to_save {module}: the adapter's file does not have this module"
        for module in saved
        if not any(_is_saved(layer, module) for layer in layers)
    ]
    tied = own_path("lm_head", modules) is None
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
        if of_tower(path) and len(needed) > LINEAR_AXES:
            needed = (needed[0], needed[-1], *needed[1:-1])
        if tuple(header[name]["shape"]) != needed:
            problems.append(f"{layer}.{leaf} is {tuple(header[name]['shape'])}, the model needs {needed}")
        if tied and layer.endswith("embed_tokens") and "lm_head" not in layers:
            problems.append(f"modules_to_save {layer}: trained separately from the head, to which it is tied here")
    return problems


def head_problems(
    full: dict[str, tuple[str, str]], stored: dict[str, mx.array], modules: dict[str, nn.Module]
) -> list[str]:
    """Return that embedding and head were trained to different weights, as PEFT does by default, and are one matrix here."""
    own = {layer.rpartition(".")[2]: stored[name] for name, (layer, leaf) in full.items() if leaf == "weight"}
    head, table = own.get("lm_head"), own.get("embed_tokens")
    if head is None or table is None or own_path("lm_head", modules) or mx.array_equal(head, table).item():
        return []
    return [
        "modules_to_save embed_tokens, lm_head: trained to different weights, and they are tied here; train with PEFT's "
        "ensure_weight_tying=True"
    ]


def shift_of(kind: str, path: str, leaf: str) -> float:
    """Return what mlx-lm adds to a parameter when it loads a published model: 1 to norms that compute x (1 + w).

    Args:
        kind: the model's type.
        path: mlx-lm's, of the layer.
        leaf: of the parameter.
    """
    if leaf != "weight":
        return 0.0
    if kind == "step3p5":
        return float("norm" in path)
    return float(kind.startswith(SHIFTED_KINDS) and f".{path}".endswith(SHIFTED_NORMS))


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
        value = stored[name] if folded is None else stored[name] * folded
        values[path, leaf] = value + shift_of(model.model_type, path, leaf)
        if of_tower(path) and stored[name].ndim > LINEAR_AXES:
            values[path, leaf] = mx.moveaxis(stored[name], 1, -1)
    return values


def full_for_peft(model: nn.Module, full: tuple[str, ...], tied: bool) -> tuple[dict[str, mx.array], list[str], str]:
    """Return tensors with PEFT's names, its modules_to_save, and its bias setting."""
    parameters = dict(tree_flatten(model.parameters()))
    tensors: dict[str, mx.array] = {}
    weights = {name.rpartition(".")[0] for name in full if name.endswith(".weight")}
    kind = model.model_type
    tower, full = [n for n in full if of_tower(n)], tuple(n for n in full if not of_tower(n))
    weights = {path for path in weights if not of_tower(path)}
    saved = {peft_path(path, kind) for path in (*weights, *_whole_modules(model, tower, kind))}
    for name in tower:
        path, _, leaf = name.rpartition(".")
        value = parameters[name]
        value = mx.moveaxis(value, -1, 1) if value.ndim > LINEAR_AXES else value
        tensors[f"{PREFIX}{peft_path(path, kind)}.{leaf}"] = value
    adapted = []
    for name in full:
        path, _, leaf = name.rpartition(".")
        inside = path.endswith((".linear", ".embedding"))
        adapted.append(inside)
        plain = path.rpartition(".")[0] if inside else path
        own = peft_path(plain, kind) + (".base_layer" if inside else "")
        value = parameters[name] - shift_of(kind, plain, leaf)
        folded = folded_rows(model, plain, len(value)) if leaf == "weight" else None
        tensors[f"{PREFIX}{own}.{leaf}"] = value if folded is None else value / folded
        if tied and path.endswith("embed_tokens"):
            saved.add("lm_head")
            tensors[f"{PREFIX}lm_head.weight"] = mx.array(tensors[f"{PREFIX}{own}.{leaf}"])
    biases = [inside for name, inside in zip(full, adapted, strict=True) if name.rpartition(".")[0] not in weights]
    # All of a RoBERTa's head is one module, which PEFT saves by itself.
    saved = {"classifier" if name.startswith("classifier.") else name for name in saved}
    return tensors, sorted(saved), "none" if not biases else "lora_only" if all(biases) else "all"


def _whole_modules(model: nn.Module, names: Sequence[str], kind: str) -> list[str]:
    """Return the outermost modules of a tower that have exactly these parameters, and that transformers has, too."""
    found: list[str] = []
    for path, module in sorted(model.named_modules(), key=lambda item: len(item[0])):
        own = [f"{path}.{name}" for name, _ in tree_flatten(module.parameters())]
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if of_tower(path) and not inside and own and set(own) <= set(names) and peft_path(path, kind) != path:
            found.append(path)
    return found

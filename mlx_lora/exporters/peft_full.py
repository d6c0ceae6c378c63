"""Read and write the parameters that a PEFT adapter trains in full: modules_to_save and biases.

PEFT keeps a copy of each module in modules_to_save, and `norm` is every name that ends with it. A tied embedding and head
are one matrix in MLX, and two copies in PEFT, or with its `ensure_weight_tying`, one that its file has under both names.

Two kinds of weights have other axes in torch: convolutions, and GPT-2's layers, which are (in, out) there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import QUANTIZED, SWITCH, dense_weight, is_parameter
from mlx_lora.exporters.adapter_config import SEQ_CLS
from mlx_lora.exporters.peft_experts import BIAS, PREFIX, TENSOR, folded_rows, own_path, peft_path
from mlx_lora.models.tower_files import of_tower
from mlx_lora.utils.errors import InputError

# A tower's weight with more axes is a convolution's, whose channels are last here and second in torch.
LINEAR_AXES = 3
INPUTS_FIRST = {"gpt2": (".c_attn", ".c_proj", ".c_fc")}  # transformers' Conv1D
HEADS_OF_SEQ_CLS = ("classifier", "score")
SHIFTED_KINDS = ("qwen3_5", "qwen3_next")
SHIFTED_NORMS = (".input_layernorm", ".post_attention_layernorm", ".model.norm", ".q_norm", ".k_norm")


def full_tensors(
    config: dict[str, Any], names: Iterable[str], modules: dict[str, nn.Module], tied: str | None
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Split tensor names into name -> (layer, leaf) of parameters trained in full, and all others.

    Args:
        config: adapter_config.json.
        names: of the file's tensors.
        modules: of the model, by path.
        tied: path of the embedding that is the head, too; None: there is none.
    """
    saved, names = config.get("modules_to_save") or [], list(names)
    paths = {own_path(layer, modules) for layer in _saved_in(saved, names)}
    if config.get("ensure_weight_tying") and tied and tied in paths:
        saved = [*saved, "lm_head"]
    full, others = {}, []
    for name in names:
        layer, leaf = _layer_and_leaf(name)
        bias = BIAS.fullmatch(name)
        if any(_is_saved(layer, module) for module in saved) and not TENSOR.fullmatch(name):
            full[name] = layer, leaf
        elif bias and config.get("bias", "none") != "none":
            full[name] = bias["layer"], "bias"
        else:
            others.append(name)
    return full, others


def _saved_in(saved: Sequence[str], names: Iterable[str]) -> set[str]:
    """Return the layers in modules_to_save, or in a module there, that these tensors are of."""
    layers = {_layer_and_leaf(name)[0] for name in names if not TENSOR.fullmatch(name)}
    return {layer for layer in layers if any(_is_saved(layer, module) for module in saved)}


def _layer_and_leaf(name: str) -> tuple[str, str]:
    layer, _, leaf = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").rpartition(".")
    return layer, leaf


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
    config: dict[str, Any],
    full: dict[str, tuple[str, str]],
    model: nn.Module,
    header: dict[str, Any],
    tied: str | None,
) -> list[str]:
    """Return parameters trained in full that the model does not have, or has with another shape.

    Args:
        config: adapter_config.json.
        full: as returned by `full_tensors`.
        model: the base.
        header: of the tensors' file.
        tied: as for `full_tensors`.
    """
    modules, layers = dict(model.named_modules()), {layer for layer, _ in full.values()}
    problems = [
        f"modules_to_save {module}: the adapter's file does not have this module"
        for module in saved_modules(config, full)
        if not any(_is_saved(layer, module) for layer in layers)
    ]
    for name, (layer, leaf) in full.items():
        path = own_path(layer, modules)
        if layer == "lm_head" and tied:
            if not any(own_path(other, modules) == tied for other in layers):
                problems.append(
                    "modules_to_save lm_head: trained separately from the embedding, to which it is tied here"
                )
            continue
        if path is None or not is_parameter(modules[path], leaf):
            problems.append(f"{layer}.{leaf} is not in the model")
            continue
        base = modules[path]
        needed = dense_weight(base).shape if leaf == "weight" and isinstance(base, QUANTIZED) else base[leaf].shape
        if axes := _torch_axes(model.model_type, path, leaf, base):
            needed = _moved(needed, axes)
        if tuple(header[name]["shape"]) != needed:
            problems.append(f"{layer}.{leaf} is {tuple(header[name]['shape'])}, the model needs {needed}")
        ties = config.get("ensure_weight_tying") and _peft_ties(layer)
        if path == tied and "lm_head" not in layers and not ties:
            problems.append(f"modules_to_save {layer}: trained separately from the head, to which it is tied here")
    return problems


def head_problems(
    full: dict[str, tuple[str, str]], stored: dict[str, mx.array], modules: dict[str, nn.Module], tied: str | None
) -> list[str]:
    """Return that embedding and head were trained to different weights, as PEFT does by default, and are one matrix here."""
    own = {layer: stored[name] for name, (layer, leaf) in full.items() if leaf == "weight"}
    layer = next((layer for layer in own if tied and own_path(layer, modules) == tied), None)
    if layer is None or "lm_head" not in own or mx.array_equal(own["lm_head"], own[layer]).item():
        return []
    advice = "train with PEFT's ensure_weight_tying=True" if _peft_ties(layer) else "train neither of them in full"
    return [f"modules_to_save {layer}, lm_head: trained to different weights, and they are tied here; {advice}"]


def _peft_ties(layer: str) -> bool:
    """Return whether ensure_weight_tying has an effect on an embedding; PEFT knows it by this name only."""
    return layer.endswith("embed_tokens")


def check_full(model: nn.Module, full: Sequence[str]) -> None:
    """Refuse parameters of a mixture's experts that were trained in full: they are no modules in transformers.

    Args:
        model: adapted.
        full: names of parameters trained in full.

    Raises:
        InputError: there are some.
    """
    modules = dict(model.named_modules())
    if lost := [name for name in full if isinstance(modules.get(name.rpartition(".")[0]), SWITCH)]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"--to peft: {lost[0].replace('.linear.', '.')}{more}: trained in full, and PEFT saves no whole experts; fuse the adapter, or train "
            "without them (--modules-to-save, --bias)"
        )


# Axes and constants that differ in torch


def _torch_axes(kind: str, path: str, leaf: str, module: nn.Module) -> tuple[int, int] | None:
    """Return which axis of a parameter is moved where in torch; None if all are in the same place.

    Args:
        kind: the model's type.
        path: mlx-lm's, of the layer.
        leaf: of the parameter.
        module: at that path.
    """
    if leaf != "weight":
        return None
    if isinstance(module, nn.Conv1d) or (of_tower(path) and module[leaf].ndim > LINEAR_AXES):
        return -1, 1
    return (-1, 0) if path.endswith(INPUTS_FIRST.get(kind, ())) else None


def _moved(shape: Sequence[int], axes: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of an array after `moveaxis`."""
    rest = list(shape)
    moved = rest.pop(axes[0])
    rest.insert(axes[1], moved)
    return tuple(rest)


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
        value = stored[name]
        if axes := _torch_axes(model.model_type, path, leaf, modules[path]):
            value = mx.moveaxis(value, axes[1], axes[0])
        folded = folded_rows(model, path, len(value)) if leaf == "weight" else None
        value = value if folded is None else value * folded
        values[path, leaf] = value + shift_of(model.model_type, path, leaf)
    return values


def full_for_peft(
    model: nn.Module, full: tuple[str, ...], tied: str | None
) -> tuple[dict[str, mx.array], list[str], str]:
    """Return tensors with PEFT's names, its modules_to_save, and its bias setting; `tied` as for `full_tensors`."""
    parameters, modules = dict(tree_flatten(model.parameters())), dict(model.named_modules())
    tensors: dict[str, mx.array] = {}
    weights = {name.rpartition(".")[0] for name in full if name.endswith(".weight")}
    kind = model.model_type
    tower, full = [n for n in full if of_tower(n)], tuple(n for n in full if not of_tower(n))
    weights = {path for path in weights if not of_tower(path)}
    saved = {peft_path(path, kind) for path in (*weights, *_whole_modules(model, tower, kind))}
    for name in tower:
        path, _, leaf = name.rpartition(".")
        axes = _torch_axes(kind, path, leaf, modules[path])
        value = parameters[name] if axes is None else mx.moveaxis(parameters[name], *axes)
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
        value = value if folded is None else value / folded
        axes = _torch_axes(kind, plain, leaf, modules[path])
        tensors[f"{PREFIX}{own}.{leaf}"] = value if axes is None else mx.moveaxis(value, *axes)
        if path == tied:
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

"""Read and write PEFT's adapter folders.

adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (r, in), .lora_B.weight (out, r); for an
                            embedding .lora_embedding_A (r, vocabulary), .lora_embedding_B (width, r);
                            for DoRA .lora_magnitude_vector.weight (out,) as well; for AdaLoRA .lora_A, .lora_B
                            and the gains .lora_E (r, 1)
                            what is trained in full (modules_to_save and biases) under its own names
adapter_config.json         r, lora_alpha, their patterns by layer, use_rslora, target_modules, modules_to_save, bias

Both factors are the transposes of ours. A setting that we do not support is an error that names it; none is ignored.

A tied head and the embedding are one weight. Our adapter changes both; PEFT adapts the embedding (`embed_tokens`, in GPT-2
`wte`) and `lm_head` separately. So our adapter is written as two adapters with the same factors, and if a PEFT adapter has
only the embedding's, our head is not adapted.

Source: huggingface/peft, LoraConfig and get_peft_model_state_dict.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import (
    EMBEDDING,
    LINEAR,
    QUANTIZED,
    SWITCH,
    AdapterLayer,
    base_dims,
    dense_weight,
)
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.qa_lora import group_update
from mlx_lora.adapters.targets import adapter_class
from mlx_lora.exporters.adapter_config import SEQ_CLS, classifier_of, peft_problems
from mlx_lora.exporters.peft_experts import (
    COPY,
    EXPERT_LAYOUTS,
    PREFIX,
    TENSOR,
    ExpertTensor,
    check_reached,
    expert_tensors,
    folded_rows,
    names_layer,
    own_path,
    peft_path,
    rank_problems,
    take_experts,
)
from mlx_lora.exporters.peft_full import (
    check_full,
    full_for_peft,
    full_problems,
    full_tensors,
    full_values,
    head_problems,
)
from mlx_lora.models.folder import read_safetensors_header, save_tensors
from mlx_lora.models.head import SCORE_WEIGHT, tied_embedding
from mlx_lora.models.quantize import relative_error
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replacing_file

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# How much a saved copy of a base weight may differ from ours, in 16 bits or quantized.
FLOAT_COPY, QUANTIZED_COPY = 0.02, 0.3
# Settings that change what the adapter computes, in ways that plain factors cannot express.
UNSUPPORTED = {
    "trainable_token_indices": "single trained tokens",
    "layer_replication": "repeated layers",
    "lora_bias": "a bias in lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal adapter weights",
    "megatron_config": "Megatron layers",
    "arrow_config": "routed adapters",
}
# Initializations that also change the base: such factors do not fit the published base.
CHANGES_BASE = re.compile(r"pissa.*|olora|loftq|corda|lora_ga")


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT LoRA in our layout.

    Attributes:
        factors: path -> (lora_a (in, r), lora_b (r, out)), float32; for experts (E, r, in) and (E, out, r).
        magnitudes: path -> m (out,), for a DoRA; empty for a LoRA.
        shapes: path -> (rank, scale).
        dropout: of every layer.
        base_model: the id that it names.
        leaves_head: path of the adapted embedding whose tied head is not adapted; None: there is none.
        full: (path, name in the module) -> parameter trained in full.
    """

    factors: dict[str, tuple[mx.array, mx.array]]
    magnitudes: dict[str, mx.array]
    shapes: dict[str, tuple[int, float]]
    dropout: float
    base_model: str | None
    leaves_head: str | None
    full: dict[tuple[str, str], mx.array]


def is_peft(config: dict[str, Any]) -> bool:
    """Tell whether an adapter_config.json is PEFT's, not mlx-lm's."""
    return "peft_type" in config


def is_adalora(config: dict[str, Any]) -> bool:
    """Tell whether a PEFT adapter is an AdaLoRA, whose layers have gains, not a LoRA."""
    return str(config.get("peft_type")).upper() == "ADALORA"


def read_peft(folder: Path, config: dict[str, Any], model: nn.Module) -> PeftAdapter:
    """Read a PEFT LoRA folder for `model`.

    Args:
        folder: with adapter_model.safetensors.
        config: its adapter_config.json.
        model: the unadapted base, which has the layers' paths.

    Raises:
        InputError: something is not supported; one message has all problems.
    """
    file = folder / PEFT_WEIGHTS
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(f"{folder}: holds pickled weights only, which can run code; save it with safetensors in PEFT")
    _refuse(folder, peft_problems(config))
    header = read_safetensors_header(file)
    modules = dict(model.named_modules())
    tied = tied_embedding(model)
    full, others = full_tensors(config, header, modules, tied)
    found, copies, strangers = _sorted_tensors(others)
    problems = _unsupported(config, model.model_type) + [f"tensor {name} is not a LoRA factor" for name in strangers]
    problems += full_problems(config, full, model, header, tied)
    experts, unfit = take_experts(model.model_type, found, header, modules)
    problems += unfit
    problems += [] if found or experts else ["it has no LoRA weights"]
    head = found.pop("lm_head", None) if tied else None
    paths: dict[str, Any] = {layer: own_path(layer, modules) for layer in found}
    problems += _missing_problems(config, found, paths)
    problems += _shape_problems(found, paths, modules, header, _qalora_group(config) or 1)
    problems += [] if problems else rank_problems(config, found, header)
    _refuse(folder, problems)
    stored = mx.load(str(file))
    _refuse(folder, _copy_problems(copies, stored, modules, tied) + head_problems(full, stored, modules, tied))
    factors, magnitudes, shapes = {}, {}, {}
    for layer, sides in found.items():
        a, b = (stored[sides[side]].astype(mx.float32).T for side in "AB")
        if group := _qalora_group(config):
            a, b = mx.repeat(a, group, axis=0), b * (a.shape[0] / group)
        if "E" in sides:
            b = stored[sides["E"]].astype(mx.float32) * b  # gains (r, 1)
        folded = folded_rows(model, paths[layer], b.shape[1])
        factors[paths[layer]] = a, b if folded is None else b * folded[:, 0]
        shapes[paths[layer]] = a.shape[1], _scale(config, layer, a.shape[1])
        if "m" in sides:
            m = stored[sides["m"]].astype(mx.float32)
            magnitudes[paths[layer]] = m if folded is None else m * folded[:, 0]
    for one in experts:
        for path, (a, b, scale) in one.factors(stored, partial(_scale, config)).items():
            factors[path], shapes[path] = (a, b), (a.shape[1], scale)
    embedding = next((layer for layer in found if paths[layer] == tied), None)
    if head is not None:
        _refuse(folder, _tied_problems(config, stored, head, embedding, found.get(embedding or "")))
    return PeftAdapter(
        factors,
        magnitudes,
        shapes,
        float(config.get("lora_dropout") or 0.0),
        config.get("base_model_name_or_path"),
        leaves_head=tied if embedding is not None and head is None else None,
        full=full_values(full, stored, model),
    )


def _sorted_tensors(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Sort tensor names into layer -> {A, B, m: name}, name -> layer for saved copies of the base, and all others."""
    found: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    strangers = []
    for name in names:
        match, copy = TENSOR.fullmatch(name.replace(".default.", ".")), COPY.fullmatch(name)
        if match:
            found.setdefault(match["layer"], {})[
                match["side"] or match["embedding"] or match["magnitude"] or match["gains"]
            ] = name
        elif copy:
            copies[name] = copy["layer"]
        else:
            strangers.append(name)
    return found, copies, strangers


def write_peft(
    folder: Path,
    model: nn.Module,
    base_model: str,
    dropout: float,
    full: tuple[str, ...] = (),
    qalora: bool = False,
) -> None:
    """Write the adapter on `model` as a PEFT LoRA folder.

    Args:
        folder: created if missing.
        model: adapted.
        base_model: id or path for PEFT's config.
        dropout: for further training in PEFT.
        full: names of parameters trained in full.
        qalora: write PEFT's QALoRA, which it applies to GPTQ bases only, instead of an ordinary LoRA.

    Raises:
        InputError: nothing is adapted, or PEFT does not have the adapter's layers.
    """
    layers = adapter_layers(model)
    groups = _groups_for_qalora(layers) if qalora else None
    if not layers:
        raise InputError(f"--out {folder}: the model has no adapter to write")
    experts = check_peft(model, full)
    tied = tied_embedding(model)
    tensors: dict[str, mx.array] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for tensor in experts:
        shapes[tensor.parameter] = tensor.rank, tensor.scale
        tensors[f"{PREFIX}{tensor.module}.lora_A.weight"] = tensor.a
        tensors[f"{PREFIX}{tensor.module}.lora_B.weight"] = tensor.b
    for path, layer in layers.items():
        if layer.OVER is SWITCH:
            continue
        folded = folded_rows(model, path, layer.lora_b.shape[1])
        for module, own in layer.to_peft(peft_path(path, model.model_type), folded, path == tied).items():
            shapes[module] = layer.rank, layer.scale
            if groups:
                a, b = own["lora_A.weight"][:, ::groups], own["lora_B.weight"]
                own = {"lora_A.weight": a, "lora_B.weight": b * (groups / a.shape[1])}
            tensors |= {f"{PREFIX}{module}.{name}": tensor for name, tensor in own.items()}
    is_dora = any(".lora_magnitude_vector" in name for name in tensors)
    whole, saved, bias = full_for_peft(model, full, tied)
    tensors = {name: mx.contiguous(array.astype(mx.float32)) for name, array in (tensors | whole).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / PEFT_WEIGHTS) as temporary:
        save_tensors(temporary, tensors, "pt")
    with replacing_file(folder / PEFT_CONFIG) as temporary:
        parameters = [tensor.parameter for tensor in experts]
        config = {**_peft_config(shapes, base_model, dropout, parameters), "use_dora": is_dora, "bias": bias}
        config |= {"modules_to_save": saved} if saved else {}
        config |= {"use_qalora": True, "qalora_group_size": groups} if groups else {}
        if SCORE_WEIGHT in full:
            config["task_type"] = SEQ_CLS
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_peft(model: nn.Module, full: tuple[str, ...] = ()) -> list[ExpertTensor]:
    """Return the adapters of a model's experts in PEFT's layout, if PEFT has all of an adapter's layers.

    Args:
        model: adapted.
        full: names of parameters trained in full.

    Raises:
        InputError: it has not, or there is no adapter.
    """
    layers = adapter_layers(model)
    if not layers:
        raise InputError("--to peft: the model has no adapter")
    apart = [f"{path} {layer.NOT_IN_PEFT}" for path, layer in layers.items() if layer.NOT_IN_PEFT]
    if apart:
        more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
        raise InputError(f"--to peft: {apart[0]}{more}; fuse the adapter instead")
    check_full(model, full)
    check_reached(model.model_type, layers, full)
    if SCORE_WEIGHT in full:
        classifier_of(model.model_type)
    return expert_tensors(model.model_type, layers)


def _groups_for_qalora(layers: dict[str, AdapterLayer]) -> int:
    """Return the group size that all layers have.

    Raises:
        InputError: PEFT's QALoRA cannot hold the adapter.
    """
    sizes = {layer.base.group_size for layer in layers.values() if group_update(layer) is not None}
    other = [path for path, layer in layers.items() if layer.OVER is not LINEAR or group_update(layer) is None]
    if other:
        raise InputError(
            f"--to peft-qalora: {other[0]} is not a QA-LoRA over a linear layer; train with --method qa-lora, or use --to peft"
        )
    if len(sizes) > 1:
        raise InputError(
            f"--to peft-qalora: the base has groups of {', '.join(map(str, sorted(sizes)))}, and PEFT has one size for all "
            "layers; use --to peft"
        )
    return sizes.pop() if sizes else 0


def _peft_config(
    shapes: dict[str, tuple[int, float]], base_model: str, dropout: float, parameters: list[str]
) -> dict[str, Any]:
    """Return adapter_config.json: the most common rank and alpha, and patterns for layers with others.

    PEFT has no dropout for `parameters`, which are bare tensors, and refuses dropout if there are any.
    """
    ((rank, scale), _) = Counter(shapes.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": 0.0 if parameters else dropout,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "target_modules": sorted(shapes.keys() - parameters),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        # PEFT matches keys as regular expressions with the end of a layer's name.
        "rank_pattern": {re.escape(name): r for name, (r, _) in shapes.items() if r != rank},
        "alpha_pattern": {re.escape(name): _number(s * r) for name, (r, s) in shapes.items() if s * r != scale * rank},
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _unsupported(config: dict[str, Any], kind: str) -> list[str]:
    if str(config.get("peft_type")).upper() not in ("LORA", "ADALORA"):
        return [f"peft_type {config.get('peft_type')} is not supported, only LORA and ADALORA are"]
    problems = [f"{key}: {what} cannot be carried over" for key, what in UNSUPPORTED.items() if config.get(key)]
    if config.get("target_parameters") and kind not in EXPERT_LAYOUTS:
        problems.append(f"target_parameters: we can read experts of {', '.join(EXPERT_LAYOUTS)}, not of {kind}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGES_BASE.fullmatch(init):
        problems.append(
            f"init_lora_weights {init}: trained on a changed base; save it with path_initial_model_for_weight_conversion"
        )
    return problems


def _qalora_group(config: dict[str, Any]) -> int | None:
    """Return how many inputs a row of A is for, in PEFT's QALoRA; None: the adapter is not one.

    PEFT multiplies the mean of a group by the number of groups, G/g times the sum that A reads here.
    """
    return int(config.get("qalora_group_size") or 16) if config.get("use_qalora") else None


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """Return a layer's scale as PEFT computes it: the first pattern that matches the end of its name wins."""
    alpha = config.get("lora_alpha") or 8
    if is_adalora(config):  # divided by its initial rank, to which PEFT adds a constant
        return alpha / ((config.get("init_r") or 12) + 1e-5)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if names_layer(pattern, layer):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _missing_problems(
    config: dict[str, Any], found: dict[str, dict[str, str]], paths: dict[str, str | None]
) -> list[str]:
    """Return layers that the model does not have, and layers with more or fewer tensors than this kind of adapter has."""
    wanted = {"A", "B", *("m" if config.get("use_dora") else ""), *("E" if is_adalora(config) else "")}
    return [f"layer {layer} is not in the model" for layer, path in paths.items() if path is None] + [
        f"layer {layer} has {' and '.join(sorted(sides))}, not {' and '.join(sorted(wanted))}"
        for layer, sides in found.items()
        if sides.keys() != wanted
    ]


def _shape_problems(
    found: dict[str, dict[str, str]],
    paths: dict[str, str | None],
    modules: dict[str, nn.Module],
    header: dict[str, Any],
    group: int = 1,
) -> list[str]:
    """Return factors whose shapes do not fit their layer, and layers that we cannot adapt.

    Args:
        found: layer -> side -> tensor's name.
        paths: layer -> path in the model, if it has one.
        modules: of the model.
        header: of the tensors' file.
        group: inputs that a row of A is for; more than one in QALoRA.
    """
    problems = []
    for layer, sides in found.items():
        base = modules.get(paths[layer] or "")
        if base is None or not {"A", "B"} <= sides.keys():
            continue
        if isinstance(base, SWITCH) or adapter_class(base, "dora" if "m" in sides else "lora") is None:
            problems.append(f"layer {layer} is a {type(base).__name__}, which we cannot adapt")
            continue
        shapes = [tuple(header[sides[side]]["shape"]) for side in "AB"]
        if [len(shape) for shape in shapes] != [2, 2] or 0 in (*shapes[0], *shapes[1]):
            problems.append(
                f"layer {layer} has adapter weights of shapes {shapes[0]} and {shapes[1]}, not two matrices"
            )
            continue
        (r, width), (out, other_r) = shapes
        width *= group
        if base_dims(base)[0] % group:
            problems.append(f"layer {layer} has {base_dims(base)[0]} inputs, which groups of {group} do not divide")
            continue
        if "E" in sides and tuple(header[sides["E"]]["shape"]) != (r, 1):
            problems.append(f"layer {layer} has gains of shape {tuple(header[sides['E']]['shape'])}, not {(r, 1)}")
        if (width, out) != base_dims(base) or r != other_r:
            problems.append(
                f"layer {layer} has adapter weights for {width} -> {out}, the model needs {base_dims(base)}"
            )
        if "m" in sides and isinstance(base, EMBEDDING):
            problems.append(f"layer {layer} is a DoRA embedding with one magnitude per column, ours has one per token")
        elif "m" in sides and tuple(header[sides["m"]]["shape"]) != (out,):
            problems.append(f"layer {layer} has magnitudes of shape {tuple(header[sides['m']]['shape'])}, not {(out,)}")
    return problems


def _copy_problems(
    copies: dict[str, str], stored: dict[str, mx.array], modules: dict[str, nn.Module], tied: str | None
) -> list[str]:
    """Return saved copies of embeddings and heads that differ from the base's; PEFT also saves adapted ones as a whole."""
    problems = []
    for name, layer in copies.items():
        path = own_path(layer, modules) or tied  # here a tied head is not a module
        if path is None:
            problems.append(f"{name} is not in the model")
            continue
        base, copied = modules[path], stored[name]
        weight, folded = dense_weight(base), folded_rows(modules[""], path, len(copied))
        allowed = QUANTIZED_COPY if isinstance(base, QUANTIZED) else FLOAT_COPY
        if copied.shape != weight.shape:
            problems.append(f"{name} is {copied.shape}, the model's is {weight.shape}: a resized vocabulary")
        elif relative_error(copied if folded is None else copied * folded, weight) > allowed:
            problems.append(f"{name} is not the base's weight: it was trained in full")
    return problems


def _tied_problems(
    config: dict[str, Any],
    stored: dict[str, mx.array],
    head: dict[str, str],
    layer: str | None,
    embedding: dict[str, str] | None,
) -> list[str]:
    """Return the problems of an adapted tied head, which must have the embedding's factors and scale."""
    advice = "adapts the tied head separately from the embedding, which is one weight in MLX"
    if layer is None or embedding is None or len(head) != 2:
        return [f"lm_head {advice}"]
    same = all(
        stored[head[one]].shape == stored[embedding[other]].T.shape
        and mx.array_equal(stored[head[one]], stored[embedding[other]].T)
        for one, other in (("A", "B"), ("B", "A"))
    )
    rank = stored[head["A"]].shape[0]
    same = same and _scale(config, "lm_head", rank) == _scale(config, layer, rank)
    return [] if same else [f"lm_head {advice}"]


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"--adapter-path {folder}: the PEFT adapter does not fit this model: {shown}")


# Parameters trained in full: modules_to_save and biases

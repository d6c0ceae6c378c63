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

mlx-lm stores some matrices in another way than transformers: experts of a mixture, and scaled rows.

A mixture's experts are bare tensors in transformers (PEFT's `target_parameters`):

    gate_proj, up_proj   ->  mlp.experts.gate_up_proj: rows of the gate, then of up; in GPT-OSS alternating
    down_proj            ->  mlp.experts.down_proj

A bare tensor has one adapter, so those of gate and up are joined to one with the sum of their ranks:

    [D_gate; D_up] = [[B_gate, 0], [0, B_up]] [A_gate; A_up]

Shapes: E experts, R rank. PEFT stores A as (E * R, in), experts outermost, and B as (out, R * E), experts
innermost. The second adapted tensor of a module wraps the first, which is then called `base_layer`.

Source: huggingface/peft, lora/layer.py, ParamWrapper.get_delta_weight.

Falcon-H1 multiplies its layers' outputs by constants, which mlx-lm folds into the weights on loading. A factor learned on
the folded weight diag(m) W is diag(m) times one on W, so PEFT's file has B / m:

    y = diag(m) (W + s B_peft A) x = (diag(m) W + s (diag(m) B_peft) A) x

All `sanitize` functions of mlx-lm 0.32.2 were read for the table of layers that PEFT cannot adapt. The others that change an
adapted matrix stack experts (above), rename layers (below), or convert fp8 blocks to floats, which does not change values.

Parameters can be trained in full: modules_to_save and biases. PEFT keeps a copy of each module in modules_to_save, and `norm` is every name that ends with it. A tied embedding and head
are one matrix in MLX, and two copies in PEFT, or with its `ensure_weight_tying`, one that its file has under both names.

Two kinds of weights have other axes in torch: convolutions, and GPT-2's layers, which are (in, out) there.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import regex
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import (
    EMBEDDING,
    LINEAR,
    QUANTIZED,
    SWITCH,
    AdapterLayer,
    base_dims,
    dense_weight,
    is_parameter,
    joined_experts,
)
from mlx_lora.adapters.inject import adapter_class, adapter_layers
from mlx_lora.adapters.lora import group_update
from mlx_lora.exporters.adapter_config import SEQ_CLS, classifier_of, peft_problems
from mlx_lora.models.folder import of_tower, read_safetensors_header, save_tensors
from mlx_lora.models.head import SCORE_WEIGHT, tied_embedding
from mlx_lora.models.quantize import relative_error
from mlx_lora.utils.errors import InputError, Problems, first_of
from mlx_lora.utils.files import replacing_file

# Experts


@dataclass(frozen=True)
class ExpertLayout:
    """The paths and layout of a family's experts.

    Attributes:
        ours: path of mlx-lm's module of experts within a block.
        router: mlx-lm's path of the router, which is a bare tensor in transformers and not a module for PEFT.
        in_turns: whether the rows of gate and up alternate.
    """

    ours: str
    router: str
    in_turns: bool = False


EXPERT_LAYOUTS = {
    "gpt_oss": ExpertLayout("mlp.experts", "mlp.router", in_turns=True),
    "qwen2_moe": ExpertLayout("mlp.switch_mlp", "mlp.gate"),
    "qwen3_moe": ExpertLayout("mlp.switch_mlp", "mlp.gate"),
    "mixtral": ExpertLayout("block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
}
THEIRS = "mlp.experts"
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def their_router(layout: ExpertLayout) -> str:
    """Return the path of the router within a block of transformers."""
    return f"{THEIRS.partition('.')[0]}.{layout.router.rpartition('.')[2]}"


@dataclass(frozen=True)
class ExpertTensor:
    """The adapter of one bare tensor, in PEFT's layout.

    Attributes:
        parameter: its name in transformers, `model.layers.0.mlp.experts.down_proj`.
        module: PEFT's name of the module with its factors.
        a, b: as PEFT stores them.
        rank, scale: R and the factor on the product.
    """

    parameter: str
    module: str
    a: mx.array
    b: mx.array
    rank: int
    scale: float


def expert_tensors(kind: str, layers: dict[str, AdapterLayer]) -> list[ExpertTensor]:
    """Return the adapters of a model's experts in PEFT's layout.

    Args:
        kind: the config's model_type.
        layers: path -> every adapter layer of the model, all of types that PEFT has.

    Raises:
        InputError: PEFT cannot adapt a mixture's layers, or we do not know the family's names.
    """
    experts = {path: layer for path, layer in layers.items() if layer.OVER is SWITCH}
    layout = EXPERT_LAYOUTS.get(kind)
    if layout is None and not experts:
        return []
    unfit = list(experts) if layout is None else [path for path in layers if path.endswith(f".{layout.router}")]
    if layout is None or unfit:
        known = ", ".join(EXPERT_LAYOUTS)
        raise InputError(
            f"--to peft: {first_of(unfit, 1, ' ')}: PEFT cannot adapt routers, and we can write experts of {known}; "
            "fuse them instead"
        )
    modules: dict[str, dict[str, AdapterLayer]] = {}
    for path, layer in experts.items():
        module, projection = path.rsplit(".", 1)
        modules.setdefault(module.removesuffix(layout.ours) + THEIRS, {})[projection] = layer
    tensors = []
    for module, own in modules.items():
        present = [name for name, parts in PROJECTIONS.items() if any(part in own for part in parts)]
        for depth, name in zip(reversed(range(len(present))), present, strict=True):
            a, b, scale = joined_experts([own.get(part) for part in PROJECTIONS[name]], layout.in_turns)
            tensors.append(
                ExpertTensor(
                    parameter=f"{module}.{name}",
                    module=module + ".base_layer" * depth,
                    a=a.reshape(-1, a.shape[-1]),  # (E * R, in)
                    b=b.transpose(1, 2, 0).reshape(b.shape[1], -1),  # (out, R * E)
                    rank=a.shape[1],
                    scale=scale,
                )
            )
    return tensors


@dataclass(frozen=True)
class StoredExperts:
    """The adapter of one bare tensor in a PEFT folder, and our layers that it adapts.

    Attributes:
        parameter: its name in transformers.
        paths: our layers: down, or gate and up.
        a, b: the stored tensors' names.
        experts, rank: E and R.
        in_turns: whether rows of the gate and of up alternate.
    """

    parameter: str
    paths: tuple[str, ...]
    a: str
    b: str
    experts: int
    rank: int
    in_turns: bool

    def factors(
        self, stored: dict[str, mx.array], scale_of: Callable[[str, int], float]
    ) -> dict[str, tuple[mx.array, mx.array, float]]:
        """Return path -> our layer's factors and scale: (E, r, in), (E, out, r), scale.

        Ranks of a joined pair that a layer does not use are removed, and a layer that uses none is not adapted, unless
        this is true for all layers, as in a new adapter, where B is zero.

        Args:
            stored: tensors by name.
            scale_of: the scale of a named parameter's adapter of rank R.
        """
        scale = scale_of(self.parameter, self.rank)
        a = stored[self.a].astype(mx.float32).reshape(self.experts, self.rank, -1)
        b = stored[self.b].astype(mx.float32).reshape(-1, self.rank, self.experts).transpose(2, 0, 1)  # (E, out, R)
        if len(self.paths) == 1:
            return {self.paths[0]: (a, b, scale)}
        half = b.shape[1] // 2
        parts = (b[:, 0::2], b[:, 1::2]) if self.in_turns else (b[:, :half], b[:, half:])
        used = [[i for i, some in enumerate(mx.any(part != 0, axis=(0, 1)).tolist()) if some] for part in parts]
        if not any(used):
            used = [list(range(self.rank))] * 2
        return {
            path: (a[:, mx.array(ranks)], part[..., mx.array(ranks)], scale)
            for path, part, ranks in zip(self.paths, parts, used, strict=True)
            if ranks
        }


def take_experts(
    kind: str, found: dict[str, dict[str, str]], header: dict[str, Any], modules: dict[str, nn.Module]
) -> tuple[list[StoredExperts], list[str]]:
    """Remove the adapters of bare expert tensors from a PEFT folder's factors, and return them.

    Args:
        kind: the config's model_type.
        found: layer -> side (A, B) -> tensor name; those of experts are removed.
        header: of the folder's tensors.
        modules: of the model, by path.

    Returns:
        The adapters, and the problems of those that do not fit.
    """
    layout = EXPERT_LAYOUTS.get(kind)
    layers = [layer for layer in found if re.sub(r"(\.base_layer)+$", "", layer).endswith(f".{THEIRS}")]
    if layout is None or not layers:
        return [], []
    taken, problems = [], []
    for layer in layers:
        sides = found.pop(layer)
        module = re.sub(r"(\.base_layer)+$", "", layer)
        own = module.removesuffix(THEIRS) + layout.ours
        fits = None
        if sides.keys() == {"A", "B"} and f"{own}.down_proj" in modules:
            shapes = [tuple(header[sides[side]]["shape"]) for side in "AB"]
            experts = modules[f"{own}.down_proj"].num_experts
            rank = shapes[0][0] // experts if shapes[0] else 0
            for name, parts in PROJECTIONS.items():  # the shapes differ for all tensors
                paths = tuple(f"{own}.{part}" for part in parts)
                width, out = base_dims(modules[paths[0]])
                if rank and shapes == [(experts * rank, width), (out * len(parts), rank * experts)]:
                    fits = StoredExperts(
                        f"{module}.{name}", paths, sides["A"], sides["B"], experts, rank, layout.in_turns
                    )
                    break
        if fits is None:
            problems.append(f"layer {layer} has adapter weights that do not fit any of the model's experts")
        else:
            taken.append(fits)
    names = [one.parameter for one in taken]
    problems += [f"{name} is adapted twice" for name in sorted(set(names)) if names.count(name) > 1]
    return taken, problems


# Layers that PEFT cannot adapt, and scaled rows

_RENAMED_ROUTER = "its router has another name or form in transformers"
_DIRECT = "transformers multiplies by its weight directly, so PEFT's adapter has no effect"
_SPLIT = "it is part of a larger matrix in transformers"
_NORMED = "mlx-lm divides the head by its rows' lengths"
_ROUTER = r"\.block_sparse_moe(\.gate|\.router\.layer|)"
_STATE_SPACE = r"\.(out_proj|dt_proj|conv1d)"
# model_type -> (pattern for the end of a layer's path, why PEFT cannot adapt it).
UNREACHED = {
    "falcon_h1": (_STATE_SPACE, _DIRECT),
    "mamba": (_STATE_SPACE, _DIRECT),
    "falcon_mamba": (_STATE_SPACE, _DIRECT),
    "mamba2": (_STATE_SPACE, _DIRECT),
    "nemotron_h": (_STATE_SPACE, _DIRECT),
    "hunyuan": (r"\.(q|k|v|gate|up)_proj", _SPLIT),
    "granitemoe": (_ROUTER, _RENAMED_ROUTER),
    "granitemoehybrid": (rf"\.mlp\.(gate|up|down)_proj|{_ROUTER}", "it has another form in transformers"),
    "minimax": (_ROUTER, _RENAMED_ROUTER),
    "minimax_m3_vl": (_ROUTER, _RENAMED_ROUTER),
    "phimoe": (_ROUTER, _RENAMED_ROUTER),
    "kimi_k3": (r"\.qkv_proj", "transformers has three matrices for it"),
    "muse_spark": (r"\.qkvg?_proj", "transformers has several matrices for it"),
    "bailing_moe": (r"lm_head", _NORMED),
    "bailing_moe_linear": (r"lm_head", _NORMED),
    "baichuan_m1": (r"lm_head", _NORMED),
    "gpt_neox": (r"\.embed_in", "its head is a separate matrix, which has another name here"),
    "prism_hadamard_qwen35": (r".+", "its weights are rotated"),
    "rwkv7": (r".+", "its layers have other names in transformers"),
}


def check_reached(kind: str, layers: Iterable[str], full: Iterable[str] = ()) -> None:
    """Refuse layers that PEFT would refuse, or adapt without effect.

    Args:
        kind: the config's model_type.
        layers: paths of all adapted layers.
        full: names of parameters trained in full.

    Raises:
        InputError: there are such layers; the message has the first and the reason.
    """
    end, reason = UNREACHED.get(kind, ("", ""))
    # A bias that PEFT writes by its own name is found wherever transformers has it.
    whole = [name for name in full if name.endswith(".weight") or reason != _DIRECT]
    paths = [*layers, *(re.sub(r"(\.(linear|embedding))?\.[^.]+$", "", name) for name in whole)]
    lost = [path for path in dict.fromkeys(paths) if reason and re.search(rf"(?:{end})$", path)]
    if lost:
        raise InputError(
            f"--to peft: {first_of(lost, 1, ' ')} in a {kind} model: {reason}; fuse the adapter, or train without those layers "
            "(--target-modules)"
        )


def folded_rows(model: nn.Module, path: str, rows: int) -> mx.array | None:
    """Return the factors by which mlx-lm multiplies a layer's rows on loading, (rows, 1) float32, or None for none.

    They are read from mlx-lm's function, called with rows of ones, so they stay right if a later version changes them.

    Args:
        model: adapted or not.
        path: of the layer.
        rows: of its weight; for an embedding its width, where all factors are equal.
    """
    if model.model_type != "falcon_h1":
        return None
    name = f"{path}.weight"
    # The convolution of a published model shows sanitize that nothing is folded yet.
    published = {"model.layers.0.mamba.conv1d.weight": mx.zeros((1, 1, 4)), name: mx.ones((rows, 1))}
    return model.sanitize(published)[name]


PREFIX = "base_model.model."
TENSOR = re.compile(
    re.escape(PREFIX)
    + r"(?P<layer>.+)\.(?:lora_(?P<side>[AB])(?:\.weight)?|lora_(?P<gains>E)|lora_embedding_(?P<embedding>[AB])"
    + r"|lora_(?P<magnitude>m)agnitude_vector(?:\.weight)?)"
)
BIAS = re.compile(re.escape(PREFIX) + r"(?P<layer>.+?)(?:\.base_layer)?\.bias")
COPY = re.compile(re.escape(PREFIX) + r"(?P<layer>(?:.+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight")
# model_type -> prefixes of paths, mlx-lm's and transformers'; the first match counts.
TEXT_MODEL = (("language_model.model.", "model.text_model."), ("language_model.lm_head", "lm_head"))
PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
SIGLIP = (("vision_tower.vision_model.", "model.vision_tower."), PROJECTOR)
TOWERS = {
    **dict.fromkeys(
        ("smolvlm", "idefics3"), (("vision_model.", "model.vision_model."), ("connector.", "model.connector."))
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        (("vision_tower.", "model.visual."),),
    ),
    **dict.fromkeys(("gemma3", "llava", "mistral3", "pixtral", "paligemma"), SIGLIP),
    "gemma4": (("vision_tower.", "model.vision_tower."), ("embed_vision.", "model.embed_vision.")),
}
RENAMED = {
    **TOWERS,
    "smolvlm": (*TEXT_MODEL, *TOWERS["smolvlm"]),
    "idefics3": (*TEXT_MODEL, *TOWERS["idefics3"]),
    "gptj": (("model.", "transformer."),),
    "gpt2": (("model.", "transformer."),),
    "gpt_neox": (("model.h.", "gpt_neox.layers."), ("model.embed_out", "lm_head"), ("model.", "gpt_neox.")),
    "nemotron_h": (("backbone.", "model."),),
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text", "flint", "kolibri1"),
        (("language_model.model.", "model."), ("language_model.lm_head", "lm_head")),
    ),
    # Encoders with a score head
    "bert": (("pooler.", "bert.pooler."), ("score.", "classifier."), ("model.", "bert.")),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert"),
        (("score.", "classifier.out_proj."), ("pooler.", "classifier."), ("model.", "roberta.")),
    ),
    "modernbert": (("pooler.", "head."), ("score.", "classifier.")),
}
# Of mlx-vlm's language models, those whose layers were compared with transformers' by name.
COMPARED = {"flint", "kolibri1", "llava_next", "llava_onevision", "mllama", "qwen3_5_moe_text", "qwen3_5_text"}
PATTERN_S = 1.0  # limit for matching a config's pattern with a layer's name, which takes microseconds


def own_path(layer: str, modules: dict[str, nn.Module]) -> str | None:
    """Return mlx-lm's path of a layer: the same, with a family's prefix, or with a multimodal wrapper's parts swapped."""
    other = re.sub(r"^model\.language_model\.", "language_model.model.", layer)
    renamed = [
        (ours + f"{layer}.".removeprefix(theirs)).removesuffix(".")
        for pairs in RENAMED.values()
        for ours, theirs in pairs
        if f"{layer}.".startswith(theirs)
    ]
    head = ["language_model.lm_head"] if layer == "lm_head" else []
    routers = [
        layer.removesuffix(their_router(own)) + own.router
        for own in EXPERT_LAYOUTS.values()
        if layer.endswith(f".{their_router(own)}")
    ]
    return next((path for path in (layer, other, *head, *renamed, *routers) if path in modules), None)


def peft_path(path: str, kind: str) -> str:
    """Return transformers' path of a layer.

    Args:
        path: mlx-lm's.
        kind: the config's model_type.
    """
    for ours, theirs in RENAMED.get(kind, ()):
        if f"{path}.".startswith(ours):
            return (theirs + f"{path}.".removeprefix(ours)).removesuffix(".")
    if path == "language_model.lm_head":
        return "lm_head"
    layout = EXPERT_LAYOUTS.get(kind)
    if layout is not None and path.endswith(f".{layout.router}"):
        return path.removesuffix(layout.router) + their_router(layout)
    return re.sub(r"^language_model\.model\.", "model.language_model.", path)


def names_layer(pattern: str, layer: str) -> bool:
    """Tell whether a PEFT pattern matches a layer.

    Raises:
        InputError: it is not a regular expression, or matching takes too long (`(.*)*x`). Python's matcher cannot be
            interrupted, so the `regex` package is used.
    """
    try:
        return regex.match(rf"(.*\.)?({pattern})$", layer, timeout=PATTERN_S) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
        reason = "takes too long" if isinstance(error, TimeoutError) else str(error)
        raise InputError(f"the pattern {pattern[:80]!r}: {reason}; write the layer's name") from None


def _is_adalora(config: dict[str, Any]) -> bool:
    """Tell whether a PEFT adapter is an AdaLoRA, whose layers have gains, not a LoRA."""
    return str(config.get("peft_type")).upper() == "ADALORA"


def rank_problems(config: dict[str, Any], found: dict[str, dict[str, str]], header: dict[str, Any]) -> list[str]:
    """Return that layers have factors of another rank than the config says: one of the two is another adapter's.

    Args:
        config: PEFT's adapter_config.json.
        found: layer -> side of the factors -> name of its tensor.
        header: of the file; has each tensor's shape.
    """
    if _is_adalora(config):  # whose ranks were cut, each layer's to another number
        return []
    patterns, usual = config.get("rank_pattern") or {}, config.get("r") or 8
    if not isinstance(patterns, dict):
        return ["adapter_config.json: rank_pattern has to name layers and their ranks"]
    wrong = []
    for layer, sides in found.items():
        asked = next((rank for pattern, rank in patterns.items() if names_layer(pattern, layer)), usual)
        rank = header[sides["A"]]["shape"][0] if "A" in sides else asked
        if rank != asked:
            wrong.append(f"layer {layer} has adapter weights of rank {rank}, but adapter_config.json says r {asked}")
    more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
    return [wrong[0] + more] if wrong else []


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
    saved, full, others = config.get("modules_to_save") or [], {}, []
    places = {name: name.removeprefix(PREFIX).replace(".modules_to_save.default", "").rpartition(".") for name in names}
    whole = {layer for name, (layer, _, _) in places.items() if _is_saved(layer, saved) and not TENSOR.fullmatch(name)}
    if config.get("ensure_weight_tying") and tied and tied in {own_path(layer, modules) for layer in whole}:
        saved = [*saved, "lm_head"]
    for name, (layer, _, leaf) in places.items():
        bias = BIAS.fullmatch(name)
        if _is_saved(layer, saved) and not TENSOR.fullmatch(name):
            full[name] = layer, leaf
        elif bias and config.get("bias", "none") != "none":
            full[name] = bias["layer"], "bias"
        else:
            others.append(name)
    return full, others


def _is_saved(layer: str, modules: Iterable[str]) -> bool:
    """Return whether a layer is, or is in, one of modules_to_save; in PEFT `norm` is every name that ends with it."""
    return any(layer.endswith(module) or f".{module}." in f".{layer}." for module in modules)


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
    saved = config.get("modules_to_save") or []
    # PEFT adds names of heads for SEQ_CLS, whatever the model calls its own.
    heads = [name for name in HEADS_OF_SEQ_CLS if any(_is_saved(layer, [name]) for layer in layers)]
    if config.get("task_type") == SEQ_CLS and heads:
        saved = [name for name in saved if name in heads or name not in HEADS_OF_SEQ_CLS]
    problems = Problems(
        f"modules_to_save {module}: the adapter's file does not have this module"
        for module in saved
        if not any(_is_saved(layer, [module]) for layer in layers)
    )
    for name, (layer, leaf) in full.items():
        path = own_path(layer, modules)
        if layer == "lm_head" and tied:
            problems.note_if(
                not any(own_path(other, modules) == tied for other in layers),
                "modules_to_save lm_head: trained separately from the embedding, to which it is tied here",
            )
            continue
        if path is None or not is_parameter(modules[path], leaf):
            problems.append(f"{layer}.{leaf} is not in the model")
            continue
        base = modules[path]
        needed = dense_weight(base).shape if leaf == "weight" and isinstance(base, QUANTIZED) else base[leaf].shape
        if axes := _torch_axes(model.model_type, path, leaf, base):
            needed = np.moveaxis(np.broadcast_to(np.int8(0), needed), *axes).shape
        shape = tuple(header[name]["shape"])
        problems.note_if(shape != needed, f"{layer}.{leaf} is {shape}, the model needs {needed}")
        ties = config.get("ensure_weight_tying") and _peft_ties(layer)
        problems.note_if(
            path == tied and "lm_head" not in layers and not ties,
            f"modules_to_save {layer}: trained separately from the head, to which it is tied here",
        )
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
    kind = model.model_type
    weights = {name.rpartition(".")[0] for name in full if name.endswith(".weight") and not of_tower(name)}
    # Of a tower, the outermost modules that have exactly these parameters, and that transformers has, too.
    outermost: list[str] = []
    for path, module in sorted(modules.items(), key=lambda item: len(item[0])):
        own = {f"{path}.{name}" for name, _ in tree_flatten(module.parameters())}
        inside = any(path.startswith(f"{outer}.") for outer in outermost)
        if of_tower(path) and not inside and own and own <= set(full) and peft_path(path, kind) != path:
            outermost.append(path)
    saved = {peft_path(path, kind) for path in (*weights, *outermost)}
    biases = []
    for name in sorted(full, key=of_tower, reverse=True):
        path, _, leaf = name.rpartition(".")
        inside = path.endswith((".linear", ".embedding")) and not of_tower(name)
        plain = path.rpartition(".")[0] if inside else path
        value = parameters[name]
        if not of_tower(name):
            biases += [] if path in weights else [inside]
            value = value - shift_of(kind, plain, leaf)
            folded = folded_rows(model, plain, len(value)) if leaf == "weight" else None
            value = value if folded is None else value / folded
        axes = _torch_axes(kind, plain, leaf, modules[path])
        stored = f"{PREFIX}{peft_path(plain, kind)}{'.base_layer' if inside else ''}.{leaf}"
        tensors[stored] = value if axes is None else mx.moveaxis(value, *axes)
        if path == tied:
            saved.add("lm_head")
            tensors[f"{PREFIX}lm_head.weight"] = mx.array(tensors[stored])
    # All of a RoBERTa's head is one module, which PEFT saves by itself.
    saved = {"classifier" if name.startswith("classifier.") else name for name in saved}
    return tensors, sorted(saved), "none" if not biases else "lora_only" if all(biases) else "all"


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
    found: dict[str, dict[str, str]] = {}  # layer -> A, B, m, E -> tensor
    copies: dict[str, str] = {}  # of the base's embeddings and heads: tensor -> layer
    problems = _unsupported(config, model.model_type)
    for name in others:
        match, copy = TENSOR.fullmatch(name.replace(".default.", ".")), COPY.fullmatch(name)
        if match:
            side = next(match[part] for part in ("side", "embedding", "magnitude", "gains") if match[part])
            found.setdefault(match["layer"], {})[side] = name
        elif copy:
            copies[name] = copy["layer"]
        else:
            problems.append(f"tensor {name} is not a LoRA factor")
    problems += full_problems(config, full, model, header, tied)
    experts, unfit = take_experts(model.model_type, found, header, modules)
    problems += unfit
    problems += [] if found or experts else ["it has no LoRA weights"]
    head = found.pop("lm_head", None) if tied else None
    paths: dict[str, Any] = {layer: own_path(layer, modules) for layer in found}
    wanted = {"A", "B", *("m" if config.get("use_dora") else ""), *("E" if _is_adalora(config) else "")}
    problems += [f"layer {layer} is not in the model" for layer, path in paths.items() if path is None]
    problems += [
        f"layer {layer} has {' and '.join(sorted(sides))}, not {' and '.join(sorted(wanted))}"
        for layer, sides in found.items()
        if sides.keys() != wanted
    ]
    # In PEFT's QALoRA, a row of A is for several inputs: it multiplies the mean of a group by the number of groups, G/g
    # times the sum that A reads here.
    group = int(config.get("qalora_group_size") or 16) if config.get("use_qalora") else 1
    problems += _shape_problems(found, paths, modules, header, group)
    problems += [] if problems else rank_problems(config, found, header)
    _refuse(folder, problems)
    stored: Any = mx.load(str(file))
    _refuse(folder, _copy_problems(copies, stored, modules, tied) + head_problems(full, stored, modules, tied))
    factors, magnitudes, shapes = {}, {}, {}
    for layer, sides in found.items():
        a, b = (stored[sides[side]].astype(mx.float32).T for side in "AB")
        if group > 1:
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
    if head is not None:  # it must have the embedding's factors and scale
        own = found.get(embedding or "", {})
        same = len(head) == 2 == len(own) and all(
            stored[head[one]].shape == stored[own[other]].T.shape
            and mx.array_equal(stored[head[one]], stored[own[other]].T).item()
            for one, other in (("A", "B"), ("B", "A"))
        )
        rank = stored[head["A"]].shape[0] if same else 0
        if not same or _scale(config, "lm_head", rank) != _scale(config, embedding or "", rank):
            advice = "adapts the tied head separately from the embedding, which is one weight in MLX"
            _refuse(folder, [f"lm_head {advice}"])
    return PeftAdapter(
        factors,
        magnitudes,
        shapes,
        float(config.get("lora_dropout") or 0.0),
        config.get("base_model_name_or_path"),
        leaves_head=tied if embedding is not None and head is None else None,
        full=full_values(full, stored, model),
    )


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
    layers, groups = adapter_layers(model), 0
    if qalora:
        other = [path for path, one in layers.items() if one.OVER is not LINEAR or group_update(one) is None]
        if other:
            raise InputError(
                f"--to peft-qalora: {other[0]} is not a QA-LoRA over a linear layer; train with --method qa-lora, or use --to peft"
            )
        sizes: set[Any] = {layer.base.group_size for layer in layers.values()}
        if len(sizes) > 1:
            raise InputError(
                f"--to peft-qalora: the base has groups of {', '.join(map(str, sorted(sizes)))}, and PEFT has one size for "
                "all layers; use --to peft"
            )
        groups = max(sizes, default=0)
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
        ((rank, scale), _) = Counter(shapes.values()).most_common(1)[0]
        alphas = {name: s * r for name, (r, s) in shapes.items()}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _plain(scale * rank),
            "lora_dropout": 0.0 if parameters else dropout,  # PEFT has none for bare tensors, and refuses it
            "use_rslora": False,
            "fan_in_fan_out": False,
            "target_modules": sorted(shapes.keys() - parameters),
            **({"target_parameters": sorted(parameters)} if parameters else {}),
            # Layers with another rank or alpha. PEFT matches keys as regular expressions with the end of a layer's name.
            "rank_pattern": {re.escape(name): r for name, (r, _) in shapes.items() if r != rank},
            "alpha_pattern": {re.escape(name): _plain(a) for name, a in alphas.items() if a != scale * rank},
            "use_dora": is_dora,
            "bias": bias,
        }
        config |= {"modules_to_save": saved} if saved else {}
        config |= {"use_qalora": True, "qalora_group_size": groups} if groups else {}
        if SCORE_WEIGHT in full:
            config["task_type"] = SEQ_CLS
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


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
    if getattr(model, "of_mlx_vlm", False) and model.model_type not in COMPARED:
        raise InputError(
            f"--to peft: it is not known whether transformers names the layers of {model.model_type} as mlx-vlm does; fuse the "
            "adapter instead"
        )
    if apart := [f"{path} {layer.NOT_IN_PEFT}" for path, layer in layers.items() if layer.NOT_IN_PEFT]:
        raise InputError(f"--to peft: {first_of(apart, 1)}; fuse the adapter instead")
    modules = dict(model.named_modules())
    # A mixture's experts are no modules in transformers.
    if lost := [name for name in full if isinstance(modules.get(name.rpartition(".")[0]), SWITCH)]:
        raise InputError(
            f"--to peft: {first_of(lost, 1, ' ').replace('.linear.', '.')}: trained in full, and PEFT saves no whole "
            "experts; fuse the adapter, or train without them (--modules-to-save, --bias)"
        )
    check_reached(model.model_type, layers, full)
    if SCORE_WEIGHT in full:
        classifier_of(model.model_type)
    return expert_tensors(model.model_type, layers)


def _unsupported(config: dict[str, Any], kind: str) -> list[str]:
    if str(config.get("peft_type")).upper() not in ("LORA", "ADALORA"):
        return [f"peft_type {config.get('peft_type')} is not supported, only LORA and ADALORA are"]
    problems = Problems(f"{key}: {what} cannot be carried over" for key, what in UNSUPPORTED.items() if config.get(key))
    problems.note_if(
        config.get("target_parameters") and kind not in EXPERT_LAYOUTS,
        f"target_parameters: we can read experts of {', '.join(EXPERT_LAYOUTS)}, not of {kind}",
    )
    init = config.get("init_lora_weights")
    problems.note_if(
        isinstance(init, str) and CHANGES_BASE.fullmatch(init),
        f"init_lora_weights {init}: trained on a changed base; save it with path_initial_model_for_weight_conversion",
    )
    return problems


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """Return a layer's scale as PEFT computes it: the first pattern that matches the end of its name wins."""
    alpha = config.get("lora_alpha") or 8
    if _is_adalora(config):  # divided by its initial rank, to which PEFT adds a constant
        return alpha / ((config.get("init_r") or 12) + 1e-5)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if names_layer(pattern, layer):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


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
    problems = Problems()
    for layer, sides in found.items():
        base = modules.get(paths[layer] or "")
        if base is None or not {"A", "B"} <= sides.keys():
            continue
        if isinstance(base, SWITCH) or adapter_class(base, "dora" if "m" in sides else "lora") is None:
            problems.append(f"layer {layer} is a {type(base).__name__}, which we cannot adapt")
            continue
        shape = {side: tuple(header[name]["shape"]) for side, name in sides.items()}
        if [len(shape[side]) for side in "AB"] != [2, 2] or 0 in (*shape["A"], *shape["B"]):
            problems.append(
                f"layer {layer} has adapter weights of shapes {shape['A']} and {shape['B']}, not two matrices"
            )
            continue
        (r, width), (out, other_r), needed = shape["A"], shape["B"], base_dims(base)
        if needed[0] % group:
            problems.append(f"layer {layer} has {needed[0]} inputs, which groups of {group} do not divide")
            continue
        gains, magnitudes = shape.get("E", (r, 1)), shape.get("m", (out,))
        problems.note_if(gains != (r, 1), f"layer {layer} has gains of shape {gains}, not {(r, 1)}")
        problems.note_if(
            (width * group, out) != needed or r != other_r,
            f"layer {layer} has adapter weights for {width * group} -> {out}, the model needs {needed}",
        )
        if "m" in sides and isinstance(base, EMBEDDING):
            problems.append(f"layer {layer} is a DoRA embedding with one magnitude per column, ours has one per token")
        elif magnitudes != (out,):
            problems.append(f"layer {layer} has magnitudes of shape {magnitudes}, not {(out,)}")
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


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise InputError(f"--adapter-path {folder}: the PEFT adapter does not fit this model: {first_of(problems)}")

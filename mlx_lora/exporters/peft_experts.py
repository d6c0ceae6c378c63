"""Convert the adapters of matrices that mlx-lm stores in another way than transformers: experts of a mixture, and scaled rows.

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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import regex

from mlx_lora.adapters.base import SWITCH, AdapterLayer, base_dims, joined_experts
from mlx_lora.utils.errors import InputError

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

    @property
    def their_router(self) -> str:
        """Path of the router within a block of transformers."""
        return f"{THEIRS.partition('.')[0]}.{self.router.rpartition('.')[2]}"


EXPERT_LAYOUTS = {
    "gpt_oss": ExpertLayout("mlp.experts", "mlp.router", in_turns=True),
    "qwen2_moe": ExpertLayout("mlp.switch_mlp", "mlp.gate"),
    "qwen3_moe": ExpertLayout("mlp.switch_mlp", "mlp.gate"),
    "mixtral": ExpertLayout("block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
}
THEIRS = "mlp.experts"
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


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
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        known = ", ".join(EXPERT_LAYOUTS)
        raise InputError(
            f"--to peft: {unfit[0]}{more}: PEFT cannot adapt routers, and we can write experts of {known}; fuse them instead"
        )
    modules: dict[str, dict[str, AdapterLayer]] = {}
    for path, layer in experts.items():
        module, projection = path.rsplit(".", 1)
        modules.setdefault(module, {})[projection] = layer
    return [tensor for path, own in modules.items() for tensor in _of_module(path, own, layout)]


def _of_module(path: str, layers: dict[str, AdapterLayer], layout: ExpertLayout) -> list[ExpertTensor]:
    module = path.removesuffix(layout.ours) + THEIRS
    present = [name for name, parts in PROJECTIONS.items() if any(part in layers for part in parts)]
    tensors = []
    for depth, name in zip(reversed(range(len(present))), present, strict=True):
        a, b, scale = joined_experts([layers.get(part) for part in PROJECTIONS[name]], layout.in_turns)
        rank = a.shape[1]
        tensors.append(
            ExpertTensor(
                parameter=f"{module}.{name}",
                module=module + ".base_layer" * depth,
                a=a.reshape(-1, a.shape[-1]),  # (E * R, in)
                b=b.transpose(1, 2, 0).reshape(b.shape[1], -1),  # (out, R * E)
                rank=rank,
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
            fits = _fitting(module, own, shapes, sides, layout, modules)
        if fits is None:
            problems.append(f"layer {layer} has adapter weights that do not fit any of the model's experts")
        else:
            taken.append(fits)
    names = [one.parameter for one in taken]
    problems += [f"{name} is adapted twice" for name in sorted(set(names)) if names.count(name) > 1]
    return taken, problems


def _fitting(
    module: str,
    own: str,
    shapes: list[tuple[int, ...]],
    sides: dict[str, str],
    layout: ExpertLayout,
    modules: dict[str, nn.Module],
) -> StoredExperts | None:
    """Return which of a module's tensors a pair of factors adapts, by its shapes, which differ for all tensors."""
    for name, parts in PROJECTIONS.items():
        bases = [modules[f"{own}.{part}"] for part in parts]
        experts = bases[0].num_experts
        width, out = base_dims(bases[0])
        if any(len(shape) != 2 for shape in shapes) or not shapes[0][0] or shapes[0][0] % experts:
            return None
        rank = shapes[0][0] // experts
        if shapes == [(experts * rank, width), (out * len(parts), rank * experts)]:
            paths = tuple(f"{own}.{part}" for part in parts)
            return StoredExperts(f"{module}.{name}", paths, sides["A"], sides["B"], experts, rank, layout.in_turns)
    return None


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
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"--to peft: {lost[0]}{more} in a {kind} model: {reason}; fuse the adapter, or train without those layers "
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
    # Encoders with a score head
    "bert": (("pooler.", "bert.pooler."), ("score.", "classifier."), ("model.", "bert.")),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert"),
        (("score.", "classifier.out_proj."), ("pooler.", "classifier."), ("model.", "roberta.")),
    ),
    "modernbert": (("pooler.", "head."), ("score.", "classifier.")),
}
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
        layer.removesuffix(own.their_router) + own.router
        for own in EXPERT_LAYOUTS.values()
        if layer.endswith(f".{own.their_router}")
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
        return path.removesuffix(layout.router) + layout.their_router
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


def rank_problems(config: dict[str, Any], found: dict[str, dict[str, str]], header: dict[str, Any]) -> list[str]:
    """Return that layers have factors of another rank than the config says: one of the two is another adapter's.

    Args:
        config: PEFT's adapter_config.json.
        found: layer -> side of the factors -> name of its tensor.
        header: of the file; has each tensor's shape.
    """
    if str(config.get("peft_type")).upper() == "ADALORA":  # whose ranks were cut, each layer's to another number
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

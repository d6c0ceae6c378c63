"""A mixture's experts in a PEFT folder: bare tensors in transformers, which PEFT adapts as `target_parameters`.

    gate_proj, up_proj   ->  mlp.experts.gate_up_proj: rows of the gate, then of up; in GPT-OSS in turns
    down_proj            ->  mlp.experts.down_proj

A bare tensor has one adapter, so the gate's and up's become one, of the sum of their ranks:

    [D_gate; D_up] = [[B_gate, 0], [0, B_up]] [A_gate; A_up]

Shapes: E experts, R rank. PEFT stores A as (E * R, in), experts outermost, and B as (out, R * E), experts
innermost. The second adapted tensor of a module wraps the first, which is then called `base_layer`.

Source: huggingface/peft, lora/layer.py, ParamWrapper.get_delta_weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.moe import LoRASwitchLinear
from mlx_lora.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a family keeps its experts.

    Attributes:
        ours: path of mlx-lm's module of experts within a block.
        router: mlx-lm's path of the layer that is a bare tensor in transformers, so not among PEFT's modules.
        in_turns: whether rows of the gate and of up alternate.
    """

    ours: str
    router: str
    in_turns: bool = False


PLACES = {
    "gpt_oss": Place("mlp.experts", "mlp.router", in_turns=True),
    "qwen2_moe": Place("mlp.switch_mlp", "mlp.gate"),
    "qwen3_moe": Place("mlp.switch_mlp", "mlp.gate"),
    "mixtral": Place("block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
}
THEIRS = "mlp.experts"
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class ExpertTensor:
    """One bare tensor's adapter.

    Attributes:
        parameter: its name in transformers, `model.layers.0.mlp.experts.down_proj`.
        module: what PEFT calls the module that holds its factors.
        a, b: as PEFT stores them.
        rank, scale: R and the factor on the product.
    """

    parameter: str
    module: str
    a: mx.array
    b: mx.array
    rank: int
    scale: float


def expert_tensors(kind: str, layers: dict[str, nn.Module]) -> list[ExpertTensor]:
    """Return the adapters of a model's experts as PEFT has them.

    Args:
        kind: the config's model_type.
        layers: path -> every adapter layer of the model.

    Raises:
        InputError: layers of a mixture that PEFT cannot hold, or of a family that we do not know the names of.
    """
    experts = {path: layer for path, layer in layers.items() if layer.lora_a.ndim == 3}
    place = PLACES.get(kind)
    unfit = [path for path, layer in experts.items() if place is None or not isinstance(layer, LoRASwitchLinear)]
    unfit += [path for path in layers if place is not None and path.endswith(f".{place.router}")]
    if unfit:
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        known = ", ".join(PLACES)
        raise InputError(
            f"--to peft: {unfit[0]}{more}: PEFT adapts experts without DoRA, no routers, and we write {known}; "
            "fuse them instead"
        )
    modules: dict[str, dict[str, LoRASwitchLinear]] = {}
    for path, layer in experts.items():
        module, projection = path.rsplit(".", 1)
        modules.setdefault(module, {})[projection] = layer
    return [tensor for path, own in modules.items() for tensor in _of_module(path, own, place)]


def _of_module(path: str, layers: dict[str, LoRASwitchLinear], place: Place) -> list[ExpertTensor]:
    module = path.removesuffix(place.ours) + THEIRS
    present = [name for name, parts in PROJECTIONS.items() if any(part in layers for part in parts)]
    tensors = []
    for depth, name in zip(reversed(range(len(present))), present, strict=True):
        a, b, scale = joined_experts([layers.get(part) for part in PROJECTIONS[name]], place.in_turns)
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


def joined_experts(layers: list[LoRASwitchLinear | None], in_turns: bool) -> tuple[mx.array, mx.array, float]:
    """Return one adapter (E, R, in), (E, out, R) and its scale for layers whose rows are stored together."""
    scale = next(layer.scale for layer in layers if layer is not None)
    pairs = [None if layer is None else (*layer.plain_factors(), layer.scale / scale) for layer in layers]
    if len(pairs) == 1:
        return *pairs[0][:2], scale
    a = mx.concatenate([pair[0] for pair in pairs if pair is not None], axis=1)
    experts, out = next(pair[1].shape[:2] for pair in pairs if pair is not None)
    parts, start = [], 0
    for pair in pairs:
        b = mx.zeros((experts, out, a.shape[1]))
        if pair is not None:
            rank = pair[0].shape[1]
            b[..., start : start + rank] = pair[1] * pair[2]
            start += rank
        parts.append(b)
    b = mx.stack(parts, axis=2).flatten(1, 2) if in_turns else mx.concatenate(parts, axis=1)
    return a, b, scale

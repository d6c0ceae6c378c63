"""Choose the layers that a run adapts or trains in full, by name, pattern and depth, and the class, rank and alpha of each.

A variant of LoRA is a class in a file of its own, and a row of `_CLASSES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDING, LINEAR, SWITCH, AdapterLayer, is_exactly
from mlx_lora.adapters.lora import (
    DoRAEmbedding,
    DoRALinear,
    DoRASwitchLinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
)
from mlx_lora.adapters.qa_lora import QALoRAEmbedding, QALoRALinear, QALoRASwitchLinear
from mlx_lora.models.tower_files import of_tower
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.presets import Method

_CLASSES = (
    LoRALinear,
    LoRAEmbedding,
    LoRASwitchLinear,
    DoRALinear,
    DoRAEmbedding,
    DoRASwitchLinear,
    QALoRALinear,
    QALoRAEmbedding,
    QALoRASwitchLinear,
)
REGISTRY: dict[tuple[str, tuple[type, ...]], type[AdapterLayer]] = {(one.LAYER_TYPE, one.OVER): one for one in _CLASSES}
LAYER_TYPES = tuple(dict.fromkeys(name for name, _ in REGISTRY))


def adapter_class(base: nn.Module, layer_type: str = "lora") -> type[AdapterLayer] | None:
    """Return the class that wraps `base` in a layer of this type, or None if there is none."""
    kind = next((kind for kind in (LINEAR, EMBEDDING, SWITCH) if is_exactly(base, kind)), None)
    return None if kind is None else REGISTRY.get((layer_type, kind))


# The classes of adapter layers
ALL_LINEAR = "all-linear"
# The names, in mlx-lm's mixtures, of the layers that choose a token's experts.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
NO_GRADIENT = "it picks positions by top-k, which has no gradient"
READ_PAST = "mlx-lm reads its weight directly, without the adapter"
# Parts of mlx-lm's models that cannot be trained (NO_GRADIENT), or not with an adapter.
OUT_OF_REACH = {
    "indexer": NO_GRADIENT,  # DeepSeek V3.2, GLM-5
    **dict.fromkeys(("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm"), NO_GRADIENT),  # MiniMax M3
    "altup": READ_PAST,
    "self_attention_res_proj": READ_PAST,
    "mlp_res_proj": READ_PAST,
    "output_attn_res_proj": READ_PAST,
}


@dataclass(frozen=True)
class Targets:
    """The layers to adapt.

    Attributes:
        paths: full module paths, in the model's own order.
        keys: the same set in the format of mlx-lm's `lora_parameters.keys`.
        num_layers: the number of last blocks that `keys` applies to.
    """

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    num_layers: int


def is_adaptable(module: nn.Module) -> bool:
    """Return whether a low-rank layer can wrap this module."""
    return adapter_class(module) is not None


def has_weights(module: nn.Module) -> bool:
    """Return whether a module itself has arrays, so that it can be trained in full."""
    return any(isinstance(value, mx.array) for name, value in module.items() if not name.startswith("_"))


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of the model's blocks (`model.layers.0` ...), in order."""
    by_identity = {id(module): path for path, module in model.named_modules()}
    return [by_identity[id(block)] for block in model.layers]


def select_targets(
    model: nn.Module,
    target_modules: str = ALL_LINEAR,
    num_layers: int = -1,
    fits: Callable[[nn.Module], bool] = is_adaptable,
    flag: str = "--target-modules",
    stored: bool = False,
) -> Targets:
    """Choose layers.

    In a mixture of experts `all-linear` includes the experts and the shared ones, as in mlx-lm: they are most of what
    a token passes through, and "LoRA Without Regret" (2025) finds adapters on attention alone worse. It excludes the
    routers, as PEFT does and mlx-lm does not: a changed router sends tokens to experts not trained for them, and there
    is no load balancing here. Name a router (`mlp.gate`) to adapt it. Each of the many experts has its own factors, so
    for a small adapter use `self_attn.*`.

    Args:
        model: an mlx-lm model.
        target_modules: `all-linear` (every linear layer of the blocks except routers; heads and embeddings only by
            name), or names and shell patterns separated by commas: `q_proj`, `self_attn.*`, `*.layers.3.mlp.*`,
            `embed_tokens`. A name matches a whole path or the end of one after a dot, as in PEFT.
        num_layers: only the last N blocks; 0 or less for all, as in mlx-lm. Layers outside blocks are not filtered.
        fits: returns whether a module can be chosen: `is_adaptable`, or `has_weights` for training in full.
        flag: the flag that gave `target_modules`, for errors.
        stored: whether they come from a stored adapter, which may have layers that we would not train; then
            `all-linear` includes routers, which is what mlx-lm means if an adapter names no keys.

    Raises:
        InputError: a part matches nothing that can be trained; the message has the reason and the names that exist.
    """
    blocks = block_paths(model)
    if num_layers > len(blocks):
        raise InputError(
            f"--num-layers {num_layers}: the model has {len(blocks)} blocks; give at most that many, or -1 for all"
        )
    chosen_blocks = blocks if num_layers <= 0 else blocks[len(blocks) - num_layers :]
    fitting = {path: module for path, module in model.named_modules() if fits(module)}
    in_block = {path: next((b for b in blocks if path.startswith(b + ".")), None) for path in fitting}
    allowed = [p for p in fitting if in_block[p] is None or in_block[p] in chosen_blocks]
    if not stored:
        beyond = {part for part, why in OUT_OF_REACH.items() if fits is is_adaptable or why is NO_GRADIENT}
        allowed = [p for p in allowed if beyond.isdisjoint(p.split("."))]
    picked: set[str] = set()
    problems = []
    for wish in (part.strip() for part in target_modules.split(",")):
        if wish == ALL_LINEAR:
            found = [p for p in allowed if in_block[p] and isinstance(fitting[p], (*LINEAR, *SWITCH))]
            found = [p for p in found if stored or ROUTERS.isdisjoint(p.split("."))]
        else:
            found = [p for p in allowed if matches(p, wish)]
        picked.update(found)
        if not found:
            problems.append(_unmatched(flag, wish, list(fitting), num_layers))
    if problems:
        raise InputError("; ".join(problems))
    order = [path for path, _ in model.named_modules() if path in picked]
    paths = tuple(sorted(order, key=_natural))
    return Targets(paths, _mlx_lm_keys(paths, chosen_blocks), len(chosen_blocks))


def targets_of(model: nn.Module, paths: Iterable[str]) -> Targets:
    """Return the targets that have exactly these paths, in an mlx-lm model."""
    wanted, blocks = set(paths), block_paths(model)
    ordered = tuple(sorted((path for path, _ in model.named_modules() if path in wanted), key=_natural))
    first = next((i for i, block in enumerate(blocks) if any(p.startswith(f"{block}.") for p in ordered)), 0)
    return Targets(ordered, _mlx_lm_keys(ordered, blocks[first:]), len(blocks) - first)


def matches(path: str, wish: str) -> bool:
    """Return whether a name or pattern matches this module path; in a vision tower, only one that begins as the path does."""
    if of_tower(path):  # so that `q_proj` means the language model's, whether the tower is there or not
        return of_tower(wish) and (path == wish or fnmatchcase(path, wish))
    return path == wish or path.endswith("." + wish) or fnmatchcase(path, wish) or fnmatchcase(path, "*." + wish)


def layer_shapes(
    paths: tuple[str, ...],
    method: Method,
    rank: int,
    alpha: float,
    ranks: Mapping[str, float],
    alphas: Mapping[str, float],
) -> dict[str, tuple[int, float]]:
    """Return each layer's (rank, scale).

    Args:
        paths: the adapted layers.
        method: decides how the scale follows from alpha and rank.
        rank, alpha: for layers that no pattern matches.
        ranks, alphas: name or pattern -> a layer's own value; the first match counts, as in PEFT.

    Raises:
        InputError: a pattern matches no adapted layer.
    """
    for flag, patterns in (("--rank-pattern", ranks), ("--alpha-pattern", alphas)):
        idle = [pattern for pattern in patterns if not any(matches(path, pattern) for path in paths)]
        if idle:
            raise InputError(
                f"{flag} {', '.join(idle)}: matches no adapted layer; fix the pattern, or add the layer to --target-modules"
            )
    shapes = {}
    for path in paths:
        own_rank = int(next((value for pattern, value in ranks.items() if matches(path, pattern)), rank))
        own_alpha = next((value for pattern, value in alphas.items() if matches(path, pattern)), alpha)
        shapes[path] = own_rank, method.scale_of(own_alpha, own_rank)
    return shapes


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _unmatched(flag: str, wish: str, fitting: list[str], num_layers: int) -> str:
    meant = [path for path in fitting if matches(path, wish)]
    for part, why in OUT_OF_REACH.items():
        if meant and all(part in path.split(".") for path in meant):
            return f"{flag} {wish!r}: {part} would learn nothing, because {why}; leave it out"
    if meant:
        return f"{flag} {wish!r}: matches layers only outside the last {num_layers} blocks; raise --num-layers"
    names = sorted({path.rsplit(".", 1)[-1] for path in fitting})
    if wish == ALL_LINEAR:
        found = f"name one of {', '.join(names)}" if names else "choose another model"
        return f"{flag} {wish}: the model's blocks have no linear layer that can be adapted; {found}"
    close = difflib.get_close_matches(wish, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{flag} {wish!r}: matches no layer; {hint}the layers are {', '.join(names)}; all-linear chooses all linear ones"


def _mlx_lm_keys(paths: tuple[str, ...], chosen_blocks: list[str]) -> tuple[str, ...]:
    """Return block-relative names if every chosen block has the same targets, else full paths."""
    relative = {
        block: tuple(p[len(block) + 1 :] for p in paths if p.startswith(block + ".")) for block in chosen_blocks
    }
    outside = [p for p in paths if not any(p.startswith(block + ".") for block in chosen_blocks)]
    if len(set(relative.values())) == 1:
        return (*next(iter(relative.values())), *outside)
    return paths

"""Where adapters go: choose target layers, wrap them, freeze everything else."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.init import kaiming_factors
from mlx_lora.adapters.layers import ADAPTERS, adapter_class
from mlx_lora.adapters.parts import LINEAR, SWITCH, base_dims
from mlx_lora.errors import InputError

ALL_LINEAR = "all-linear"
# What mlx-lm's mixtures call the layers that decide which experts a token goes to.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Targets:
    """The layers to adapt.

    Attributes:
        paths: full module paths, in the model's own order.
        keys: the same set as mlx-lm's `lora_parameters.keys` wants it.
        num_layers: blocks counted from the last that `keys` applies to.
    """

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    num_layers: int


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of the model's blocks (`model.layers.0` ...), in order."""
    by_identity = {id(module): path for path, module in model.named_modules()}
    return [by_identity[id(block)] for block in model.layers]


def select_targets(
    model: nn.Module, target_modules: str = ALL_LINEAR, num_layers: int = -1, *, routers: bool = False
) -> Targets:
    """Choose the layers to adapt.

    In a mixture of experts `all-linear` takes the experts and the shared ones: they are most of what a token
    passes through, mlx-lm takes them too, and "LoRA Without Regret" (2025) finds adapters on attention alone
    behind. It leaves out the routers, which mlx-lm takes and PEFT does not: a router that moves sends tokens to
    experts not trained for them, and nothing here balances the load. Name one (`mlp.gate`) to adapt it. Experts
    are many and each has its factors: `self_attn.*` makes a small adapter.

    Args:
        model: an mlx-lm model.
        target_modules: `all-linear` (every linear layer of the blocks but routers; heads and embeddings only by name),
            or names and shell patterns by comma: `q_proj`, `self_attn.*`, `*.layers.3.mlp.*`, `embed_tokens`.
            A name matches a whole path or the end of one after a dot, as in PEFT.
        num_layers: adapt only the last N blocks; 0 or less for all, as in mlx-lm. Layers outside blocks are not filtered.
        routers: count routers among `all-linear`, as mlx-lm means it when an adapter names no keys.

    Raises:
        InputError: naming every part that matches nothing, what filtered it, and what exists.
    """
    blocks = block_paths(model)
    if num_layers > len(blocks):
        raise InputError(
            f"--num-layers {num_layers}: the model has {len(blocks)} blocks; ask for at most that many, or -1"
        )
    chosen_blocks = blocks if num_layers <= 0 else blocks[len(blocks) - num_layers :]
    adaptable = {path: module for path, module in model.named_modules() if adapter_class(module) is not None}
    in_block = {path: next((b for b in blocks if path.startswith(b + ".")), None) for path in adaptable}
    allowed = [p for p in adaptable if in_block[p] is None or in_block[p] in chosen_blocks]
    picked: set[str] = set()
    problems = []
    for wish in (part.strip() for part in target_modules.split(",")):
        if wish == ALL_LINEAR:
            found = [p for p in allowed if in_block[p] and isinstance(adaptable[p], (*LINEAR, *SWITCH))]
            found = [p for p in found if routers or ROUTERS.isdisjoint(p.split("."))]
        else:
            found = [p for p in allowed if _matches(p, wish)]
        picked.update(found)
        if not found:
            problems.append(_unmatched(wish, list(adaptable), num_layers))
    if problems:
        raise InputError("; ".join(problems))
    order = [path for path, _ in model.named_modules() if path in picked]
    paths = tuple(sorted(order, key=_natural))
    return Targets(paths, _mlx_lm_keys(paths, chosen_blocks), len(chosen_blocks))


def _matches(path: str, wish: str) -> bool:
    return path == wish or path.endswith("." + wish) or fnmatchcase(path, wish) or fnmatchcase(path, "*." + wish)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _unmatched(wish: str, adaptable: list[str], num_layers: int) -> str:
    if any(_matches(path, wish) for path in adaptable):
        return (
            f"--target-modules {wish!r}: matches layers only outside the last {num_layers} blocks; raise --num-layers"
        )
    names = sorted({path.rsplit(".", 1)[-1] for path in adaptable})
    close = difflib.get_close_matches(wish, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"--target-modules {wish!r}: matches no layer; {hint}there are {', '.join(names)}, or all-linear"


def _mlx_lm_keys(paths: tuple[str, ...], chosen_blocks: list[str]) -> tuple[str, ...]:
    """Write block-relative names when every chosen block has the same targets, else full paths."""
    relative = {
        block: tuple(p[len(block) + 1 :] for p in paths if p.startswith(block + ".")) for block in chosen_blocks
    }
    outside = [p for p in paths if not any(p.startswith(block + ".") for block in chosen_blocks)]
    if len(set(relative.values())) == 1:
        return (*next(iter(relative.values())), *outside)
    return paths


def inject(
    model: nn.Module,
    paths: tuple[str, ...],
    rank: int,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, float]] | None = None,
    form: str = "lora",
) -> None:
    """Freeze `model` and wrap the layers at `paths`; the factors become its only trainable parameters.

    Args:
        model: changed in place. A fresh adapter leaves its outputs as they were (`lora_b` is zero).
        paths: full paths from `select_targets`.
        rank: r; larger than a layer's narrower side is allowed but wasteful, as in PEFT.
        scale: factor on the low-rank product.
        dropout: on the adapter's input.
        seed: of the initial factors.
        shapes: path -> (rank, scale), where a layer has its own.
        form: `lora` or `dora`.

    Raises:
        InputError: a layer that the form does not fit.
    """
    model.freeze()
    modules = dict(model.named_modules())
    unfit = [path for path in paths if adapter_class(modules[path], form) is None]
    if unfit:
        raise InputError(f"--method {form}: does not fit {', '.join(unfit)}; leave it out of --target-modules")
    wrapped = []
    for path in paths:
        base = modules[path]
        own_rank, own_scale = (shapes or {}).get(path, (rank, scale))
        experts = base.num_experts if isinstance(base, SWITCH) else None
        factors = kaiming_factors(path, *base_dims(base), own_rank, seed, experts)
        layer = adapter_class(base, form).from_base(base, factors, own_scale, dropout)
        layer.freeze()
        layer.unfreeze(keys=list(layer.TRAINED), recurse=False)
        wrapped.append((path, layer))
    model.update_modules(tree_unflatten(wrapped))


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapter layers of `model` by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ADAPTERS)}


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the factors by their stored names (`model.layers.0.self_attn.q_proj.lora_a`)."""
    return dict(tree_flatten(model.trainable_parameters()))

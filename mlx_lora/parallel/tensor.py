"""Cut a base's attention heads, MLPs and experts among ranks, each of which computes its part of every layer.

mlx-lm says how an architecture is cut (`Model.shard`). What it makes of a layer is only its weights here: the layer
stays what it was, smaller, so that measured products, checkpointing and the planner treat it as before. Messages are
sent where a branch of a block begins (in the backward pass) and ends (in the forward pass), and not at each layer of
it: two of each per block. adapters/base.py has them.

All ranks have the same rows, so they send the same messages. Their order is the same too, whatever kernels a rank computes
with: blocks and branches follow each other, so each message is computed from the one before it.

The loss over the vocabulary is divided as well. All ranks have the hidden states of all positions, so each can compute the
losses of some positions with the whole head. The losses are added up in the forward pass, and the gradients of the hidden
states in the backward pass:

    losses = sum of ranks (0 ... 0, own losses, 0 ... 0)          dh likewise

The second message is made to wait for the first, because every rank must send its messages in the same order.

Shapes: P supervised positions, N ranks, D width.
Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import (
    LINEAR,
    QUANTIZED,
    SWITCH,
    AdapterLayer,
    Cut,
    CutDropout,
    Entry,
    Exit,
    Wire,
    base_dims,
    mix_in,
)
from mlx_lora.adapters.inject import adapter_layers, remove_adapters
from mlx_lora.planner.several_macs import cut_problem
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.models.head import Head, OfHidden
    from mlx_lora.parallel.ranks import SeveralRanks

# Layers

_ENDS = (ShardedToAllLinear, QuantizedShardedToAllLinear)
_PARTS = (AllToShardedLinear, QuantizedAllToShardedLinear, *_ENDS)


@dataclass(frozen=True)
class RankPosition:
    """A rank's place among all, as mlx-lm asks for it when it cuts a model."""

    own: int
    count: int

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return self.count


def cut_model(model: nn.Module, config: dict[str, Any], ranks: SeveralRanks) -> None:
    """Leave only this rank's part of the model in memory, and connect it with the other ranks' parts.

    Args:
        model: adapted with LoRA layers; its arrays may be lazy, and are then read one layer at a time.
        config: its config.json.
        ranks: all ranks; each must call this.

    Raises:
        InputError: the model cannot be cut, or not for so many ranks.
    """
    cut_layers(model, config, RankPosition(ranks.rank, ranks.size), wire_among(ranks))
    _read_parts(model)


def wire_among(ranks: SeveralRanks) -> Wire:
    """Return what connects ranks inside a forward and a backward pass."""
    return Wire(ranks.sum_inside, ranks.rank, ranks.size)


def cut_layers(model: nn.Module, config: dict[str, Any], place: RankPosition, wire: Wire) -> None:
    """Cut a model as one rank does, lazily; nothing is read.

    Args:
        model, config: as for `cut_model`.
        place: of the rank.
        wire: connects it with the others; it may do nothing, for the planner.

    Raises:
        InputError: see `cut_model`.
    """
    problem = cut_problem(type(model).__module__.rpartition(".")[2], config, place.count)
    if problem:
        raise InputError(
            f"--parallel tensor in {place.count} processes: {problem}; use --parallel data, with --shard-base if memory is short"
        )
    adapters = adapter_layers(model)
    remove_adapters(model)
    widths = {path: base_dims(m) for path, m in model.named_modules() if isinstance(m, (*LINEAR, *SWITCH))}
    branches, ends = _cut(model, place)
    modules = dict(model.named_modules())
    cuts = {path: _cut_of(modules[path], whole, place) for path, whole in widths.items()}
    _check_groups({path: modules[path] for path, cut in cuts.items() if cut is not None})
    model.update_modules(tree_unflatten(list(adapters.items())))
    for path, layer in adapters.items():
        cut = cuts.get(path)
        if cut is not None:
            _cut_adapter(layer, cut)
    at = dict(model.named_modules())
    for mixin, module in [(Exit, at[path]) for path in ends] + [(Entry, branch) for branch in branches]:
        mix_in(mixin, module)
        module._wire = wire


def _cut(model: nn.Module, place: RankPosition) -> tuple[list[nn.Module], list[str]]:
    """Cut the layers of a model without adapters, lazily.

    Returns:
        The branches of blocks that have parts of layers, and the paths of what ends them.
    """
    before = dict(model.named_modules())
    shapes = {id(module): _shapes(module) for module in before.values()}
    counts = {path: _counts(module) for path, module in before.items()}
    try:
        model.shard(place)
    except ValueError as error:
        raise InputError(f"--parallel tensor in {place.count} processes: {error}; use --parallel data") from None
    after, ends, restored = dict(model.named_modules()), [], []
    for path, module in after.items():
        if isinstance(module, _PARTS):
            before[path].update(module.parameters())
            restored.append((path, before[path]))
        if isinstance(module, _ENDS):
            ends.append(path)
            if "bias" in before[path] and place.own:
                before[path].bias = mx.zeros_like(before[path].bias)  # added once, by rank 0
        elif isinstance(vars(module).get("sharding_group"), RankPosition):
            module.sharding_group = None  # this package's messages, not the model's
            ends.append(path)
    model.update_modules(tree_unflatten(restored))
    _check_counts(dict(model.named_modules()), counts, place.count)
    branches = [
        branch
        for block in model.layers
        for branch in _children(block)
        if any(_shapes(module) != shapes[id(module)] for module in branch.modules())
    ]
    return branches, ends


def _children(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.children().values() if isinstance(module, nn.Module)]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own arrays."""
    return {name: value.shape for name, value in module.items() if isinstance(value, mx.array)}


def _counts(module: nn.Module) -> dict[str, int]:
    """Return a module's own whole numbers, such as its heads."""
    return {name: value for name, value in vars(module).items() if type(value) is int}


def _check_counts(modules: dict[str, nn.Module], before: dict[str, dict[str, int]], size: int) -> None:
    """Refuse a cut that mlx-lm rounded: it divides heads by the number of ranks without a look at the rest."""
    for path, counts in before.items():
        for name, now in _counts(modules[path]).items():
            was = counts.get(name, now)
            if now != was and now * size != was:
                raise InputError(
                    f"--parallel tensor in {size} processes: {path} has {was} {name}, which cannot be divided by {size}; "
                    "use --parallel data, with --shard-base if memory is short"
                )


def _cut_of(module: nn.Module, whole: tuple[int, int], place: RankPosition) -> Cut | None:
    """Return which features a layer has kept, None if all; whole: its widths before."""
    for of_inputs, before, now in zip((True, False), whole, base_dims(module), strict=True):
        if now != before:
            return Cut(of_inputs, place.own * now, (place.own + 1) * now, before)
    return None


def _check_groups(modules: dict[str, nn.Module]) -> None:
    """Refuse a cut through a group of quantized weights, whose numbers have a scale in common."""
    for path, module in modules.items():
        if isinstance(module, QUANTIZED) and base_dims(module)[0] != module.scales.shape[-1] * module.group_size:
            raise InputError(
                f"--parallel tensor: {path} has {base_dims(module)[0]} inputs for each process, which cannot be divided into groups of "
                f"{module.group_size} quantized weights; use --parallel data, or convert the model with a smaller --group-size"
            )


def _cut_adapter(layer: AdapterLayer, cut: Cut) -> None:
    if layer.LAYER_TYPE != "lora":
        raise InputError(f"--method {layer.LAYER_TYPE} with --parallel tensor: needs whole weights; use lora")
    layer.cut = cut
    if cut.of_inputs:
        layer.dropout = CutDropout(layer.dropout.probability, cut)


def _read_parts(model: nn.Module) -> None:
    """Read what this rank keeps, an array at a time: a whole array is in memory until it is cut."""
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)


def in_branches(model: nn.Module) -> frozenset[str]:
    """Return the names of trained parameters whose gradient on a rank is a part of the whole one."""
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Entry)
        for name, _ in tree_flatten(module.trainable_parameters())
    )


# Loss


def divided(losses_of: OfHidden, wire: Wire) -> OfHidden:
    """Return a function with the same results, of which each rank computes a part.

    Args:
        losses_of: computes each position by itself.
        wire: connects the ranks.
    """

    def losses(head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, gradient: bool = True) -> mx.array:
        count = len(targets)
        part = -(-count // wire.size)
        own = slice(min(wire.rank * part, count), min((wire.rank + 1) * part, count))
        around = (own.start, count - own.stop)
        of_own = partial(losses_of, head, targets=targets[own], weights=weights[own], gradient=gradient)

        @mx.custom_function
        def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
            h, made, slopes = hidden[own], mx.zeros((0,)), hidden[own]
            if len(h) and gradient:
                [made], [slopes] = mx.vjp(lambda h: [of_own(h)], [h], [mx.ones((len(h),))])
            elif len(h):
                made = of_own(h)
            return wire.sum(mx.pad(made, around)), slopes

        @forward.vjp
        def forward_vjp(hidden: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
            slopes = (cotangents[0][own][:, None] * outputs[1]).astype(hidden.dtype)
            [slopes] = mx.depends([slopes], [outputs[0]])
            return wire.sum(mx.pad(slopes, [around, (0, 0)]))

        return forward(hidden)[0]

    return losses

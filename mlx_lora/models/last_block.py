"""Compute a model's last block only at the positions that its loss reads.

No block follows it, so the last block needs a position without a trained target for its key and its value alone:

    all positions       the norm before attention; queries, keys and values; attention
    chosen positions    attention's output projection, residual additions, all other norms, the MLP, the model's last norm

The block's own code runs twice. The first run, on all positions, ends where it calls its attention, and shows what
attention gets. The second run is on the chosen positions, and its call of attention returns these positions of attention
over all. So a block may do anything with a position's own numbers: norms before or after its branches, parallel
branches, scaled residuals, experts.

This is right for a block that mixes positions in its attention only, if attention ends with its output projection and the
model with a norm. ARCHITECTURES lists those that were read and are tested. On the model to train, loss and gradient are
also compared with those of the whole block before the run (training/losses.py).

Shapes: B batch, T time, P chosen positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# mlx-lm's modules whose blocks and bodies were read; tests/test_last_block.py tries each.
DENSE = (
    "llama", "qwen", "qwen2", "qwen3", "ministral3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3",
    "granite", "cohere", "cohere2", "glm", "glm4", "starcoder2", "stablelm", "internlm2", "internlm3", "helium", "exaone4",
    "ernie4_5", "hunyuan_v1_dense", "seed_oss", "mimo", "minicpm", "nemotron", "apertus", "gpt2", "gpt_neox", "telechat3",
)  # fmt: skip
EXPERTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "glm4_moe", "ernie4_5_moe", "dots1", "bailing_moe",
    "gpt_oss", "deepseek_v2", "deepseek_v3", "youtu_llm",
)  # fmt: skip
# Only some of their blocks have attention.
HYBRID = ("lfm2", "granitemoehybrid", "qwen3_next", "qwen3_5")
ARCHITECTURES = frozenset(f"mlx_lm.models.{name}" for name in (*DENSE, *EXPERTS, *HYBRID))

# The names of attention and of its output projection.
ATTENTIONS = ("self_attn", "attention", "attn")
OUTPUTS = ("o_proj", "wo", "dense", "out_proj", "c_proj")


class _Reached(Exception):
    """A block has called its attention.

    Attributes:
        call: the arguments of that call.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.call = args, kwargs


def last_block(model: nn.Module, body: nn.Module) -> nn.Module | str:
    """Return the last block of a model, or in a few words why all of it must be computed.

    Args:
        model: an mlx-lm model, adapted or not, with or without checkpointing.
        body: its part that calls the blocks.
    """
    block = model.layers[-1]
    home = _own_class(block).__module__
    if home not in ARCHITECTURES or _own_class(body).__module__ != home:
        return "not known to allow less"
    attention = _part(block, ATTENTIONS)
    if attention is None or _part(attention, OUTPUTS) is None:
        return "without attention"
    return block


@contextmanager
def only_at(block: nn.Module, positions: mx.array, count: int) -> Iterator[None]:
    """Let a block compute only some positions inside the context: its calls return (1, P, D) instead of (B, T, D).

    Args:
        block: as `last_block` returns it; if it is checkpointed, its backward pass computes the same positions again.
        positions: (P,) int, row * T + column.
        count: B T. A call with other rows, as in a model that runs its blocks twice, is left whole: positions that lie
            beyond its rows would read and write memory that is not the array's.
    """
    kind, own = type(block), _own_class(block)

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if x.shape[0] * x.shape[1] != count:
            return own.__call__(self, x, *args, **kwargs)
        return _at(positions, own.__call__, self, x, *args, **kwargs)

    block.__class__ = _with_call(kind, own, call)
    try:
        yield
    finally:
        block.__class__ = kind


def _at(
    positions: mx.array, call: Callable[..., Any], block: nn.Module, x: mx.array, *args: Any, **kwargs: Any
) -> mx.array:
    """Return a block's output at the positions, (1, P, D); `call` is its own code, which takes x (B, T, D)."""
    attention = _part(block, ATTENTIONS)
    output = _part(attention, OUTPUTS)

    def stop(self: nn.Module, *given: Any, **named: Any) -> mx.array:
        raise _Reached(given, named)

    def pick(x: mx.array) -> mx.array:
        return x.reshape(-1, x.shape[-1])[positions][None]

    with _answering(attention, stop):
        try:
            call(block, x, *args, **kwargs)
        except _Reached as reached:
            given, named = reached.call
        else:
            raise ValueError("the block does not call its attention")
    project = type(output).__call__
    with _answering(output, lambda self, x, **named: project(self, pick(x), **named)):
        attended = attention(*given, **named)  # (1, P, D)
    with _answering(attention, lambda self, *given, **named: attended):
        return call(block, pick(x), *args, **kwargs)


@contextmanager
def _answering(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let `call` take the calls of one instance, by changing the class of this instance for its duration."""
    kind = type(module)
    module.__class__ = _with_call(kind, kind, call)
    try:
        yield
    finally:
        module.__class__ = kind


def _with_call(kind: type, own: type, call: Callable[..., Any]) -> type:
    """Return a class like `kind` with `call` for the `__call__` of `own`, below the mix-ins of this package."""
    if kind is own:
        return type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
    *mixins, base = kind.__bases__
    return type(kind.__name__, (*mixins, _with_call(base, own, call)), {"__module__": kind.__module__})


def _own_class(module: nn.Module) -> type:
    """Return a module's class without the mix-ins of this package, which come first."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("mlx_lora."))


def _part(module: nn.Module, names: tuple[str, ...]) -> Any:
    """Return the first of these parts that a module has, None if it has none."""
    return next((module[name] for name in names if isinstance(module.get(name), nn.Module)), None)

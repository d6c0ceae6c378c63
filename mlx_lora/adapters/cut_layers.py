"""Layers of which each rank has a part (tensor parallelism), with an adapter whose factors are whole on every rank.

    Entry   a branch of a block (attention, MLP): every rank gets the same input; gradients of the ranks' parts are added
    Cut     which inputs or outputs of a layer this rank has; an adapter layer computes with this part of its factors
    Exit    the layer, or the mixture of experts, that ends a branch: the ranks' outputs are added

    y = exit(entry(x) W[:, own] ... W[own, :])          own: this rank's heads, or its columns of the MLP

Between entry and exit a rank computes its own part of a sum, so a gradient of anything that is used there is a part
of the whole one, and all ranks' parts add up to it. Outside of a branch, all ranks compute the same.

Shapes: N ranks; an adapter's factors are A (in, r) and B (r, out), for E experts (E, r, in) and (E, out, r).
Source: Megatron-LM, arXiv 1909.08053, section 3: f (entry) and g (exit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_lora.adapters.parts import Dropout


@dataclass(frozen=True)
class Cut:
    """The part of a layer's inputs or outputs that this rank has.

    Attributes:
        of_inputs: whether inputs are cut, not outputs.
        begin, end: this rank's features.
        whole: how many there are.
    """

    of_inputs: bool
    begin: int
    end: int
    whole: int

    def factors(self, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        """Return this rank's part of a pair of factors."""
        own = slice(self.begin, self.end)
        if not self.of_inputs:
            return a, b[:, own]
        return (a[own] if a.ndim == 2 else a[..., own]), b


class CutDropout(Dropout):
    """Dropout of some of a layer's inputs: draws for all of them, so that the ranks together drop what one process would."""

    def __init__(self, probability: float, cut: Cut):
        super().__init__(probability)
        self._cut = cut

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        if not self.active:
            return x
        kept, shape = 1 - self.probability, (*x.shape[:-1], self._cut.whole)
        drawn = mx.random.bernoulli(kept, shape, key=self.draw() if key is None else key)
        return drawn[..., self._cut.begin : self._cut.end] * x * (1 / kept)


class Wire:
    """What goes over the network inside a forward and a backward pass."""

    def __init__(self, add: Callable[[mx.array], mx.array], rank: int = 0, size: int = 1):
        """Set up.

        Args:
            add: returns the sum of all ranks' arrays, lazily.
            rank, size: this rank's number, and how many there are.
        """
        self.sum, self.rank, self.size = add, rank, size

    def entered(self, x: mx.array) -> mx.array:
        """Return `x`, whose gradient is the sum of the ranks' gradients."""

        @mx.custom_function
        def enter(x: mx.array) -> mx.array:
            return x

        enter.vjp(lambda x, gradient, _: self.sum(gradient))
        return enter(x)

    def added(self, x: mx.array) -> mx.array:
        """Return the sum of the ranks' `x`, whose gradient every rank already has."""

        @mx.custom_function
        def leave(x: mx.array) -> mx.array:
            return self.sum(x)

        leave.vjp(lambda x, gradient, _: gradient)
        return leave(x)


class Entry(nn.Module):
    """A mixin that comes before a branch's own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wire: Wire = self._wire
        args, kwargs = tree_map(lambda leaf: wire.entered(leaf) if _is_float(leaf) else leaf, (args, kwargs))
        return super().__call__(*args, **kwargs)  # pyright: ignore[reportCallIssue] # the branch's


class Exit(nn.Module):
    """A mixin that comes before the own class of what ends a branch."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        wire: Wire = self._wire
        return wire.added(super().__call__(*args, **kwargs))  # pyright: ignore[reportCallIssue] # the layer's


def mix_in(mixin: type[nn.Module], module: nn.Module, wire: Wire) -> None:
    """Make one instance an entry or an exit; its class keeps its name's module, by which its kernels are found."""
    own = type(module)
    module.__class__ = type(f"{mixin.__name__}{own.__name__}", (mixin, own), {"__module__": own.__module__})
    module._wire = wire


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)

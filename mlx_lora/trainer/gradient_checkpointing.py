"""Gradient checkpointing per block instance: what a block keeps for the backward pass, and what it recomputes.

A block without checkpointing keeps every intermediate result: norms, activations, products. A checkpointed block
keeps its input and

    selective   the outputs of its linear layers and of attention; the backward pass repeats the rest
                (norms, rotations, activations), but no product with a base weight
    block       the output of attention only; the backward pass repeats the block's products as well

`selective` costs little time, because it repeats only memory traffic; `block` costs most of a forward pass.

Source: arXiv 1604.06174 (recomputation per segment), 2205.05198 section 5 (selective); `selective` keeps the same
results as JAX's `dots_saveable` policy.

Compute the MLP of a block in chunks of positions, so that a long row does not need all of it at once.

With checkpointing, what one block computes again decides how long a row may be, and most of that is the MLP: its width is
several times the model's, and a backward pass needs a handful of such arrays. An MLP computes each position by itself, so it
may be computed for some positions at a time:

    forward     y = [f(x_1), f(x_2), ...], one chunk after the other; only x is kept
    backward    for each chunk: f(x_i) again, d_x_i, and the sums of the gradients of the adapter's factors (float32)

This changes no result but for the order in which the factors' gradients are added up, and computes nothing more than a
checkpointed block does, unless the block has a norm behind its MLP (Gemma): that norm needs y in the backward pass.
Mixtures of experts choose experts for each position, so they are chunked in the same way.

A batch that is not larger than a bound is computed as a whole (planner/memory.py has the bound, which the planner follows).
With dropout, chunks would drop other features, so the MLP stays whole; so it does if ranks have parts of it, and send their sums.

Shapes: B rows, T positions of a row, D width.
Source: sequence tiling of ALST, arXiv 2506.13996 section 3.1; Blockwise Parallel Transformers, arXiv 2305.19370.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.adapters.base import LINEAR, SWITCH, AdapterLayer, base_dims, is_exactly
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat import functions
from mlx_lora.compat.functions import keeps_context
from mlx_lora.config.settings import checkpoint_every
from mlx_lora.kernels.attention import Tiles, attend, attend_gradient
from mlx_lora.models.head import is_known_block
from mlx_lora.planner.memory import CHUNKED_FROM_BYTES, position_chunks

PRODUCTS = (*LINEAR, *SWITCH)

STATELESS = (mx.array, str, bool, int, float, type(None))

Gradient = Callable[[Sequence[mx.array], mx.array, mx.array], Sequence[mx.array]]
"""(primals, cotangent, output) -> cotangents of the primals."""


class Tape:
    """The results that one block keeps, in the order in which its layers compute them.

    Blocks run one after the other, so a model needs only one tape: each block records its forward pass, stores
    the outputs, and replays them in its backward pass.

    Attributes:
        products: whether the outputs of linear layers are kept, not only attention's.
        left_out: whether a block ran without checkpointing, because it is not a function of arrays.
    """

    def __init__(self, products: bool) -> None:
        """Create a tape that records nothing yet.

        Args:
            products: keep the outputs of linear layers, not only attention's.
        """
        self.products = products
        self.left_out = False
        self._recorded: list[mx.array] | None = None
        self._replayed: Iterator[mx.array] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[mx.array]]:
        """Collect the results that are kept inside this context."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def replaying(self, kept: Sequence[mx.array]) -> Iterator[None]:
        """Return the kept results inside this context, instead of computing them."""
        self._replayed = iter(kept)
        try:
            yield
        finally:
            self._replayed = None

    def draw(self, make: Callable[[], mx.array]) -> mx.array:
        """Return `make()`, a random draw, or in a replay the draw of the forward pass."""
        if self._replayed is not None:
            return next(self._replayed)
        drawn = make()
        if self._recorded is not None:
            self._recorded.append(drawn)
        return drawn

    def keep(self, function: Callable[..., mx.array], gradient: Gradient, *primals: mx.array) -> mx.array:
        """Return `function(*primals)`, or in a replay the output kept from the forward pass.

        Args:
            function: of the primals alone.
            gradient: its cotangents, given its output.
            primals: all arrays that are differentiated.
        """
        if self._replayed is not None:
            replayed = mx.custom_function(lambda output, *primals: output)
            replayed.vjp(lambda all_primals, d, output: (mx.zeros_like(output), *gradient(all_primals[1:], d, output)))
            return replayed(next(self._replayed), *primals)
        output = function(*primals)
        if self._recorded is not None:
            self._recorded.append(output)
        return output

    def attend(self, q: mx.array, k: mx.array, v: mx.array, tiles: Tiles, sinks: mx.array | None = None) -> mx.array:
        """Compute attention (kernels/attention.py) and keep its output."""
        primals = (q, k, v) if sinks is None else (q, k, v, sinks)
        return self.keep(
            lambda q, k, v, *sinks: attend(q, k, v, tiles, *sinks),
            partial(attend_gradient, tiles),
            *primals,
        )


class Kept(nn.Module):
    """Records a linear layer's output on the tape; a mixin that comes before the layer's own class."""

    tape: Tape

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        function, primals = as_function(self, super().__call__, args, kwargs)

        def gradient(primals: Sequence[mx.array], d: mx.array, output: mx.array) -> Sequence[mx.array]:
            return mx.vjp(lambda *p: [function(*p)], list(primals), [d])[1]

        return self.tape.keep(function, gradient, *primals) if self.tape.products else function(*primals)


class KeptAdapter(Kept):
    """Records an adapter layer's dropout key and output on the tape; a mixin that comes before the layer's own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        if self.dropout.active:
            kwargs = {**kwargs, "key": self.tape.draw(self.dropout.draw)}
        return super().__call__(*args, **kwargs)


class Checkpointed(nn.Module):
    """Keeps only the results on a block's tape and recomputes the others; a mixin that comes before the block's own class."""

    tape: Tape

    def at_hand(self, before: Sequence[mx.array]) -> AbstractContextManager:
        """Return a context in which the block has its weights: always, unless they are shared (parallel/sharded_base.py).

        Args:
            before: arrays that are computed before the weights are needed.
        """
        return nullcontext()

    def in_turn(self, own: list[mx.array], given: list[mx.array]) -> list[mx.array]:
        """Return the gradients of the block's arguments; a shared block's wait for those of its parameters.

        Args:
            own: gradients of its parameters.
            given: of its arguments.
        """
        return given

    def computed(self, function: Callable[..., list[mx.array]], *given: list[mx.array]) -> list[mx.array]:
        """Return `function(*given)`; an offloaded block computes it at once (parallel/offloaded_base.py)."""
        return function(*given)

    def segment(self, *args: Any, **kwargs: Any) -> Segment | None:
        """Return the call as a function of arrays; None: it has state, so it is not one.

        In generation the cache has state. The blocks of Kimi K3 and DeepSeek V4.1 have state too: they write into an object
        that the next block reads.
        """
        if not all(map(is_stateless, (*args, *kwargs.values()))):
            return None
        return Segment(self, super().__call__, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        segment = self.segment(*args, **kwargs)
        if segment is None:
            self.tape.left_out = True
            with self.at_hand(float_arrays((args, kwargs))):
                return super().__call__(*args, **kwargs)

        @mx.custom_function
        def run(*primals: mx.array) -> list[mx.array]:
            outputs, kept = segment.forward(primals)
            return [*outputs, *kept]

        @run.vjp
        def run_vjp(primals, cotangents, outputs):
            count = segment.returned
            gradients = segment.backward(cotangents[:count], outputs[count:], primals)
            own = gradients[: len(segment.names)]
            return [*own, *self.in_turn(own, gradients[len(own) :])]

        return segment.result(run(*segment.primals))


class Segment:
    """A call of a checkpointed block, as a function of arrays with a backward pass that computes the block again.

    Attributes:
        module: the block.
        names: of its trainable parameters.
        primals: the parameters, and then the float arrays that it is called with.
        returned: how many float arrays it returns, once it was computed.
    """

    def __init__(
        self, module: Checkpointed, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remember the call.

        Args:
            module: the block.
            call: of the block's own class.
            args, kwargs: what it is called with.
        """
        self.module, self.returned = module, 0
        self._function, self.primals = as_function(module, call, args, kwargs)
        self.names = [name for name, _ in tree_flatten(module.trainable_parameters())]
        self._shape: Any = None  # of what the block returns

    @property
    def given(self) -> list[mx.array]:
        """The float arrays that the block is called with."""
        return self.primals[len(self.names) :]

    def give(self, given: list[mx.array]) -> None:
        """Put other arrays in place of those that the block is called with, which hold or will hold the same numbers."""
        self.primals = [*self.primals[: len(self.names)], *given]

    def forward(self, primals: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        """Return the float arrays that the block returns, and what its tape keeps."""
        module = self.module
        with module.tape.recording() as kept, module.at_hand(self.given):
            made = self._function(*primals)
        self._shape, outputs = _without_arrays(made), float_arrays(made)
        self.returned = len(outputs)
        return outputs, kept

    def backward(
        self, cotangents: Sequence[mx.array], kept: Sequence[mx.array], primals: Sequence[mx.array] | None = None
    ) -> list[mx.array]:
        """Return the gradients of the primals.

        Args:
            cotangents: of what the block returned.
            kept: what its tape kept.
            primals: as arguments of a function that is differentiated; None: its own.
        """
        cotangents = list(cotangents)
        # Wait until the backward pass gets here, or all blocks would be recomputed at once.
        waiting = mx.depends(list(self.primals if primals is None else primals), cotangents)
        with self.module.tape.replaying(kept), self.module.at_hand(cotangents):
            return mx.vjp(lambda *p: float_arrays(self._function(*p)), waiting, cotangents)[1]

    def result(self, outputs: Sequence[mx.array]) -> Any:
        """Return what the block returns, with these float arrays."""
        return _with_arrays(self._shape, outputs)


def apply_checkpointing(model: nn.Module, mode: str, owners: Mapping[type, type] | None = None) -> Tape | None:
    """Checkpoint the model's blocks as `mode` says (`none`, `selective`, `block` or n) and return their tape; `owners` as below."""
    if mode == "none":
        return None
    return checkpoint_blocks(model.layers[:: checkpoint_every(mode)], mode == "selective", owners)


def checkpoint_blocks(blocks: list[nn.Module], products: bool, owners: Mapping[type, type] | None = None) -> Tape:
    """Make these block instances recompute in the backward pass.

    mlx-lm patches the block's class, which affects every model of the process and nests when repeated. Here each
    instance gets its own class, and a second call only replaces the tape.

    Args:
        blocks: of one model, with its adapters.
        products: keep the outputs of linear layers (selective).
        owners: class of layers -> mixin by which they are kept, with all that is in them; None: adapter layers.

    Returns:
        The tape, whose `attend` the model must use for attention (kernels/choose.py).
    """
    tape, owners = Tape(products), owners or {AdapterLayer: KeptAdapter}
    for block in blocks:
        layers = list(block.modules())
        own = [(layer, mixin) for layer in layers for kind, mixin in owners.items() if isinstance(layer, kind)]
        inside = {id(part) for layer, _ in own for part in layer.modules()}
        for layer, mixin in own:
            mix_in(mixin, layer, tape)
        for layer in layers:
            if id(layer) not in inside and (isinstance(layer, Kept) or is_exactly(layer, PRODUCTS)):
                mix_in(Kept, layer, tape)
        mix_in(Checkpointed, block, tape)
    return tape


def mix_in(mixin: type, module: nn.Module, tape: Tape) -> None:
    """Give one instance a class in which `mixin` comes before its own, and the tape."""
    functions.mix_in(mixin, module, mixin.__module__)
    module.tape = tape


def as_function(
    module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[mx.array]]:
    """Return `call(*args, **kwargs)` as a function of arrays alone, and those arrays.

    Only arguments are differentiated, so the trainable parameters become arguments, in addition to the float
    arrays of the call; masks and indices are not differentiated. A backward pass calls the function with what is exchanged now.
    """
    parameters = tree_flatten(module.trainable_parameters())
    names = [name for name, _ in parameters]
    own, given = [array for _, array in parameters], float_arrays((args, kwargs))
    template, call = _without_arrays((args, kwargs)), keeps_context(call)

    def function(*primals: mx.array) -> Any:
        module.update(tree_unflatten(list(zip(names, primals[: len(names)], strict=True))))
        new_args, new_kwargs = _with_arrays(template, primals[len(names) :])
        try:
            return call(*new_args, **new_kwargs)
        finally:
            module.update(tree_unflatten(list(zip(names, own, strict=True))))

    return function, [*own, *given]


def is_stateless(value: Any) -> bool:
    """Tell whether a block can only read this argument, not change it."""
    return isinstance(value, STATELESS) or (isinstance(value, tuple) and all(map(is_stateless, value)))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def float_arrays(tree: Any) -> list[mx.array]:
    """Return the float arrays of a tree, in order."""
    return [leaf for _, leaf in tree_flatten(tree) if _is_float(leaf)]


class _Float:
    """Stands for a float array in a tree, which would keep the array in memory."""


FLOAT = _Float()


def _without_arrays(tree: Any) -> Any:
    """Return the tree with FLOAT in place of each float array."""
    return tree_map(lambda leaf: FLOAT if _is_float(leaf) else leaf, tree)


def _with_arrays(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """Return the tree with the first of `arrays` in place of FLOAT."""
    rest = iter(arrays)
    return tree_map(lambda leaf: next(rest) if leaf is FLOAT else leaf, tree)


# MLPs in chunks of positions

# The names that a block's parts behind attention have in mlx-lm's families (models/head.py lists those that were read).
PARTS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")


class InChunks(nn.Module):
    """Computes some positions at a time; a mixin that comes before the class of a module of one array, (B, T, D) -> (B, T, D).

    Attributes:
        numbers_per_position: the outputs of its layers.
        forced_chunks: how many chunks there are, if that is not to follow from the batch's size.
    """

    numbers_per_position: int
    forced_chunks: int | None

    def __call__(self, x: mx.array) -> mx.array:
        chunks = self.forced_chunks or position_chunks(
            x.shape[0] * x.shape[1] * self.numbers_per_position * x.dtype.size
        )
        chunks = min(chunks, x.shape[1])
        if chunks <= 1 or drops(self):
            return super().__call__(x)
        function, primals = as_function(self, super().__call__, (x,), {})
        edges = [x.shape[1] * number // chunks for number in range(chunks + 1)]

        @mx.custom_function
        def run(*primals: mx.array) -> list[mx.array]:
            *own, x = primals
            parts: list[mx.array] = []
            for begin, end in pairwise(edges):
                # Force the order: otherwise all chunks may be in memory at once.
                [part] = mx.depends([x[:, begin:end]], parts[-1:]) if parts else [x[:, begin:end]]
                parts.append(function(*own, part))
            return [mx.concatenate(parts, axis=1)]

        @run.vjp
        def run_vjp(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
            *own, x = primals if isinstance(primals, list | tuple) else [primals]
            [d] = cotangents if isinstance(cotangents, list | tuple) else [cotangents]
            sums = [mx.zeros(array.shape, mx.float32) for array in own]
            parts: list[mx.array] = []
            for begin, end in pairwise(edges):
                # The first chunk also waits: otherwise compiling may merge it with the forward pass's chunk, and keep that.
                waited = [parts[-1], *sums] if parts else [d]
                part, d_part = mx.depends([x[:, begin:end], d[:, begin:end]], waited)
                *of_own, of_x = mx.vjp(lambda *arrays: [function(*arrays)], [*own, part], [d_part])[1]
                sums = [total + found.astype(mx.float32) for total, found in zip(sums, of_own, strict=True)]
                parts.append(of_x)
            of_own = [total.astype(array.dtype) for total, array in zip(sums, own, strict=True)]
            return [*of_own, mx.concatenate(parts, axis=1)]

        return run(*primals)[0]


def drops(module: nn.Module) -> bool:
    """Return whether an adapter of the module drops features now."""
    return any(layer.dropout.active for layer in adapter_layers(module).values())


def parts_of(block: nn.Module) -> list[Any]:
    """Return the parts of a block that may be computed in chunks; none of a block whose code was not read."""
    if not is_known_block(block):
        return []
    found = [block.get(name) for name in PARTS]
    return [part for part in found if part is not None]


def position_numbers(part: nn.Module, config: Mapping[str, Any]) -> int:
    """Return the outputs of a part's layers for one position."""
    text = {**config, **(config.get("text_config") or {})}
    active = text.get("num_experts_per_tok") or text.get("moe_topk") or 1
    layers = [layer for layer in part.modules() if isinstance(layer, (*LINEAR, *SWITCH))]
    return sum(base_dims(layer)[1] * (active if isinstance(layer, SWITCH) else 1) for layer in layers)


def chunk_positions(model: nn.Module, config: Mapping[str, Any], mode: str, most_positions: int = 0) -> list[str]:
    """Let the blocks of a checkpointed model compute their MLPs in chunks where a batch is large.

    Args:
        model: adapted.
        config: its config.json.
        mode: --grad-checkpoint; other modes than `block` keep what an MLP computes.
        most_positions: of a batch, for the words.

    Returns:
        Words for the run's header, if batches are so large.
    """
    if mode != "block":
        return []
    from_positions = []
    for block in model.layers:
        for part in parts_of(block):
            part.numbers_per_position, part.forced_chunks = position_numbers(part, config), None
            functions.mix_in(InChunks, part)
            from_positions.append(CHUNKED_FROM_BYTES // (part.numbers_per_position * number_bytes(model)))
    if not from_positions or most_positions <= min(from_positions):
        return []
    return [f"MLPs of batches of more than {min(from_positions):,} positions in chunks"]


def number_bytes(module: nn.Module) -> int:
    """Return the bytes of one of the numbers that a model or a block computes: those of its norms, which are not quantized."""
    norms = (one for one in module.modules() if type(one).__name__.endswith("Norm") and "weight" in one)
    return next((norm.weight.dtype.size for norm in norms), 4)


@contextmanager
def in_chunks(block: nn.Module, chunks: int) -> Iterator[None]:
    """Let a block compute its parts in this many chunks inside the block, whatever the batch's size is."""
    parts = parts_of(block)
    with functions.classes_put_back(parts):
        for part in parts:
            part.numbers_per_position, part.forced_chunks = 0, chunks
            functions.mix_in(InChunks, part)
        yield

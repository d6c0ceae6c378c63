"""Choose what computes the tokens that a model generates: the form of its quantized weights, and short steps of one token.

A model in training is computed as always: only frozen weights may have a float copy, which is made for a rollout and dropped
after it, so that a training step has the memory to itself. A run chooses once and keeps its choice in its checkpoints,
because products in another form round differently: a resumed run must sample the same answers. All ranks use one form.

Quantized weights multiply in one of two forms, by measurement and by memory:

    packed    as they are: `mx.quantized_matmul`, or dequantized anew for each product of many rows
    dense     a float copy beside the packed weights, made once and kept while text is generated

mlx's CPU backend computes packed products on one core, at a rate that reading dense weights from memory exceeds, and takes
8 times as long for 8 rows. A GPU reads packed weights faster. So both forms are measured once per machine on the shape
classes of the model's weights, at one row (a token), 8 (a batch of answers) and 64 (a prompt). The copies belong to the
layers (`DENSE` in kernels/quantized_matmul.py): names, parameters, packed weights and adapters around the layers stay as
they are. Experts stay packed, because a token only reads a few of them.

mlx has kernels for rotary positions and attention on a GPU only. On a CPU each is some ten or twenty small operations in
every block, which cost more than the numbers in them, so a step of one token per row uses these forms:

    positions    a rotation is linear, so x R, with R = rope(identity); R is made once per step, not twice per block
    attention    the queries that share a key head are the rows of one product, so keys and values are read once

Both agree with mlx's own to the rounding of float32. A prompt, a GPU and other dtypes use mlx's own.

Shapes: B rows, T tokens, H query heads, N key heads, S keys, d head width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.models.rope_utils import Llama3RoPE, ProportionalRoPE, SuScaledRoPE

from mlx_lora.adapters.qat import hold_fused, release_fused
from mlx_lora.compat.foreign import LENGTH
from mlx_lora.compat.functions import exchanged, original
from mlx_lora.compat.instances import become, mixed
from mlx_lora.kernels.measure import TOLERANCE, Figures, best_s, keep_figures, may_measure, read_figures
from mlx_lora.kernels.quantized_matmul import (
    DENSE,
    MeasuredQuantizedEmbedding,
    MeasuredQuantizedLinear,
    dense_matmul_from_rows,
    packed_arrays,
    shape_class,
)
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.prefix_attention import Rotation
from mlx_lora.models.quantize import dequantized_weight
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.models.load import Base
    from mlx_lora.parallel.ranks import Ranks

log = logging.getLogger(__name__)

# A run's choice

SAMPLED_BY = "sampled_by"  # the key in a checkpoint
FLOATS = "floats"  # its value for a model without quantized layers


@dataclass(frozen=True)
class SamplingForm:
    """What computes sampled tokens: the form of quantized weights, None if there are none, and short steps of one token."""

    weights: DecodeWeights | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        return {SAMPLED_BY: FLOATS if self.weights is None else self.weights.form}

    @property
    def copied_bytes(self) -> int:
        """What float copies take while answers are sampled."""
        return self.weights.copied_bytes if self.weights is not None and self.weights.form == IN_FULL else 0

    def describe(self) -> str:
        """Return a few words for the run header; empty where there is no choice."""
        return "" if self.weights is None else f"answers sampled by {self.weights.describe()}"

    @contextmanager
    def model_of(self, base: Base) -> Iterator[Any]:
        """Yield what is called as the model while answers are sampled; float copies end with the block."""
        if self.copied_bytes:
            copy_weights(base)
        try:
            yield TokenSteps(base.model)
        finally:
            if self.copied_bytes:
                release_weights(base.model)


def choose_sampling(
    base: Base,
    rows: int,
    free_bytes: int,
    ranks: Ranks,
    identity: Mapping[str, Any] | None = None,
) -> SamplingForm:
    """Return what computes the answers of a run.

    Args:
        base: adapted, not yet trained.
        rows: answers that are sampled at a time.
        free_bytes: of memory, while nothing is trained.
        ranks: the processes of the run; copies are used if all of them choose so.
        identity: of the checkpoint to go on from, whose form is kept; None: the run begins.

    Raises:
        InputError: the form to keep, or that is asked for, does not fit the memory of one rank.
    """
    known = None if identity is None else identity.get(SAMPLED_BY)
    asked = base.decode_weights
    if known in (PACKED, IN_FULL) and asked in (AUTO, known):
        weights = _as_before(base, known)
    else:
        weights = choose_weights(base, min(rows, ANSWERS), free_bytes)
        if known is not None and weights is not None:
            log.info(
                f"--decode-weights {asked}: not the form in which answers were sampled before, so not to the last bit"
            )
    if weights is not None and weights.form == IN_FULL and weights.copied_bytes > free_bytes:
        raise InputError(
            f"--resume: the run samples its answers by dense copies of {weights.copied_bytes / 1e9:.1f} GB, and "
            f"{max(0, free_bytes) / 1e9:.1f} GB are free; free some, or give --decode-weights packed"
        )
    forms = ranks.everyone(weights and weights.form)
    if weights is not None and weights.form == IN_FULL and set(forms) != {IN_FULL}:
        other = next(rank for rank, form in enumerate(forms) if form != IN_FULL)
        weights = DecodeWeights(PACKED, f"as rank {other} chose", weights.copied_bytes)
    return SamplingForm(weights)


def kept_form(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of the form; a resumed run may have another one if it is asked for."""
    return {SAMPLED_BY: identity[SAMPLED_BY]} if SAMPLED_BY in identity else {}


def _as_before(base: Base, form: str) -> DecodeWeights | None:
    copied = copied_bytes(base)
    return DecodeWeights(form, "as the run began", copied) if copied else None


# Form of quantized weights

AUTO, PACKED, IN_FULL = "auto", "packed", "dense"
NAME = "weights of generated text"
ROWS = TOKEN, ANSWERS, PROMPT = 1, 8, 64  # rows of a product
# Copies cost memory, so they must be faster by this factor; and without being asked for they may take this share of
# the memory that is free.
WORTH = 1.2
MOST_OF_FREE = 1 / 3
# Weights in a trial, in bytes as floats: more than a processor's cache holds, as in a model.
TRIAL_BYTES = 64 << 20
MOST_WEIGHTS = 64
Kind = tuple[int, int, int, int, str]
"""(out, in, bits, group size, mode) of a shape class of weights."""


@dataclass(frozen=True)
class DecodeWeights:
    """The form chosen for a model.

    Attributes:
        form: `packed` or `dense`.
        reason: why, in a few words.
        copied_bytes: that dense copies take, or would.
    """

    form: str
    reason: str
    copied_bytes: int

    def describe(self) -> str:
        """Return a few words for the screen."""
        copies = f"dense copies of {self.copied_bytes / 1e6:,.0f} MB" if self.form == IN_FULL else "packed"
        return f"{copies} ({self.reason})"


def choose_weights(base: Base, rows: int = TOKEN, free_bytes: int | None = None) -> DecodeWeights | None:
    """Return the form in which a model's weights multiply while it generates; None if it has no quantized layer.

    Args:
        base: with or without an adapter; `base.decode_weights` may force a form.
        rows: that generate at once.
        free_bytes: memory that is free; None: as the device says.

    Raises:
        InputError: dense copies are forced, and do not fit the free memory.
    """
    layers = layers_with_copies(base)
    if not layers:
        return None
    copied = copied_bytes(base)
    free = device.free_bytes() if free_bytes is None else free_bytes
    if base.decode_weights == PACKED:
        return DecodeWeights(PACKED, "--decode-weights packed", copied)
    if base.decode_weights == IN_FULL:
        if copied > free:
            raise InputError(
                f"--decode-weights dense: takes {copied / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                "leave it out, or give --decode-weights packed"
            )
        return DecodeWeights(IN_FULL, "--decode-weights dense", copied)
    if copied > MOST_OF_FREE * free:
        reason = f"dense copies would take {copied / 1e9:.1f} GB, over a third of the {free / 1e9:.1f} GB that are free"
        return DecodeWeights(PACKED, reason, copied)
    if not may_measure():
        return DecodeWeights(PACKED if device.on_gpu() else IN_FULL, "not measured", copied)
    packed_s, dense_s = (_seconds(layers, form, rows) for form in (PACKED, IN_FULL))
    return DecodeWeights(IN_FULL if WORTH * dense_s < packed_s else PACKED, "measured", copied)


@contextmanager
def held_weights(base: Base, rows: int = TOKEN) -> Iterator[DecodeWeights | None]:
    """Give the layers their chosen form for so many rows inside the block; copies that were there before stay.

    Raises:
        InputError: as for `choose_weights`.
    """
    had = any(DENSE in layer for layer in base.model.modules())
    try:
        yield hold_weights(base, rows)
    finally:
        if not had:
            release_weights(base.model)
            mx.clear_cache()


def hold_weights(base: Base, rows: int = TOKEN) -> DecodeWeights | None:
    """Give the layers of a model their chosen form, and keep it until `release_weights`; return the choice.

    Layers that have a copy keep it, and count as free memory, so that a second call chooses as the first.

    Raises:
        InputError: as for `choose_weights`.
    """
    hold_fused(base.model)
    held = sum(layer[DENSE].nbytes for layer in base.model.modules() if DENSE in layer)
    chosen = choose_weights(base, rows, device.free_bytes() + held)
    if chosen is None or chosen.form == PACKED:
        _drop_copies(base.model)
    else:
        copy_weights(base)
    return chosen


def copy_weights(base: Base) -> None:
    """Give every layer that can have one a dense copy, until `release_weights`; those that are there stay."""
    for layer in layers_with_copies(base):
        if DENSE not in layer:
            layer[DENSE] = _dense(layer)
            mx.eval(layer[DENSE])  # one at a time: dequantizing needs more than its result


def release_weights(model: nn.Module) -> None:
    """Drop what was held for generation."""
    release_fused(model)
    _drop_copies(model)


def _drop_copies(model: nn.Module) -> None:
    for layer in model.modules():
        layer.pop(DENSE, None)


def layers_with_copies(base: Base) -> list[nn.Module]:
    """Return the layers of a model that can multiply by a dense copy: linear layers, and an embedding that is the head."""
    head = find_head(base.model, base.config)
    tied = not isinstance(head, Head) or hasattr(head.layer, "as_linear")
    kinds = (MeasuredQuantizedLinear, MeasuredQuantizedEmbedding) if tied else (MeasuredQuantizedLinear,)
    return [layer for layer in base.model.modules() if isinstance(layer, kinds)]  # checkpointing mixes a class in


def copied_bytes(base: Base) -> int:
    """Return what dense copies of a model's weights take; 0 if it has no quantized layer."""
    return sum(_copied_bytes(layer) for layer in layers_with_copies(base))


def _dtype(layer: nn.Module) -> mx.Dtype:
    return layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else device.compute_dtype()


def _dense(layer: nn.Module) -> mx.array:
    return dequantized_weight(layer).astype(_dtype(layer))  # (out, in)


def _copied_bytes(layer: nn.Module) -> int:
    out, words = layer.weight.shape
    return out * (words * 32 // layer.bits) * _dtype(layer).size


# Measurement of both forms


def _seconds(layers: list[nn.Module], form: str, rows: int) -> float:
    """Return the time of a prompt of 64 tokens and of 64 tokens after it, in all layers, for each row."""
    total, known = 0.0, {}
    class_of_rows = TOKEN if rows == TOKEN else ANSWERS
    for layer in layers:
        out, width = layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.bits
        kind: Kind = (*shape_class((out, width)), layer.bits, layer.group_size, layer.mode)
        for count, times in ((class_of_rows, PROMPT / min(rows, class_of_rows)), (PROMPT, 1)):
            key = kind, _dtype(layer), count
            if key not in known:
                known[key] = product_figures(kind, count, _dtype(layer))[form].seconds
            total += times * known[key] * out * width / (kind[0] * kind[1])
    return total


def choose_form(figures: dict[str, Figures]) -> str:
    """Return the form that the figures of one measurement speak for."""
    return IN_FULL if WORTH * figures[IN_FULL].seconds < figures[PACKED].seconds else PACKED


def product_figures(kind: Kind, rows: int, dtype: mx.Dtype) -> dict[str, Figures]:
    """Return the figures of both forms for a kind of weight and a number of rows, measured once per machine.

    Args:
        kind: of the weight.
        rows: one of ROWS.
        dtype: of the activations.
    """
    before = f"{device.measured_on()}|{str(dtype).rpartition('.')[2]}|{NAME}"
    keys = {count: f"{before}|{count},{','.join(map(str, kind))}" for count in ROWS}
    figures = read_figures(keys[rows])
    if figures is None or figures.keys() != {PACKED, IN_FULL}:
        log.debug(f"Measuring {NAME} for {kind_words((rows, *kind))}, once on this machine")
        high, low = mx.random.state[0].tolist()  # a trial's layers draw numbers, a run must not miss them
        measured = _measure(kind, dtype)
        mx.random.seed(high << 32 | low)
        for count, one in measured.items():
            keep_figures(keys[count], one)
        figures = measured[rows]
    return figures


def kind_words(shape: tuple[Any, ...]) -> str:
    """Return words for the rows and kind of a measurement."""
    rows, out, width, bits, group_size, mode = shape
    return f"{rows} row{'s' if rows > 1 else ''}, {out:,} by {width:,}, {bits}-bit/{group_size} {mode}"


def _measure(kind: Kind, dtype: mx.Dtype) -> dict[int, dict[str, Figures]]:
    """Time both forms, for each number of rows, over so many weights that each is read from memory, as in a model."""
    out, width = kind[:2]
    count = min(MOST_WEIGHTS, max(1, math.ceil(TRIAL_BYTES / (out * width * dtype.size))))
    layers = _trial_layers(kind, dtype, count)
    weight = dequantized_weight(layers[0]).astype(mx.float32)
    packed_bytes = sum(array.nbytes for array in packed_arrays(layers[0]))
    measured: dict[int, dict[str, Figures]] = {rows: {} for rows in ROWS}
    for form in (PACKED, IN_FULL):
        if form == IN_FULL:
            for layer in layers:
                layer[DENSE] = _dense(layer)
            mx.eval([layer[DENSE] for layer in layers])
        held = layers[0][DENSE].nbytes if form == IN_FULL else 0
        for rows, figures in measured.items():
            x = mx.random.normal((rows, width), key=mx.random.key(0)).astype(dtype)
            exact = x.astype(mx.float32) @ weight.T
            error = (mx.linalg.norm(layers[0](x) - exact) / mx.linalg.norm(exact)).item()
            # Many rows take long, and hardly depend on where the weight comes from.
            some = layers if rows < PROMPT else layers[: max(1, count // 8)]
            seconds = best_s([lambda x=x, some=some: [layer(x) for layer in some]], rounds=3)[0] / len(some)
            figures[form] = Figures(seconds, held, held, packed_bytes, error, TOLERANCE[dtype])
    return measured


def _trial_layers(kind: Kind, dtype: mx.Dtype, count: int) -> list[nn.Module]:
    """Return so many layers with the same numbers, each with arrays of its own."""
    out, width, bits, group_size, mode = kind
    plain = nn.Linear(width, out, bias=False)
    plain.weight = mx.random.normal((out, width), key=mx.random.key(0)).astype(dtype)
    layers: list[nn.Module] = [nn.QuantizedLinear.from_linear(plain, group_size, bits, mode) for _ in range(count)]
    first: dict[str, Any] = layers[0].parameters()
    from_rows = dense_matmul_from_rows((out, width), bits, group_size, mode, layers[0].scales.dtype)
    for layer in layers:
        layer.update({name: array + mx.zeros_like(array) for name, array in first.items()})
        layer.dense_from_rows = from_rows
        become(layer, MeasuredQuantizedLinear)
    mx.eval([layer.parameters() for layer in layers])
    return layers


# Steps of one token

ATTENTION = "scaled_dot_product_attention"  # the name under which mlx-lm's architectures import it


class TokenSteps:
    """A model that computes steps of one token per row in fewer operations; mlx-lm's generators take it as a model."""

    def __init__(self, model: nn.Module):
        """Prepare a model; its layers of positions get other classes, which compute the same outside such steps.

        Args:
            model: an mlx-lm model, with or without adapters.
        """
        self.model = model
        modules = list(model.modules())
        names = {type(module).__module__ for module in modules}
        homes = [sys.modules[name] for name in names]
        self._places = [(home, ATTENTION) for home in homes if original(home, ATTENTION) is original(base, ATTENTION)]
        for module in modules:
            _let_turn(module)
        self._shortens = not device.on_gpu()

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its layers."""
        return getattr(self.model, name)

    def __call__(self, tokens: mx.array, cache: Any = None, **given: Any) -> mx.array:
        """Return the model's logits (B, T, V) for tokens (B, T)."""
        if not self._shortens or tokens.shape[1] != 1 or cache is None:
            return self.model(tokens, cache=cache, **given)
        with self._step(cache):
            return self.model(tokens, cache=cache, **given)

    @contextmanager
    def _step(self, caches: list[Any]) -> Iterator[None]:
        token = STEP.set(Turns(caches))
        try:
            with exchanged(dict.fromkeys(self._places, attention_of_tokens)):
                yield
        finally:
            STEP.reset(token)


def _let_turn(module: Any) -> None:
    """Give a layer of positions its other class."""
    kind = type(module)
    # Without the mixin that lets it take a position for each token (models/prefix_attention.py).
    own = kind.__bases__[1] if issubclass(kind, Rotation) else kind
    if own in TURNING:
        become(module, TURNING[own] if own is kind else mixed(Rotation, TURNING[own]))
    if own in (*TURNING, *TURNING.values()):
        module.kind = _rotation_key(module)


def _rotation_key(layer: nn.Module) -> tuple[Any, ...]:
    """Return what makes two layers of positions the same function."""
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, int | float | str | None)}
    arrays = {name: np.array(value).tobytes() for name, value in layer.items() if isinstance(value, mx.array)}
    return type(layer).__name__, *sorted(settings.items(), key=str), *sorted(arrays.items())


class Turns:
    """The rotations of one step of one token, shared by all layers of positions of a model.

    Attributes:
        offset: the positions of a batch's rows, (B,), the same object in all caches; None for a single row.
    """

    def __init__(self, caches: list[Any]) -> None:
        """Begin a step; the caches of a batch are all at the same positions, so they get one array for these."""
        self.offset: mx.array | None = None
        self._known: dict[Any, mx.array] = {}
        rows = [cache for cache in caches if isinstance(cache, BatchKVCache)]
        if rows and all(LENGTH.of(cache) == LENGTH.of(rows[0]) for cache in rows):
            self.offset = rows[0].offset
            for cache in rows[1:]:
                cache.offset = self.offset

    def rotation(self, layer: nn.Module, plain: Any, offset: int | mx.array, width: int) -> mx.array | None:
        """Return R (d, d), for a batch (B, d, d); None if the offset is not the one that all layers share."""
        if isinstance(offset, mx.array) and offset is not self.offset:
            return None
        batch = offset.size if isinstance(offset, mx.array) else 1
        key = layer.kind, width, offset if isinstance(offset, int) else None
        if key not in self._known:
            unit = mx.broadcast_to(mx.eye(width)[:, None], (batch, width, 1, width))  # one head for each direction
            self._known[key] = plain(layer, unit, offset=offset).squeeze(2 if batch > 1 else (0, 2))
        return self._known[key]


STEP: ContextVar[Turns | None] = ContextVar("the step of one token that is computed now", default=None)


def _turning(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose calls for one token per row use the step's rotation."""
    plain: Any = kind.__call__

    def turned(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        step = STEP.get() if x.ndim == 4 and x.shape[2] == 1 and x.dtype == mx.float32 else None
        rotation = None if step is None else step.rotation(self, plain, offset, x.shape[3])
        if rotation is None:
            return plain(self, x, offset=offset)
        return x @ rotation if rotation.ndim == 2 else (x.squeeze(2) @ rotation)[:, :, None]

    return type(kind.__name__, (kind,), {"__call__": turned})


TURNING: dict[type[nn.Module], type[nn.Module]] = {
    kind: _turning(kind) for kind in (nn.RoPE, Llama3RoPE, ProportionalRoPE, SuScaledRoPE)
}


def attention_of_tokens(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return attention for one query per row, with mlx-lm's signature; calls of other kinds go to mlx-lm's function.

    Args:
        queries: (B, H, 1, d).
        keys, values: (B, N, S, d).
        cache: with `bits` if keys and values are quantized.
        scale: factor on the scores.
        mask: (B, 1, 1, S), true for keys that are seen; None: all are.
        sinks: logits without a value.

    Returns:
        (B, H, 1, d).
    """
    rows, heads, count, width = queries.shape
    plain = mask is None or (isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.shape[1:-1] == (1, 1))
    if count != 1 or not plain or sinks is not None or queries.dtype != mx.float32:
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    if hasattr(cache, "bits"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask)
    few = keys.shape[1]
    grouped = (scale * queries).reshape(rows, few, heads // few, width)
    scores = grouped @ keys.swapaxes(-1, -2)  # (B, N, H / N, S)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return (mx.softmax(scores, axis=-1) @ values).reshape(rows, heads, 1, values.shape[-1])

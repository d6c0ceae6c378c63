"""Generate tokens: the form of quantized weights, steps of one token, batches of rows, cached keys and values, and sampling.

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

Decode several rows together: check whether a model can, and join and separate the keys and values of rows.

mlx-lm's batches pad rows on the left, and some of its architectures do not expect that: they read one position for all rows,
or apply the mask to the wrong axis, which raises or, worse, changes the text. So a model is tried once, with rows of unlike
length, together and alone.

Shapes: B rows, T columns, S positions in the caches, V vocabulary.

Keys and values that are kept from one turn of an episode to the next, so that a turn computes only its new tokens.

When an answer ends, its row is taken out of the batch's caches. At the next turn the rows are joined again, and the tokens
since then, the answer's last one and the observation, are computed, for all rows together unless a layer is recurrent. Caches of a sliding window
are not kept: rows of unequal length share one window there, so each turn computes such models' episodes from the start.

Sample texts after many prompts at once, with the model as it is: G answers to each, or one text after each.

A prompt is computed once, and its keys and values are copied for each of its answers; the beginning that all prompts have
in common, such as a system text, is computed once for all of them. Each text draws from a random stream of its own, so it
does not depend on which others are sampled beside it, apart from rounding.

Shapes: N prompts, G answers to each, A = N G answers, V vocabulary.

Generate with a batch of rows, each with its own adapter and random stream, which join and leave
between steps.

    Prefill (computes a prompt in parts) -> RunningBatch (one token per row and step) -> PromptCache

mlx-lm's caches hold the rows. Its BatchGenerator does not tell the model which rows a call is for,
but routed layers have to know, so the loop is our own. As in mlx-lm, step n + 1 is computed while the
host reads step n. A row's tokens depend on its prompt, adapter, settings and seed, and not on the
other rows.

The keys and values of earlier prompts are cached per adapter, within one byte budget: an adapter
changes every key and value from its first layer on, so adapters cannot share them.

Shapes: B rows, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import copy
import logging
import math
import secrets
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import base, gemma2
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.models.rope_utils import Llama3RoPE, ProportionalRoPE, SuScaledRoPE
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from mlx_lora.adapters.qat import hold_fused, release_fused
from mlx_lora.compat.foreign import LENGTH
from mlx_lora.compat.functions import become, exchanged, mixed, original
from mlx_lora.kernels.measure import TOLERANCE, Figures, best_s, keep_figures, may_measure, modules_of, read_figures
from mlx_lora.kernels.quantized_matmul import (
    DENSE,
    MeasuredQuantizedEmbedding,
    MeasuredQuantizedLinear,
    dense_matmul_from_rows,
    packed_arrays,
    shape_class,
)
from mlx_lora.models.drafts import Drafting, until_wrong
from mlx_lora.models.grammar import fill_masks, masked
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.prefix_attention import Rotation
from mlx_lora.models.quantize import dequantized_weight
from mlx_lora.models.tokenizer import Continuation, add_token
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, describe_gpu_failure, first_line

if TYPE_CHECKING:
    from mlx_lora.models.image_inputs import ModelWithImages
    from mlx_lora.models.load import Base

log = logging.getLogger(__name__)

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
        with cast_factors(base.model):
            yield hold_weights(base, rows)
    finally:
        if not had:
            release_weights(base.model)
            mx.clear_cache()


@contextmanager
def cast_factors(model: nn.Module) -> Iterator[None]:
    """Let plain LoRA layers have A and scale * B in their base's dtype inside the block, so that not each token casts them."""
    layers: list[Any] = [module for module in modules_of(model) if getattr(module, "cast_to", None) is not None]
    before = [(layer.lora_a, layer.lora_b, layer.scale) for layer in layers]
    for layer in layers:
        dtype = layer.cast_to
        layer.lora_a, layer.lora_b = layer.lora_a.astype(dtype), layer.times_scale(layer.lora_b).astype(dtype)
        layer.scale = 1.0
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.lora_a, layer.lora_b, layer.scale = own


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
    total = 0
    for layer in layers_with_copies(base):
        out, words = layer.weight.shape
        total += out * (words * 32 // layer.bits) * _dtype(layer).size
    return total


def _dtype(layer: nn.Module) -> mx.Dtype:
    return layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else device.compute_dtype()


def _dense(layer: nn.Module) -> mx.array:
    return dequantized_weight(layer).astype(_dtype(layer))  # (out, in)


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
    out, width, bits, group_size, mode = kind
    count = min(MOST_WEIGHTS, max(1, math.ceil(TRIAL_BYTES / (out * width * dtype.size))))
    plain = nn.Linear(width, out, bias=False)
    plain.weight = mx.random.normal((out, width), key=mx.random.key(0)).astype(dtype)
    layers: list[nn.Module] = [nn.QuantizedLinear.from_linear(plain, group_size, bits, mode) for _ in range(count)]
    first: dict[str, Any] = layers[0].parameters()
    from_rows = dense_matmul_from_rows((out, width), bits, group_size, mode, layers[0].scales.dtype)
    for layer in layers:  # the same numbers, in arrays of its own
        layer.update({name: array + mx.zeros_like(array) for name, array in first.items()})
        layer.dense_from_rows = from_rows
        become(layer, MeasuredQuantizedLinear)
    mx.eval([layer.parameters() for layer in layers])
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
        for (
            module
        ) in modules:  # layers of positions get another class, and a name for what makes two of them one function
            kind = type(module)
            # Without the mixin that lets it take a position for each token (models/prefix_attention.py).
            own = kind.__bases__[1] if issubclass(kind, Rotation) else kind
            if own in TURNING:
                become(module, TURNING[own] if own is kind else mixed(Rotation, TURNING[own]))
            if own in (*TURNING, *TURNING.values()):
                plain = {
                    name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)
                }
                arrays = {
                    name: np.array(value).tobytes() for name, value in module.items() if isinstance(value, mx.array)
                }
                settings = (*sorted(plain.items(), key=str), *sorted(arrays.items()))
                module.kind = type(module).__name__, *settings
        self._shortens = not device.on_gpu()

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its layers."""
        return getattr(self.model, name)

    def __call__(self, tokens: mx.array, cache: Any = None, **given: Any) -> mx.array:
        """Return the model's logits (B, T, V) for tokens (B, T)."""
        if not self._shortens or tokens.shape[1] != 1 or cache is None:
            return self.model(tokens, cache=cache, **given)
        token = STEP.set(Turns(cache))
        try:
            with exchanged(dict.fromkeys(self._places, attention_of_tokens)):
                return self.model(tokens, cache=cache, **given)
        finally:
            STEP.reset(token)


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
    if count != 1 or not plain or sinks is not None or queries.dtype != mx.float32 or hasattr(cache, "bits"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    few = keys.shape[1]
    grouped = (scale * queries).reshape(rows, few, heads // few, width)
    scores = grouped @ keys.swapaxes(-1, -2)  # (B, N, H / N, S)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return (mx.softmax(scores, axis=-1) @ values).reshape(rows, heads, 1, values.shape[-1])


# Decode several rows together


# Tokens of the rows that are tried, few because this may run on a CPU. Three rows: few models have three heads of keys, with
# which an axis that is mistaken for the rows would raise no error.
TRIED_LENGTHS = (6, 3, 2)
TRIED_TOKENS = 50  # ids below this, which every vocabulary has
# The largest difference of the next token's distribution (total variation, 0 to 1) that rounding explains, in float32 and
# in 16 bits. A wrong mask or position changes much of it.
ROUNDING, ROUNDING_16 = 1e-3, 0.25
GROUPED, TRIED = "has_grouped_scores", "one_row_because"  # attributes of a model: what is known of it

Rows = Sequence[Sequence[Any]]


class GroupedRows(BatchKVCache):
    """Keys and values of rows, for scores of shape (B, heads of keys, heads that share them, T, S), as in Gemma 2."""

    def make_mask(self, N: int, return_array: bool = False, **window: Any) -> Any:  # mlx-lm's name
        """Return the mask, (B, 1, 1, T, S)."""
        mask = super().make_mask(N, return_array, **window)
        return mask[:, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask


def merge_rows(model: Any, rows: Rows) -> list[Any]:
    """Return the caches of a batch, one for each layer.

    Args:
        model: the rows' model, with or without `TokenSteps`.
        rows: the caches of each row, one for each layer.
    """
    merged = [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]
    plain = _plain(model)
    if not hasattr(plain, GROUPED):
        setattr(plain, GROUPED, any(type(one) is gemma2.Attention and one.repeats > 1 for one in plain.modules()))
    if getattr(plain, GROUPED):
        for cache in merged:
            if type(cache) is BatchKVCache:
                become(cache, GroupedRows)
    return merged


def extract_row(cache: Any, place: int) -> Any:
    """Return a row's own cache of a layer; an empty one if the layer keeps nothing, as in blocks without attention."""
    if isinstance(cache, CacheList):
        return CacheList(*(extract_row(part, place) for part in cache.caches))
    if not cache.empty():
        return cache.extract(place)
    if isinstance(cache, ArraysCache):
        return ArraysCache(len(cache.cache))
    return RotatingKVCache(cache.max_size) if isinstance(cache, BatchRotatingKVCache) else KVCache()


def check_rows(model: Any, model_id: str, instead: str = "choose another model, or --objective dpo or sft") -> None:
    """Refuse a model whose keys and values cannot be held for rows of a batch.

    Args:
        model: the model.
        model_id: how the user names it.
        instead: what to do instead.

    Raises:
        InputError: its caches cannot be merged.
    """
    kind = rowless(model)
    if kind:
        raise InputError(
            f"--model {model_id}: mlx-lm keeps its keys and values in a {kind}, which cannot hold a batch; {instead}"
        )


def rowless(model: Any) -> str:
    """Return the class of a cache that cannot be merged, empty if there is none."""
    return next((type(cache).__name__ for cache in make_prompt_cache(_plain(model)) if not hasattr(cache, "merge")), "")


def one_row_because(model: Any) -> str:
    """Return why rows of a model must be decoded one at a time, empty if they need not.

    The model is tried at the first call, which logs the reason; its caches can be merged.

    Args:
        model: the model, with or without an adapter.

    Raises:
        InputError: it cannot decode a single row either.
    """
    plain = _plain(model)
    if not hasattr(plain, TRIED):
        training = plain.training
        plain.eval()
        try:
            why = _try_rows(plain)
        finally:
            plain.train(training)
        setattr(plain, TRIED, why)
        if why:
            log.warning(
                "--model: mlx-lm's code for it cannot decode several rows together (%s); they are decoded one at a time",
                why,
            )
    return getattr(plain, TRIED)


def _try_rows(model: nn.Module) -> str:
    prompts = [
        [(7 * place * place + 3 * place + number) % TRIED_TOKENS for place in range(length)]
        for number, length in enumerate(TRIED_LENGTHS, 1)
    ]
    try:
        rows = [make_prompt_cache(model) for _ in prompts]
        for prompt, caches in zip(prompts, rows, strict=True):  # which then hold it without its last token
            model(mx.array([prompt[:-1]]), cache=caches)
        last = [prompt[-1] for prompt in prompts]
        alone = mx.concatenate(
            [_distributions(model, [token], [copy.deepcopy(row)]) for token, row in zip(last, rows, strict=True)]
        )
    except Exception as error:
        if describe_gpu_failure(error):
            raise
        raise InputError(
            f"--model: mlx-lm's code fails to generate from it ({_error_words(error)}); choose another"
        ) from error
    try:
        together = _distributions(model, last, rows)
    except Exception as error:
        if describe_gpu_failure(error):
            raise
        return _error_words(error)
    worst = 0.5 * mx.abs(together - alone).sum(axis=-1).max().item()
    narrow = any(array.dtype in (mx.float16, mx.bfloat16) for _, array in tree_flatten(model.parameters()))
    return "" if worst <= (ROUNDING_16 if narrow else ROUNDING) else "rows of unlike length change each other"


def _distributions(model: nn.Module, last: Sequence[int], rows: Rows) -> mx.array:
    """Return the distribution of the token after the last of each row, (B, V) float32."""
    logits = model(mx.array(list(last))[:, None], cache=merge_rows(model, rows))[:, -1]
    found = mx.softmax(logits.astype(mx.float32), axis=-1)
    mx.eval(found)
    return found


def _error_words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _plain(model: Any) -> Any:
    return model.model if isinstance(model, TokenSteps) else model


# Keys and values that are kept from one turn of an episode to the next, so that a turn computes only its new tokens

Held = tuple[int, list[Any]]
"""The number of tokens whose keys and values are held, and one cache for each layer."""


@dataclass
class KeptCaches:
    """What is kept around one turn.

    Attributes:
        begun: of each row, from the turn before; empty: nothing was kept.
        ended: of each row that ended, by its number.
    """

    begun: Sequence[Held] = ()
    ended: dict[int, Held] = field(default_factory=dict)

    def joined(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Any] | None:
        """Return caches of all rows that hold each prompt without its last token; None if they were not kept.

        What was kept is let go, so that it is not in memory beside its copy.

        Args:
            model: in eval mode.
            prompts: all tokens of each row so far.
        """
        if not self.begun:
            return None
        new = [list(prompt[held:-1]) for prompt, (held, _) in zip(prompts, self.begun, strict=True)]
        rows = [caches for _, caches in self.begun]
        self.begun = ()
        padded = all(isinstance(cache, KVCache) for caches in rows for cache in caches)
        if not padded:  # a recurrent layer's state would take in the padding
            for tokens, caches in zip(new, rows, strict=True):
                _compute_rows(model, [tokens], caches)
        joined = merge_rows(model, rows)
        mx.eval([cache.state for cache in joined])
        del rows
        if padded:
            lengths, width = list(map(len, new)), max(map(len, new))
            for cache in joined:
                cache.prepare(lengths=lengths, right_padding=[width - length for length in lengths])
            _compute_rows(model, [tokens + [0] * (width - len(tokens)) for tokens in new], joined)
            for cache in joined:
                cache.finalize()
        return joined

    def keep(self, row: int, place: int, tokens: int, caches: Sequence[Any]) -> None:
        """Keep a row that ended.

        Args:
            row: its number.
            place: where it is in the caches.
            tokens: that they hold of it.
            caches: of the batch, one for each layer.
        """
        if all(map(_can_be_kept, caches)):
            taken = [extract_row(cache, place) for cache in caches]
            mx.eval([cache.state for cache in taken])
            self.ended[row] = tokens, taken


def _compute_rows(model: nn.Module, rows: list[list[int]], caches: Sequence[Any]) -> None:
    """Put the keys and values of rows of equal length into caches."""
    if rows[0]:
        model(mx.array(rows), cache=list(caches))
        mx.eval([cache.state for cache in caches])


def _can_be_kept(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(map(_can_be_kept, cache.caches))
    return isinstance(cache, BatchKVCache | ArraysCache)


# Sample texts after many prompts at once, with the model as it is

PREFILL_TOKENS = 512  # of a prompt that are computed at once
LEAST_SHARED = 16  # tokens that prompts have in common, from which on these are computed once
# Rows that have ended stay in the batch until they are this share of it: taking rows out copies all keys and values.
ENDED_SHARE = 0.25
STEPS_PER_CLEARING = 256  # steps after which unused buffers are freed
MOST_ROWS = 32  # texts that `write_texts` samples at once
# Tokens of all these texts, prompts included. Not a share of the free memory: rounding, and so now and then a text,
# depends on which texts are batched, and should be the same on another day.
MOST_TOKENS = 16_384


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled.

    Attributes:
        group: G.
        max_new_tokens: of an answer, with its end token.
        temperature: 0: the likeliest token each time.
        top_p: sample from the nucleus with this mass at the temperature; 1 is off.
        min_p: leave out tokens less likely at the temperature than this share of the likeliest; 0 is off.
    """

    group: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0


def sample_groups(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    ends: frozenset[int],
    keys: mx.array,
    limits: Sequence[int] | None = None,
    kept: KeptCaches | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample G answers to each prompt.

    Args:
        model: in eval mode, with or without an adapter.
        prompts: token ids, at least one each.
        options: how.
        ends: tokens that end an answer.
        keys: (A, 2) uint32, the key of each answer's random stream.
        limits: (A,) the most tokens of each answer; None: as the options say.
        kept: has what earlier turns of the same rows left, and gets what this one leaves; the group is then 1 after the first.

    Returns:
        The tokens of each answer, (A,) lists, with its end token if it ended; and the log-probability of each token at the
        temperature, before top_p and min_p.
    """
    last = [prompt[-1] for prompt in prompts for _ in range(options.group)]
    held = [len(prompt) - 1 for prompt in prompts for _ in range(options.group)]  # tokens of each row in the caches
    limits = [options.max_new_tokens] * len(last) if limits is None else limits
    one_by_one = len(last) > 1 and bool(one_row_because(model))
    if one_by_one and kept is not None and kept.begun:  # it would compute the turn's tokens for all rows together
        kept = None
    caches = kept.joined(model, prompts) if kept else None
    if not caches:  # each prompt without its last token; what all of several begin with is computed once
        shortest = min(map(len, prompts)) - 1
        count = next((n for n in range(shortest) if len({prompt[n] for prompt in prompts}) > 1), shortest)
        common = list(prompts[0][:count]) if len(prompts) > 1 and count >= LEAST_SHARED else []
        begun, of_prompts = make_prompt_cache(model), []
        _compute(model, common, begun)
        for prompt in prompts:
            own = copy.deepcopy(begun) if common else make_prompt_cache(model)  # copies no array
            _compute(model, prompt[len(common) : -1], own)
            of_prompts.append(own)
        caches = merge_rows(model, [one for one in of_prompts for _ in range(options.group)])
    batches = [list(range(len(last)))]
    if one_by_one:
        batches, kept = [[row] for row in batches[0]], None
    answers, logps = ([[] for _ in last] for _ in range(2))
    for rows in batches:
        own = merge_rows(model, [[extract_row(cache, rows[0]) for cache in caches]]) if one_by_one else caches
        tokens, streams = mx.array([last[row] for row in rows], mx.uint32), keys[mx.array(rows)]
        ended = [False] * len(rows)
        for step in range(max(limits[row] for row in rows)):
            logits = model(tokens[:, None], cache=own)[:, -1].astype(mx.float32)  # (rows, V)
            tokens, drawn_logps, streams = _drawn(logits, streams, options)
            mx.eval(tokens, streams, drawn_logps)
            for place, (token, logp) in enumerate(zip(tokens.tolist(), drawn_logps.tolist(), strict=True)):
                row = rows[place]
                if not ended[place]:
                    answers[row].append(token)
                    logps[row].append(logp)
                    ended[place] = token in ends or len(answers[row]) == limits[row]
                    if kept is not None and token in ends:
                        kept.keep(row, place, held[row] + len(answers[row]), own)
            if all(ended):
                break
            if sum(ended) >= ENDED_SHARE * len(ended):
                keep = [place for place, done in enumerate(ended) if not done]
                chosen = mx.array(keep)
                for cache in own:
                    cache.filter(chosen)
                tokens, streams = tokens[chosen], streams[chosen]
                rows, ended = [rows[place] for place in keep], [False] * len(keep)
            if step % STEPS_PER_CLEARING == STEPS_PER_CLEARING - 1:
                mx.clear_cache()
    return answers, logps


def _drawn(logits: mx.array, keys: mx.array, options: SamplingOptions) -> tuple[mx.array, mx.array, mx.array]:
    """Return each row's next token, its log-probability at the temperature, and the keys that follow.

    Args:
        logits: (rows, V) float32.
        keys: (rows, 2) uint32.
        options: how.
    """
    tempered = nn.log_softmax(logits if options.temperature in (0, 1) else logits / options.temperature, axis=-1)
    left = tempered  # of the tempered distribution, as transformers, and so TRL, filter it; mlx-lm filters before
    if options.top_p < 1:
        left = apply_top_p(left, options.top_p)
    if options.min_p > 0:
        left = apply_min_p(left, options.min_p)
    pairs = mx.vmap(mx.random.split)(keys)  # (rows, 2, 2)
    tokens = (
        mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(left, (pairs[:, 1]))
        if options.temperature
        else mx.argmax(logits, axis=-1).astype(mx.uint32)
    )
    return tokens, mx.take_along_axis(tempered, tokens[:, None], axis=-1)[:, 0], pairs[:, 0]


def write_texts(
    base: Base,
    prompts: Sequence[Sequence[int]],
    numbers: Collection[int],
    options: SamplingOptions,
    ends: frozenset[int],
    keys: mx.array,
    take: Callable[[list[int], list[list[int]]], None],
) -> None:
    """Sample one text after each prompt.

    Args:
        base: without an adapter, or with one.
        prompts: token ids, at least one each.
        numbers: of the prompts to write after.
        options: how; the group is 1.
        ends: tokens that end a text.
        keys: (prompts, 2) uint32, the key of each text's random stream.
        take: called after each batch with its numbers and the tokens of its texts.

    Raises:
        InputError: the model cannot hold several texts at once.
    """
    check_rows(base.model, base.model_id)
    order = sorted(numbers, key=lambda number: (len(prompts[number]), number))
    if not order:
        return
    rows = max(1, min(MOST_ROWS, MOST_TOKENS // (len(prompts[order[-1]]) + options.max_new_tokens)))
    training = base.model.training
    base.model.eval()
    try:
        with held_weights(base, rows):
            model = TokenSteps(base.model)
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                texts, _ = sample_groups(model, [prompts[n] for n in batch], options, ends, keys[mx.array(batch)])  # pyright: ignore[reportArgumentType] # it is called as a model
                take(batch, texts)
    finally:
        base.model.train(training)


def answer_keys(seed: int, rollout: int, count: int, turn: int = 0) -> mx.array:
    """Return the keys of a rollout's answers at a turn, (count, 2) uint32; they differ in every rollout of a run."""
    state = np.random.SeedSequence([seed, rollout], spawn_key=(turn,) if turn else ()).generate_state(1, np.uint64)[0]
    return mx.random.split(mx.random.key(int(state)), count)


def _compute(model: nn.Module, tokens: Sequence[int], caches: list[Any]) -> None:
    """Put the keys and values of tokens into caches."""
    for start in range(0, len(tokens), PREFILL_TOKENS):
        _compute_rows(model, [list(tokens[start : start + PREFILL_TOKENS])], caches)


# Rows with adapters and random streams of their own, which join and leave between steps

# The adapter of each row, None for the base alone.
Adapters = tuple[int | None, ...]
# A layer's plans and index arrays are kept for this many combinations of rows, which is more than are in use.
REMEMBERED = 64


class Routing:
    """Tells all layers of a model which adapter each row of the next call uses.

    Attributes:
        rows: an adapter's number, or None, for each row; empty: only the base.
    """

    def __init__(self) -> None:
        self.rows: Adapters = ()
        self._indices: dict[tuple[int, ...], mx.array] = {}

    def indices(self, values: tuple[int, ...]) -> mx.array:
        """Return an index array, uint32; it is cached, because most layers need the same few."""
        if values not in self._indices:
            if len(self._indices) >= REMEMBERED:
                self._indices.clear()
            self._indices[values] = mx.array(values, mx.uint32)
        return self._indices[values]


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the nucleus with this mass, before the temperature as in `generate`; 1 is off, and 0 takes the
            likeliest token.
        top_k: draw from the k likeliest tokens; 0 is off.
        seed: of the request's own random stream; None: a random seed.
        top_logprobs: report the log-probability of the token and of this many likeliest ones; None: report none. They are the
            model's own, before the following.
        frequency_penalty: taken from a token's logit for each time that the answer has it.
        presence_penalty: taken from its logit if the answer has it.
        logit_bias: tokens, and what is added to their logits.
        grammar: that the answer fits (models/grammar.py); None: any text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None


class Sampler:
    """One request's random stream."""

    def __init__(self, settings: Sampling, vocabulary: int, matcher: Any = None):
        """Start the stream.

        Args:
            settings: the request's settings.
            vocabulary: width of the logits; a larger top_k means all tokens.
            matcher: of the settings' grammar, at its start.
        """
        self.settings, self.matcher = settings, matcher
        self.key: Any = None  # of what is drawn next; None: nothing is drawn
        self.bias: np.ndarray | None = None  # (V,) float32, added to the logits
        self._seen: set[int] = set()
        if settings.logit_bias or settings.frequency_penalty or settings.presence_penalty:
            self.bias = np.zeros(vocabulary, np.float32)
            for token, value in settings.logit_bias:
                self.bias[token] = value
        # Whether a token depends on those before it by more than the logits, so that the host has to know them.
        self.follows = matcher is not None or self.bias is not None
        self.top_k = settings.top_k if settings.top_k < vocabulary else 0
        self._greedy = settings.temperature == 0 or settings.top_p == 0
        if not self._greedy:
            self.key = mx.random.key(secrets.randbits(63) if settings.seed is None else settings.seed)

    @property
    def failure(self) -> str:
        """Why the grammar cannot say what may follow, such as a limit of its size; empty: it can."""
        return self.matcher.get_error() if self.matcher is not None and self.matcher.is_error() else ""

    def take(self, token: int) -> None:
        """Take a token of the answer."""
        if self.matcher is not None and not self.matcher.is_stopped():  # then the token is the end token
            self.matcher.consume_token(token)
        if self.bias is not None:
            own = self.settings
            self.bias[token] -= own.frequency_penalty + (token not in self._seen) * own.presence_penalty
            self._seen.add(token)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Return a token (1,) for log-probabilities (1, V) float32; every call advances the stream."""
        if self._greedy:
            return mx.argmax(logprobs, axis=-1)
        if self.settings.top_p < 1:
            logprobs = apply_top_p(logprobs, self.settings.top_p)
        if self.top_k:
            logprobs = apply_top_k(logprobs, self.top_k)
        self.key, key = mx.random.split(self.key)
        return mx.random.categorical(logprobs / self.settings.temperature, key=key)


@dataclass(frozen=True)
class Likelihoods:
    """The log-probabilities that a row reports, as arrays that are computed together with its token.

    Attributes:
        token: () float32, the drawn token's log-probability.
        ids, values: (k,) arrays or None, the likeliest tokens, unordered, and their log-probabilities.
    """

    token: mx.array
    ids: Any
    values: Any

    def top(self) -> list[tuple[int, float]]:
        """Return (id, log-probability) of the likeliest tokens, best first."""
        if self.ids is None:
            return []
        return sorted(zip(self.ids.tolist(), self.values.tolist(), strict=True), key=lambda pair: -pair[1])


def sample_rows(logits: mx.array, samplers: list[Sampler]) -> tuple[mx.array, list[Likelihoods | None]]:
    """Draw every row's next token.

    Args:
        logits: (B, V) of any float dtype.
        samplers: one per row.

    Returns:
        Tokens (B,), and the likelihoods of the rows that report them.
    """
    reporting = [sampler.settings.top_logprobs is not None for sampler in samplers]
    greedy = all(sampler.settings.temperature == 0 for sampler in samplers)
    drawn = logits
    if any(sampler.bias is not None for sampler in samplers):
        zeros = mx.zeros(logits.shape[1])
        drawn = drawn + mx.stack([zeros if one.bias is None else mx.array(one.bias) for one in samplers])
    if any(sampler.matcher is not None for sampler in samplers):
        masks = fill_masks([sampler.matcher for sampler in samplers], (logits.shape[1] + 31) // 32)
        drawn = masked(drawn, mx.array(masks.view(np.uint32)))
    if greedy and not any(reporting):
        return mx.argmax(drawn, axis=-1), [None] * len(samplers)
    changed, logits = drawn is not logits, logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    likely = logprobs
    if changed and not greedy:
        drawn = drawn.astype(mx.float32)
        likely = drawn - mx.logsumexp(drawn, axis=-1, keepdims=True)
    tokens = (
        mx.argmax(drawn if changed else logprobs, axis=-1)
        if greedy
        else mx.concatenate([sampler(likely[row : row + 1]) for row, sampler in enumerate(samplers)])
    )
    reports: list[Likelihoods | None] = [None] * len(samplers)
    for row, sampler in enumerate(samplers):
        if reporting[row]:
            own, count = logprobs[row], sampler.settings.top_logprobs or 0
            ids = mx.argpartition(-own, count - 1)[:count] if count else None
            reports[row] = Likelihoods(own[tokens[row]], ids, None if ids is None else own[ids])
    return tokens, reports


# Batches


@dataclass(eq=False)
class BatchRow:
    """One sequence.

    Attributes:
        owner: what its tokens are for; the engine's own object.
        adapter: number of its adapter, None for the base.
        sampler: draws its tokens.
        tokens: the tokens whose keys and values its cache holds.
        fresh: the next token that a step returns is the prompt's last, which is not new.
        kept: whether its keys and values are cached for later prompts.
        drafting: drafts its tokens while it is alone; None: nothing does.
    """

    owner: Any
    adapter: int | None
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    fresh: bool = True
    kept: bool = True
    drafting: Drafting | None = None


class Prefill:
    """A prompt that is computed in parts, so that running rows do not wait for a long prompt."""

    def __init__(
        self,
        model: TokenSteps,
        routing: Routing,
        row: BatchRow,
        tokens: list[int],
        caches: list[Any] | None = None,
        pictures: ModelWithImages | None = None,
    ):
        """Prepare to compute a prompt.

        Args:
            model: the routed model.
            routing: tells its layers which adapter to use.
            row: the sequence; `row.tokens` are those that `caches` holds.
            tokens: the rest of the prompt, at least one token.
            caches: of one sequence; None: empty ones.
            pictures: the model with what it reads in place of image tokens, which may have to see one another, so that the
                prompt is computed at once; its last token is text. None: all of it is text.
        """
        self._model, self._routing, self._pictures = model, routing, pictures
        self.row = row
        self.rest = tokens
        self.caches = make_prompt_cache(model.model) if caches is None else caches

    @property
    def done(self) -> bool:
        """Whether only the last token is left, which the batch's next step computes."""
        return len(self.rest) == 1

    def advance(self, most: int) -> None:
        """Compute up to `most` tokens of the prompt."""
        count = len(self.rest) - 1 if self._pictures else min(most, len(self.rest) - 1)
        part, self.rest = self.rest[:count], self.rest[count:]
        self._routing.rows = (self.row.adapter,)
        if self._pictures:
            self.caches = self._pictures.prefilled(part)
        elif self.row.drafting:
            self.row.drafting.see(part, self.caches)
        else:
            self._model(mx.array([part]), cache=self.caches)
            mx.eval([cache.state for cache in self.caches])
        self.row.tokens += part


class RunningBatch:
    """The rows that generate together."""

    def __init__(self, model: TokenSteps, routing: Routing):
        self._model, self._routing = model, routing
        self.rows: list[BatchRow] = []
        self._caches: list[Any] = []
        self._next: Any = None  # (B,) each row's next token, which may not be computed yet
        self._reports: list[Likelihoods | None] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the rows' keys and values."""
        return sum(cache.nbytes for cache in self._caches)

    def join(self, prefill: Prefill) -> None:
        """Add a row whose prompt is computed except for its last token."""
        self._catch_up()
        merged = merge_rows(self._model, [prefill.caches])
        if self._caches:
            for own, new in zip(self._caches, merged, strict=True):
                own.extend(new)
        else:
            self._caches = merged
        last = mx.array(prefill.rest, mx.uint32)
        self._next = last if self._next is None else mx.concatenate([self._next.astype(mx.uint32), last])
        self.rows.append(prefill.row)
        self._reports.append(None)

    def step(self) -> list[tuple[BatchRow, int, Likelihoods | None]]:
        """Start computing every row's next token, and return the tokens that the previous step started, of a drafting row more."""
        drafting = self.rows[0].drafting if len(self.rows) == 1 else None
        if drafting and not self.rows[0].sampler.follows and drafting.fits(self._caches):
            return self._step_of(self.rows[0], drafting)
        self._catch_up()
        known, reports = self._next, self._reports
        self._routing.rows = tuple(row.adapter for row in self.rows)
        logits = self._model(known[:, None], cache=self._caches)[:, -1]  # (B, V)
        if any(row.sampler.follows for row in self.rows):
            mx.async_eval(logits)  # computed while the host finds what may follow
            for row, token in zip(self.rows, known.tolist(), strict=True):
                if not row.fresh:
                    row.sampler.take(token)
        self._next, self._reports = sample_rows(logits, [row.sampler for row in self.rows])
        mx.async_eval(self._next, [[report.token, report.ids, report.values] for report in self._reports if report])
        news = []
        for row, token, report in zip(self.rows, known.tolist(), reports, strict=True):
            row.tokens.append(token)
            if row.fresh:
                row.fresh = False
            else:
                news.append((row, token, report))
        return news

    def _step_of(self, row: BatchRow, drafting: Drafting) -> list[tuple[BatchRow, int, Likelihoods | None]]:
        """Take the step of a row that is alone, and whose tokens are drafted."""
        known, reports = self._next.tolist(), list(self._reports)
        self._routing.rows = (row.adapter,)

        def draw(logits: mx.array, drafts: list[int]) -> list[int]:
            drawn, keys = [], []
            for at in range(len(logits)):
                token, (report,) = sample_rows(logits[at : at + 1], [row.sampler])
                drawn.append(token)
                reports.append(report)
                keys.append(row.sampler.key)
            mx.eval(drawn, [[one.token, one.ids, one.values] for one in reports if one])
            found = until_wrong(mx.concatenate(drawn).tolist(), drafts)
            row.sampler.key = keys[len(found) - 1]  # the tokens that were not used drew no number
            return found

        tokens = [*known, *drafting.step(known[0], self._caches, draw)]
        self._next, self._reports = mx.array(tokens[-1:], mx.uint32), [reports[len(tokens) - 1]]
        row.tokens += tokens[:-1]
        fresh, row.fresh = row.fresh, False
        return [(row, token, report) for token, report in zip(tokens[:-1], reports, strict=False)][fresh:]

    def _catch_up(self) -> None:
        """Compute what a drafting row's caches lack."""
        for row in self.rows:
            if row.drafting:
                self._routing.rows = (row.adapter,)
                row.drafting.catch_up(self._caches)

    def extract(self, row: BatchRow) -> list[Any]:
        """Return the caches of one row, for the prompt cache."""
        self._catch_up()
        return [extract_row(cache, self.rows.index(row)) for cache in self._caches]

    def leave(self, leaving: list[BatchRow]) -> None:
        """Remove rows."""
        keep = [index for index, row in enumerate(self.rows) if row not in leaving]
        self.rows = [self.rows[index] for index in keep]
        self._reports = [self._reports[index] for index in keep]
        if not keep:
            self._caches, self._next = [], None
            return
        chosen = mx.array(keep)
        for cache in self._caches:
            cache.filter(chosen)
        self._next = self._next[chosen]


# Keys and values of earlier prompts


class PromptCache:
    """A cache that evicts the least recently used entries first."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.reused_tokens = 0
        self._entries: OrderedDict[tuple[int | None, tuple[int, ...]], tuple[list[Any], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: int | None, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """Return a copy of the caches of the longest known prefix of `tokens`, and its length.

        At least the last token remains to be computed, because generation starts from its logits.

        Args:
            adapter: number of the adapter, None for the base.
            tokens: the prompt.
        """
        best, length = None, 0
        for key, (caches, _) in self._entries.items():
            known = key[1]
            if key[0] != adapter:
                continue
            common = next(
                (n for n, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), min(len(known), len(tokens))
            )
            common = min(common, len(tokens) - 1)
            if common > length and (common == len(known) or can_trim_prompt_cache(caches)):
                best, length = key, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        self.reused_tokens += length
        caches = copy.deepcopy(self._entries[best][0])
        if length < len(best[1]):
            trim_prompt_cache(caches, len(best[1]) - length)
        return caches, length

    def keep(self, adapter: int | None, tokens: list[int], caches: list[Any]) -> None:
        """Store the caches of `tokens`, which must not be changed afterwards; entries for their prefixes are dropped."""
        nbytes = sum(cache.nbytes for cache in caches)
        if nbytes > self.budget_bytes or not tokens:
            return
        own = tuple(tokens)
        covered = [key for key in self._entries if key[0] == adapter and own[: len(key[1])] == key[1]]
        for key in covered if can_trim_prompt_cache(caches) else [key for key in covered if key[1] == own]:
            self._forget(key)
        self._entries[adapter, own] = caches, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.budget_bytes:
            self._forget(next(iter(self._entries)))

    def drop(self, adapter: int) -> None:
        """Drop all entries of an adapter."""
        for key in [key for key in self._entries if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: tuple[int | None, tuple[int, ...]]) -> None:
        self.nbytes -= self._entries.pop(key)[1]


# The text of a row. It ends before a stop sequence; text that may be the beginning of one is held
# back until the following tokens decide


@dataclass(frozen=True)
class TokenReport:
    """A token's log-probability, and those of the likeliest tokens at its position.

    Attributes:
        text: the text of the token alone.
        logprob: natural logarithm.
        top: (text, logprob, bytes) of the likeliest tokens, best first.
        data: the token's own bytes, which may be a part of a character.
        start: where in the answer its text begins, in characters.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float, bytes], ...]
    data: bytes = b""
    start: int = 0


@dataclass(frozen=True)
class Piece:
    """Text that can be sent.

    Attributes:
        text: the new text.
        reports: on its tokens, if the request asks for them.
        stopped: a stop sequence was found; the text ends before it.
    """

    text: str
    reports: tuple[TokenReport, ...] = ()
    stopped: bool = False


class TextStream:
    """The text of one request."""

    def __init__(self, detokenizer: StreamingDetokenizer | Continuation, stops: tuple[str, ...]):
        """Start without text.

        Args:
            detokenizer: a new one.
            stops: stop sequences, none of them empty.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._sent = 0
        self._waiting: list[TokenReport] = []

    def add(self, token: int, report: TokenReport | None = None) -> Piece:
        """Add the next token and return the text that can be sent now."""
        if report is not None:
            self._waiting.append(replace(report, start=len(self._detokenizer.text)))
        add_token(self._detokenizer, token)
        return self._piece(rest=False)

    def finish(self) -> Piece:
        """Return the remaining text after the last token."""
        self._detokenizer.finalize()
        return self._piece(rest=True)

    def _piece(self, rest: bool) -> Piece:
        """Return what can be sent now; unless it is the rest, an end that could begin a stop sequence is held back."""
        text = self._detokenizer.text
        # Text that was already sent has no beginning of a stop sequence.
        starts = [start for start in (text.find(stop, self._sent) for stop in self._stops) if start >= 0]
        end = min(starts, default=len(text))
        if not starts and not rest:
            longest = max((len(stop) for stop in self._stops), default=1) - 1
            places = range(max(self._sent, len(text) - longest), len(text))
            end = next((at for at in places if any(stop.startswith(text[at:]) for stop in self._stops)), end)
        ready = [report for report in self._waiting if (rest and not starts) or report.start < end]
        self._waiting = self._waiting[len(ready) :]
        piece = Piece(text[self._sent : end], tuple(ready), stopped=bool(starts))
        self._sent = max(self._sent, end)
        return piece

"""Choose the form in which quantized weights multiply while a model generates text, by measurement and by memory.

    packed    as they are: `mx.quantized_matmul`, or dequantized anew for each product of many rows
    dense     a float copy beside the packed weights, made once and kept while text is generated

mlx's CPU backend computes packed products on one core, at a rate that reading dense weights from memory exceeds, and takes
8 times as long for 8 rows. A GPU reads packed weights faster. So both forms are measured once per machine on the shape
classes of the model's weights, at one row (a token), 8 (a batch of answers) and 64 (a prompt).

The copies belong to the layers (`DENSE` in models/matmul.py): names, parameters, packed weights and adapters around the
layers stay as they are. Experts stay packed, because a token only reads a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import Base
from mlx_lora.models.matmul import DENSE, MeasuredQuantizedEmbedding, MeasuredQuantizedLinear, packed_arrays
from mlx_lora.models.quantize import dequantized_weight
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.system.measuring import TOLERANCE, Figures, best_s, keep_figures, may_measure, read_figures

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


def layers_with_copies(base: Base) -> list[nn.Module]:
    """Return the layers of a model that can multiply by a dense copy: linear layers, and an embedding that is the head."""
    head = find_head(base.model, base.config)
    tied = not isinstance(head, Head) or hasattr(head.layer, "as_linear")
    kinds = (MeasuredQuantizedLinear, MeasuredQuantizedEmbedding) if tied else (MeasuredQuantizedLinear,)
    return [layer for layer in base.model.modules() if isinstance(layer, kinds)]  # checkpointing mixes a class in


def copied_bytes(base: Base) -> int:
    """Return what dense copies of a model's weights take; 0 if it has no quantized layer."""
    return sum(_copied_bytes(layer) for layer in layers_with_copies(base))


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


def hold_weights(base: Base, rows: int = TOKEN) -> DecodeWeights | None:
    """Give the layers of a model their chosen form, and keep it until `release_weights`; return the choice.

    Layers that have a copy keep it, and count as free memory, so that a second call chooses as the first.

    Raises:
        InputError: as for `choose_weights`.
    """
    held = sum(layer[DENSE].nbytes for layer in base.model.modules() if DENSE in layer)
    chosen = choose_weights(base, rows, device.free_bytes() + held)
    if chosen is None or chosen.form == PACKED:
        release_weights(base.model)
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
    """Drop the dense copies."""
    for layer in model.modules():
        layer.pop(DENSE, None)


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


def _dtype(layer: nn.Module) -> mx.Dtype:
    return layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else device.compute_dtype()


def _dense(layer: nn.Module) -> mx.array:
    return dequantized_weight(layer).astype(_dtype(layer))  # (out, in)


def _copied_bytes(layer: nn.Module) -> int:
    out, words = layer.weight.shape
    return out * (words * 32 // layer.bits) * _dtype(layer).size


def _seconds(layers: list[nn.Module], form: str, rows: int) -> float:
    """Return the time of a prompt of 64 tokens and of 64 tokens after it, in all layers, for each row."""
    total, known = 0.0, {}
    class_of_rows = TOKEN if rows == TOKEN else ANSWERS
    for layer in layers:
        out, width = layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.bits
        kind: Kind = (*device.shape_class((out, width)), layer.bits, layer.group_size, layer.mode)
        for count, times in ((class_of_rows, PROMPT / min(rows, class_of_rows)), (PROMPT, 1)):
            key = kind, _dtype(layer), count
            if key not in known:
                known[key] = product_figures(kind, count, _dtype(layer))[form].seconds
            total += times * known[key] * out * width / (kind[0] * kind[1])
    return total


def product_figures(
    kind: Kind, rows: int, dtype: mx.Dtype, say: Callable[[str], None] = lambda line: None
) -> dict[str, Figures]:
    """Return the figures of both forms for a kind of weight and a number of rows, measured once per machine.

    Args:
        kind: of the weight.
        rows: one of ROWS.
        dtype: of the activations.
        say: called with a line before a measurement.
    """
    before = f"{device.measured_on()}|{str(dtype).rpartition('.')[2]}|{NAME}"
    keys = {count: f"{before}|{count},{','.join(map(str, kind))}" for count in ROWS}
    figures = read_figures(keys[rows])
    if figures is None or figures.keys() != {PACKED, IN_FULL}:
        say(f"Measuring {NAME} for {kind_words((rows, *kind))}, once on this machine")
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


def choose_form(figures: dict[str, Figures]) -> str:
    """Return the form that the figures of one measurement speak for."""
    return IN_FULL if WORTH * figures[IN_FULL].seconds < figures[PACKED].seconds else PACKED


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
    from_rows = device.dense_matmul_from_rows((out, width), bits, group_size, mode, layers[0].scales.dtype)
    for layer in layers:
        layer.update({name: array + mx.zeros_like(array) for name, array in first.items()})
        layer.dense_from_rows = from_rows
        layer.__class__ = MeasuredQuantizedLinear
    mx.eval([layer.parameters() for layer in layers])
    return layers

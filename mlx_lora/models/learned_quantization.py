"""Quantize a float model with mlx-lm's own learned quantizers, on rows of text instead of by rounding alone.

    dwq    plain rounding, then gradient steps on scales and biases until the logits are the float model's
    awq    scales of input channels and clipped weights, searched block by block (arXiv 2306.00978)
    gptq   rounding with error feedback (arXiv 2210.17323); other layers, such as embeddings, get 6 bits

mlx-lm's functions are called as its commands call them, but with the user's rows; what they need and do not have is refused
before the work.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.quant import awq, dwq, gptq

from mlx_lora.models.folder import FOREIGN_ERRORS, short
from mlx_lora.models.quantize import Quantization, quantize_model
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

log = logging.getLogger(__name__)

WINDOW_TOKENS = 512  # mlx-lm's
FEWEST_TOKENS = 64
BATCH_ROWS = 4
DWQ_RATE = 1e-6  # mlx-lm's
GPTQ_BITS = (2, 4, 8)
GPTQ_OTHER_BITS = 6
Rows = Sequence[np.ndarray]
"""Token ids of each row."""


def check_quantizer(name: str, config: dict[str, Any], quantization: Quantization) -> None:
    """Refuse what mlx-lm's quantizer cannot do, before weights are read.

    Args:
        name: a key of QUANTIZERS.
        config: the model's config.json.
        quantization: that is asked for.

    Raises:
        InputError: with the reason.
    """
    flag, kind = f"--quantizer {name}", config.get("model_type")
    if quantization.mode != "affine":
        raise InputError(
            f"{flag} with --mode {quantization.mode}: mlx-lm's {name} only learns affine layers; leave --mode out"
        )
    if name == "gptq" and quantization.bits not in GPTQ_BITS:
        raise InputError(
            f"{flag} with --bits {quantization.bits}: mlx-lm's gptq has 2, 4 and 8 bits; give one of them, or --quantizer dwq"
        )
    if name == "gptq" and kind == "afm7":
        raise InputError(f"{flag}: mlx-lm cannot load afm7's joined layers as its gptq packs them; use --quantizer dwq")
    if name == "dwq" and quantization.bits >= 8:
        raise InputError(
            f"{flag} with --bits {quantization.bits}: mlx-lm's dwq trains layers of less than 8 bits; give fewer, or no --quantizer"
        )
    if name == "awq" and kind not in awq.AWQ_MODEL_CONFIGS:
        known = ", ".join(sorted(awq.AWQ_MODEL_CONFIGS))
        raise InputError(f"{flag}: mlx-lm's awq knows {known}, and not {kind}; use --quantizer dwq or gptq")


def learn_quantization(
    model: nn.Module, config: dict[str, Any], quantization: Quantization, name: str, rows: Rows
) -> nn.Module:
    """Return a float model quantized by one of mlx-lm's quantizers.

    Args:
        model: float; changed.
        config: its config.json.
        quantization: affine.
        name: a key of QUANTIZERS, checked.
        rows: to learn from.

    Raises:
        InputError: there are too few tokens, or mlx-lm's code cannot do this model.
    """
    tokens = sum(map(len, rows))
    if tokens < 2 * FEWEST_TOKENS:
        raise InputError(f"--calibrate: the rows have {counted(tokens, 'token')}; give at least {2 * FEWEST_TOKENS}")
    log.info(f"Learning the quantization with mlx-lm's {name}, on {tokens:,} tokens of {counted(len(rows), 'row')}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # standard output belongs to the command
            model = QUANTIZERS[name](model, config, quantization, rows)
        mx.eval(model.parameters())
    except FOREIGN_ERRORS as error:
        others = " or ".join(other for other in QUANTIZERS if other != name)
        raise InputError(
            f"--quantizer {name}: mlx-lm's {name} cannot quantize this {config.get('model_type')} model ({short(error)}); "
            f"try {others}, or leave it out"
        ) from error
    return model


def _windows(rows: Rows) -> mx.array:
    """Return (N, T): the rows one after the other, cut into windows."""
    joined = np.concatenate(rows)
    width = min(WINDOW_TOKENS, len(joined) // 2)
    return mx.array(joined[: len(joined) // width * width].reshape(-1, width).astype(np.int32))


def _dwq(model: nn.Module, config: dict[str, Any], quantization: Quantization, rows: Rows) -> nn.Module:
    student = copy.deepcopy(model)
    student, *_ = quantize_model(student, dict(config), quantization)
    dtype = max(
        (p.dtype for _, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)),
        key=lambda dtype: dtype.size,
    )
    width = min(WINDOW_TOKENS, sum(map(len, rows)) // 2)  # some are held out
    cut = [(row[start : start + width], 0) for row in rows for start in range(0, len(row), width)]
    cut = [row for row in cut if len(row[0]) > 1]
    if len(cut) < 2:
        raise InputError("--calibrate: the rows are single tokens; give texts")
    held_out = max(1, len(cut) // 10)
    batch = min(BATCH_ROWS, held_out, len(cut) - held_out)
    model.freeze()
    student.freeze()
    dwq.dwq_quantize(
        student,
        lambda ids, _, split: model(ids),
        optimizers.Adam(learning_rate=DWQ_RATE, bias_correction=True),
        cut[held_out:],
        cut[:held_out],
        batch_size=max(1, batch),
        max_seq_length=WINDOW_TOKENS + 1,
        seed=0,
        dtype=dtype,
    )
    student.eval()
    return student


def _awq(model: nn.Module, config: dict[str, Any], quantization: Quantization, rows: Rows) -> nn.Module:
    awq.awq_quantize(
        model,
        _windows(rows),
        awq.AWQ_MODEL_CONFIGS[config["model_type"]],
        group_size=quantization.group_size,
        bits=quantization.bits,
        embed_group_size=quantization.group_size,
        embed_bits=quantization.bits,
    )
    return model


def _gptq(model: nn.Module, config: dict[str, Any], quantization: Quantization, rows: Rows) -> nn.Module:
    made, _ = gptq.gptq_quantize(
        model, _windows(rows), quantization.bits, quantization.group_size, GPTQ_OTHER_BITS, quantization.group_size
    )
    return made


QUANTIZERS: dict[str, Callable[[nn.Module, dict[str, Any], Quantization, Rows], nn.Module]] = {
    "dwq": _dwq,
    "awq": _awq,
    "gptq": _gptq,
}

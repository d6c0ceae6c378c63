"""The table of kernels for `doctor`: all candidates measured on this machine, with time, memory and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.decode_weights import NAME as WEIGHTS
from mlx_lora.models.decode_weights import TOKEN, choose_form, kind_words, product_figures
from mlx_lora.models.head import Head
from mlx_lora.models.kernel_choice import choose_among
from mlx_lora.models.kernel_row import ShapeClass
from mlx_lora.models.kernel_table import activation_class, attention_class, kernel_rows
from mlx_lora.system import device
from mlx_lora.system.measuring import Figures, choose, read_figures, read_store
from mlx_lora.training.loss_choice import NAME, choose_kernel, head_words, loss_figures

# The shapes that `doctor --kernels` measures: widths of SmolLM2-135M, heads of Llama 3, recurrences of Qwen3.5 and Mamba-2.
ATTENTION = ((9, 3, 64, 256), (9, 3, 64, 1024), (32, 8, 128, 1024))
ACTIVATION = (1536, 8192)
HEAD = (49152, 576)
PACKED = ((512, 512, 4, 64, "affine"), (2048, 2048, 4, 64, "affine"))  # weights while text is generated
RECURRENT = {"gated delta": (128, 16, 32, 128, 128, "a gate per head"), "state space": (256, 24, 64, 1, 128)}


def measure_usual(say: Callable[[str], None]) -> None:
    """Measure kernels in common shapes, unless they were measured before.

    Args:
        say: called with one line before each measurement.
    """
    dtype, rows = device.compute_dtype(), {row.name: row for row in kernel_rows()}
    calls = [
        (rows["attention"], attention_class(heads, key_heads, width, width, keys))
        for heads, key_heads, width, keys in ATTENTION
    ]
    calls += [(rows["gated activation"], activation_class(width)) for width in ACTIVATION]
    calls += [(rows[name], shape) for name, shape in RECURRENT.items()]
    choose_among(calls, "auto", dtype, say)
    head = nn.Embedding(*HEAD)
    head.weight = head.weight.astype(dtype)
    head.freeze()
    mx.eval(head.weight)
    loss_figures(Head(nn.Module(), head), dtype, say)
    for kind in PACKED:
        product_figures(kind, TOKEN, dtype, say)


def known_table() -> list[dict[str, Any]]:
    """Return the measurements on this machine with this mlx: kernel, shape, dtype, choice, and each candidate's figures."""
    before = f"{device.measured_on()}|"
    words = {row.name: row.words for row in kernel_rows()} | {NAME: head_words, WEIGHTS: kind_words}
    rules = {NAME: choose_kernel, WEIGHTS: choose_form}
    table = []
    for key in sorted(read_store("kernels")):
        figures = read_figures(key) if key.startswith(before) else None
        dtype, _, rest = key.removeprefix(before).partition("|")
        kernel, _, of = rest.partition("|")
        if not figures or kernel not in words:
            continue
        shape: ShapeClass = tuple(int(part) if part.isdecimal() else part for part in of.split(","))
        table.append(
            {
                "kernel": kernel,
                "shape": words[kernel](shape),
                "dtype": dtype,
                "chosen": rules.get(kernel, choose)(figures) or "none is right",
                "candidates": {name: {**asdict(one), "correct": one.correct} for name, one in figures.items()},
            }
        )
    return table


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """Return the table as text, one line per candidate, with the chosen one marked."""
    lines = [f"{'':2}{'kernel and shape':<75}{'candidate':<10}{'ms':>9}{'kept MB':>9}{'peak MB':>9}{'error':>9}"]
    for row in table:
        title = f"{row['kernel']}, {row['shape']}, {row['dtype']}"
        for name, one in row["candidates"].items():
            mark = "*" if name == row["chosen"] else " "
            figures = Figures(**{key: value for key, value in one.items() if key != "correct"})
            lines.append(
                f"{mark} {title:<75}{name:<10}{figures.seconds * 1e3:>9.2f}{figures.kept_bytes / 1e6:>9.2f}"
                f"{figures.peak_bytes / 1e6:>9.2f}{figures.error:>9.0e}{'' if figures.correct else '  wrong'}"
            )
            title = ""
    return lines

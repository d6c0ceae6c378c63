"""Attention where a loss is measured: long rows in tiles, with the same loss and without all scores in memory; others as mlx has it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from comparing import by_dtype, peak_bytes

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels import table as long_rows
from mlx_lora.kernels.measure import MLX
from mlx_lora.kernels.table import LONG_ROW, attention_class, kernel_rows, long_row_kernels
from mlx_lora.losses.check import choose_loss
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.evaluate import mean_loss
from mlx_lora.utils import device


def a_row(vocabulary: int, positions: int) -> Batch:
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, positions + 1)).astype(np.int32)
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((1, positions), bool), positions)


def measured(model, config, batch: Batch, in_tiles: bool) -> tuple[float, int]:
    """Return the loss of a batch, and the most bytes that were allocated for it."""
    loss = choose_loss(model, config, "ours")
    bound = objective_of(ObjectiveSettings()).bind(loss if in_tiles else replace(loss, measuring=nullcontext), model)
    found = []
    peak = peak_bytes(lambda: found.append(mean_loss(model, bound, [batch]).loss), waits=False)
    return found[0], peak


LONG = 2048  # tokens of a row that is long here


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_long_row_is_measured_without_all_scores(name, monkeypatch):
    monkeypatch.setattr(device, "fuses_attention", lambda width, value_width: False)
    monkeypatch.setattr(long_rows, "LONG_ROW", LONG)
    model, config = tiny_architecture(name), tiny_config(name)
    model.eval()
    batch = a_row(config["vocab_size"], LONG)
    scores = 4 * config["num_attention_heads"] * LONG**2
    loss, peak = measured(model, config, batch, in_tiles=True)
    whole, peak_of_whole = measured(model, config, batch, in_tiles=False)
    assert loss == pytest.approx(whole, rel=by_dtype(1e-5, 1e-2))
    assert peak < peak_of_whole
    if not device.on_gpu():
        assert peak < scores / 2 < peak_of_whole


def test_shorter_rows_keep_their_bits():
    model = tiny_architecture("llama")
    inputs = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    own = model(inputs)
    with long_row_kernels(model):
        assert mx.array_equal(model(inputs), own)


def test_a_fused_kernel_is_kept_unless_it_reads_a_window_of_many(monkeypatch):
    [row] = [row for row in kernel_rows() if row.name == "attention"]
    monkeypatch.setattr(device, "fuses_attention", lambda width, value_width: True)
    assert long_rows._by_length(row, attention_class(4, 2, 64, 64, 2 * LONG_ROW)) == MLX
    assert long_rows._by_length(row, attention_class(4, 2, 64, 64, 2 * LONG_ROW, "window")) == row.assumed
